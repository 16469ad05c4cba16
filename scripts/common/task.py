"""A cell of an experiment, and the task that it makes: a state, a step, and what they tell."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from scripts.common.program import Program

Row = dict[str, Any]  # Of a table, by column.
Rows = Row | Sequence[Row]


@dataclass
class Spent:
  """What a cell took: seconds of its steps, without compilation and evaluation, and its lines."""

  seconds: float
  lines: list[Row]


class Task:
  """A cell at work.

  Step ``t`` depends on the state and on ``t`` alone, so a restored task goes on bit for bit.

  Attributes:
    state: where it starts, a pytree of arrays; a step may reuse its memory.
  """

  state: Any

  def step(self, state: Any, t: int) -> tuple[Any, Any]:
    """Does step ``t``; returns the new state, and what the step tells."""
    raise NotImplementedError

  def evaluate(self, state: Any, told: list[Any]) -> Rows:
    """The line of an evaluation, or several; ``told`` is of the steps since the last stop."""
    del state, told
    return []

  def result(self, state: Any, spent: Spent) -> Rows:
    """The row of the finished cell, or several."""
    del state, spent
    return []


class Compiled(Task):
  """A task whose step is a :class:`Program` on data that stay on the device."""

  def __init__(self, program: Program, state: Any, *data: Any):
    self.program = program
    self.state, self.data = jax.device_put((state, data))
    self._step = program.compile(self.state, *self.data)

  def step(self, state: Any, t: int) -> tuple[Any, Any]:
    """Does step ``t``."""
    return self._step(state, jnp.int32(t), *self.data)


@dataclass(frozen=True)
class Cell:
  """A method with a seed and a setting.

  Attributes:
    key: the columns that name it, in ``metrics.jsonl`` and ``results.csv``.
    make: makes its task, from the final states of the cells that it ``needs``.
    steps: how many steps it has.
    label: its name beside the bar.
    every: steps between evaluations; there is one after the last step in any case.
    checkpoint_every: steps between checkpoints; there is one after the last step in any case.
    needs: cells that must be finished before.
  """

  key: Mapping[str, Any]
  make: Callable[..., Task]
  steps: int
  label: str
  every: int | None = None
  checkpoint_every: int | None = None
  needs: tuple["Cell", ...] = ()
