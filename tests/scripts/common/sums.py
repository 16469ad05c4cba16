"""An experiment in NumPy, of which nothing is compiled, and a kill."""

from typing import Annotated

import numpy as np
import pytest

from scripts.common import folder, study
from scripts.common.config import FREE, GROWS, Count, StudyConfig
from scripts.common.study import Study
from scripts.common.table import Column, spread
from scripts.common.task import Cell, Task


class Config(StudyConfig):
  """Sums, in NumPy: nothing is compiled."""

  seeds: Count = 2
  """How many."""
  steps: Annotated[Count, GROWS] = 7
  """Steps."""
  factor: float = 1.0
  """Of the numbers."""
  every: Annotated[Count, FREE] = 2
  """Steps between evaluations."""
  checkpoint_every: Annotated[Count, FREE] = 3
  """Steps between checkpoints."""


class Sum(Task):
  """Adds up numbers; what it tells is of an array and of a number."""

  def __init__(self, config, seed):
    self.factor, self.seed, self.state = config.factor, seed, {"sum": np.zeros(20)}

  def step(self, state, t):
    number = self.factor * np.random.default_rng((self.seed, t)).normal(size=20)
    return {"sum": state["sum"] + number}, (number, float(t))

  def evaluate(self, state, told):
    numbers, steps = zip(*told, strict=True)
    return {"sum": state["sum"].sum(), "told": np.sum(numbers), "first": steps[0]}

  def result(self, state, spent):
    return {"sum": state["sum"].sum(), "evaluations": len(spent.lines)}


class Sums(Study[Config]):
  """The experiment."""

  config = Config
  program = "sums"

  def begin(self, run):
    run.note("noted", lambda: {"once": 1})

  def cells(self, run):
    config = run.config
    for seed in config.all_seeds():
      make = lambda seed=seed: Sum(config, seed)
      every = config.every, config.checkpoint_every
      yield Cell({"method": "sum", "seed": seed}, make, config.steps, f"seed {seed}", *every)

  def tables(self, results):
    yield spread("Sums", results.rows, "method", str, {"sum": Column("sum", 2)})

  def draw(self, run):
    for cell in run.finished():
      assert run.saved(cell)["sum"].shape == (20,)


def play(path, **options):
  return study.run(Sums(), Config(output_dir=path, **options))


def go_on(path, **options):
  """As users do: ``--resume`` where there is a run, else from the start."""
  return play(path, resume=(path / "config.json").exists(), **options)


def files_of(path):
  lines, rows, notes = folder.read(path)
  order = lambda line: (line["seed"], line["step"])
  return rows, sorted(({**line, "seconds": 0} for line in lines), key=order), notes


def bytes_of(path):
  return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def checkpoint(path, number, seed=1):
  return path / "checkpoints" / f"method-sum_seed-{seed}" / f"{number}.ckpt"


class KilledError(BaseException):
  """Nothing more is written, as after ``kill -9``."""


def interrupt(path, monkeypatch, at, **options):
  """A run that a kill ends in step ``at`` of the second seed."""
  step = Sum.step

  def killed(self, state, t):
    if (self.seed, t) == (1, at):
      raise KilledError
    return step(self, state, t)

  with monkeypatch.context() as patch:
    patch.setattr(Sum, "step", killed)
    with pytest.raises(KilledError):
      play(path, **options)
