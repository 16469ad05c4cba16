"""A cell of an experiment, and the task that it makes: a state, a step, and what they tell."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure

Row = dict[str, Any]  # Of a table, by column.
Rows = Row | Sequence[Row]


@dataclass
class Spent:
  """What a cell took, and its lines."""

  seconds: float  # Of its steps, without compilation and evaluation.
  lines: list[Row]


class Task:
  """A cell at work.

  Step ``t`` depends on the state and on ``t`` alone, so a restored task goes on bit for bit.
  """

  state: Any  # Where it starts, a pytree of arrays; a step may reuse its memory.

  def step(self, state: Any, t: int) -> tuple[Any, Any]:
    """Does step ``t``; returns the new state, and what the step tells: a tree of one structure."""
    raise NotImplementedError

  def evaluate(self, state: Any, told: list[Any]) -> Rows:
    """The line of an evaluation, or several; ``told`` is of the steps since the last stop."""
    return []

  def result(self, state: Any, spent: Spent) -> Rows:
    """The row of the finished cell, or several."""
    return []


class Program:
  """``step(state, t, *data) -> (state, told)``, which reuses the state's memory; ``t`` is an int32.

  It is compiled for the shapes that it meets first, and again where others come.
  """

  def __init__(self, step: Callable[..., tuple[Any, Any]], **options: Any):
    self._jitted = jax.jit(step, donate_argnums=0, **options)
    self._compiled: dict[Any, Callable[..., tuple[Any, Any]]] = {}
    self.compile_seconds = 0.0  # Of the last compilation.
    self.temporary_bytes = -1  # XLA's scratch memory, beside inputs and outputs; -1 if unknown.

  def compile(self, state: Any, *data: Any) -> Callable[..., tuple[Any, Any]]:
    """The compiled step for arguments like these."""
    leaves, structure = jax.tree.flatten((state, data))
    shapes = (structure, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
    if shapes not in self._compiled:
      start = time.perf_counter()
      compiled = self._jitted.lower(state, jnp.int32(0), *data).compile()
      self.compile_seconds = time.perf_counter() - start
      self.temporary_bytes = measure.temporary_bytes(compiled)
      self._compiled[shapes] = compiled
    return self._compiled[shapes]


class Compiled(Task):
  """A task whose step is a :class:`Program` on data that stay on the device, or are ``where``."""

  def __init__(self, program: Program, state: Any, *data: Any, where: Any = None):
    self.program = program
    self.state, self.data = jax.device_put((state, data), where)
    self._step = program.compile(self.state, *self.data)

  def step(self, state: Any, t: int) -> tuple[Any, Any]:
    """Does step ``t``."""
    return self._step(state, jnp.int32(t), *self.data)


@dataclass(frozen=True)
class Cell:
  """A method with a seed and a setting; it is evaluated and saved after its last step, too."""

  key: Mapping[str, Any]  # The columns that name it in ``metrics.jsonl`` and ``results.csv``.
  make: Callable[..., Task]  # From the final states of the cells that it needs.
  steps: int
  label: str  # Its name beside the bar.
  every: int | None = None  # Steps between evaluations.
  checkpoint_every: int | None = None
  needs: tuple["Cell", ...] = ()

  def owns(self, row: Row) -> bool:
    """Whether a row or a line is of this cell."""
    return self.key.items() <= row.items()

  def due(self, every: int | None, done: int) -> bool:
    """Whether what comes at every so many steps, and after the last one, comes now."""
    return done == self.steps or (bool(every) and done % every == 0)

  def stops(self, done: int) -> Iterator[int]:
    """The later steps after which an evaluation or a checkpoint is due."""
    for t in range(done + 1, self.steps + 1):
      if self.due(self.every, t) or self.due(self.checkpoint_every, t):
        yield t
