"""A hyper-cleaning method at work: compiled once, run on each seed, looked at now and then."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from scripts.common.cleaning import CleaningData, Program
from scripts.common.data import Examples


class Executable(NamedTuple):
  """A method, compiled once for all seeds."""

  run: jax.stages.Compiled
  compile_seconds: float


class Run(NamedTuple):
  """A method on one seed, as far as it came.

  Attributes:
    executable: the compiled method.
    outer_steps: outer steps done.
    seconds: training time at each evaluation, without compilation and evaluation.
    outer_loss: outer loss at each evaluation.
    accuracy: test accuracy at each evaluation.
    weights: the weights of the training examples at the last one, ``[num_train]``.
    corrupted: which of them have a wrong label.
  """

  executable: Executable
  outer_steps: int
  seconds: list[float]
  outer_loss: list[float]
  accuracy: list[float]
  weights: np.ndarray
  corrupted: np.ndarray


def compile_program(program: Program, val: Examples) -> Executable:
  """Compiles ``program.run``; it takes the state's memory over."""
  start = time.perf_counter()
  lowered = jax.jit(program.run, donate_argnums=0).lower(
    program.state, jax.random.key(0), program.train, val
  )
  return Executable(lowered.compile(), time.perf_counter() - start)


def fit(
  program: Program,
  executable: Executable,
  data: CleaningData,
  num_runs: int,
  seed: int,
  accuracy: Callable[..., jax.Array],
) -> Iterator[Run]:
  """Runs a method to its end; yields the run so far at each of ``num_runs`` evaluations."""
  state, train, val, test = jax.device_put((program.state, program.train, data.val, data.test))
  run = Run(executable, 0, [], [], [], np.zeros(0), data.corrupted)
  total = 0.0
  for i in range(num_runs):
    key = jax.random.fold_in(jax.random.key(seed), i)
    start = time.perf_counter()
    state, losses = jax.block_until_ready(executable.run(state, key, train, val))
    total += time.perf_counter() - start
    run = run._replace(
      outer_steps=run.outer_steps + len(losses),
      seconds=[*run.seconds, total],
      outer_loss=[*run.outer_loss, float(losses[-1])],
      accuracy=[*run.accuracy, float(accuracy(state.solution.params, test))],
      # Read now: after an interruption the state's memory may be gone.
      weights=np.asarray(jax.nn.sigmoid(state.x), np.float64),
    )
    yield run
