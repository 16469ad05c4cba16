"""The smallest experiment: sums of random numbers. Run as a program, it can be killed."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from scripts.common import study, table
from scripts.common.config import FREE, GROWS, Among, Count, Positive, StudyConfig
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Compiled, Program, Row, Spent

METHODS = {"plain": 1.0, "double": 2.0}


class Config(StudyConfig):
  """Sums of random numbers."""

  smallest: ClassVar = {"steps": 2, "seeds": 1}

  methods: Annotated[tuple[str, ...], Among(METHODS), FREE] = tuple(METHODS)
  """Which methods."""
  steps: Annotated[Count, GROWS] = 7
  """Steps."""
  scale: Positive = 1.0
  """Of the numbers."""
  seeds: Count = 2
  """How many."""
  numbers: Path | None = None
  """A file, which is not read."""
  every: Annotated[Count, FREE] = 2
  """Steps between evaluations."""
  checkpoint_every: Annotated[Count, FREE] = 3
  """Steps between checkpoints."""
  output_dir: Annotated[Path, FREE] = Path("runs/toy")
  """Where results go."""


class Sum(Compiled):
  """A method on one seed, from the sum that a cell before it ended with."""

  def __init__(self, run: Run[Config], method: str, seed: int, start: Any = None):
    factor = METHODS.get(method, 0.0)

    def step(state, t, key, scale):
      draw = jax.random.normal(jax.random.fold_in(jax.random.wrap_key_data(key), t))
      number = factor * scale * draw
      return {"sum": state["sum"] + number}, number

    program = run.shared(method, lambda: Program(step))
    state = {"sum": jnp.float32(0) if start is None else jnp.copy(start["sum"])}
    key = jax.random.key_data(jax.random.key(seed))
    super().__init__(program, state, key, jnp.float32(run.config.scale))

  def evaluate(self, state: Any, told: list[Any]) -> Row:
    """The sum so far; no number is finite at step 4."""
    return {"sum": float(state["sum"]), "last": float(told[-1])}

  def result(self, state: Any, spent: Spent) -> Row:
    """The sum."""
    return {"sum": float(state["sum"]), "seconds": spent.seconds, "evaluations": len(spent.lines)}


class Toy(Study[Config]):
  """The experiment."""

  config = Config

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """A start that all need, and then every method on every seed."""
    config = run.config
    start = Cell({"method": "start", "seed": -1}, lambda: Sum(run, "start", 0), 0, "start")
    yield start
    for seed in config.all_seeds():
      for method in config.methods:
        make = functools.partial(Sum, run, method, seed)
        every = config.every, config.checkpoint_every
        yield Cell({"method": method, "seed": seed}, make, config.steps, method, *every, (start,))

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """Sums."""
    rows = results.rows[results.rows["method"] != "start"]
    yield table.spread("Sums", rows, "method", str, {"sum": Column("sum", 2)})

  def draw(self, run: Run[Config]) -> None:
    """Writes the last states in place of a picture."""
    text = [f"{cell.key} {run.saved(cell)['sum']}\n" for cell in run.finished()]
    (run.path / "picture.txt").write_text("".join(text))


if __name__ == "__main__":
  study.main(Config, functools.partial(study.run, Toy()), __doc__)
