"""Trains a language model by reweighted losses, on all devices of all processes.

Parameters are on every device, a batch is divided among them, and a process reads the rows of its
own devices alone. Weights are those of the whole batch: under ``jit``, sums over a divided batch
are global.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.common.checkpoints import Checkpoints
from scripts.common.devices import Devices, put
from scripts.continual_lm import methods as lm_methods
from scripts.continual_lm.data import Sequences, rows_of_batch

LossFn = Callable[[Any, dict[str, Any]], jax.Array]  # loss_fn(params, batch) -> [batch]


class State(NamedTuple):
  """What a step takes over from the last one."""

  params: Any
  opt_state: Any


class Shown(NamedTuple):
  """What a step tells.

  Attributes:
    losses: before the update, ``[batch]``.
    weights: relative ones, 1 if uniform, ``[batch]``.
    effective_sample_size: as a share of the batch.
  """

  losses: Any
  weights: Any
  effective_sample_size: Any


class Program:
  """A method, compiled once for all seeds and data, when the first of them wants a step.

  Attributes:
    init: ``init(params) -> State``, from a copy of ``params``.
  """

  def __init__(
    self,
    loss_fn: LossFn,
    weighting: jaxbo.Weighting,
    learning_rate: optax.ScalarOrSchedule,
    devices: Devices,
  ):
    tx: Any = lm_methods.make_optimizer(weighting, learning_rate)
    # A gradient without the bad losses would double the time of compilation; a batch with one is
    # skipped as it is.
    gradients = jaxbo.per_example_grad(loss_fn, repair=False)

    def init(params):
      return State(jax.tree.map(jnp.copy, params), tx.init(params))

    def step(state, batch):
      grads = gradients(state.params, {"tokens": batch["tokens"]})
      reweight_state = state.opt_state[0]
      groups = {"groups": batch["domain"]}
      updates, opt_state = tx.update(grads, state.opt_state, state.params, **groups)
      # The same weights once more, to look at: XLA computes them once.
      weights, *_ = weighting.weigh(grads.losses, reweight_state.weighting_state, **groups)
      share = opt_state[0].info.effective_sample_size / weights.size
      shown = Shown(grads.losses, weights.size * weights, share)
      return State(optax.apply_updates(state.params, updates), opt_state), shown

    self.init = jax.jit(init, out_shardings=devices.everywhere)
    self._step = jax.jit(step, donate_argnums=0, out_shardings=devices.everywhere)
    self._compiled: Step | None = None

  def compile(self, state: State, batch: dict[str, jax.Array]) -> "Step":
    """Returns ``step(state, batch) -> (state, shown)``, which takes the state's memory over."""
    if self._compiled is None:
      self._compiled = self._step.lower(state, batch).compile()
    return self._compiled


Step = Callable[[State, dict[str, jax.Array]], tuple[State, Shown]]


def make_evaluate(
  loss_fn: LossFn, batch_size: int, devices: Devices
) -> Callable[[Any, Sequences], np.ndarray]:
  """Makes ``evaluate(params, sequences)``, their losses ``[n]``, in batches."""
  of_batch = jax.jit(
    lambda params, tokens: loss_fn(params, {"tokens": tokens}), out_shardings=devices.everywhere
  )

  def evaluate(params, sequences):
    n = len(sequences.tokens)
    batches = [np.arange(i, i + batch_size) % n for i in range(0, n, batch_size)]
    losses = [of_batch(params, put(devices, sequences.tokens, rows)) for rows in batches]
    return np.concatenate([np.asarray(part) for part in losses])[:n]

  return evaluate


class Window(NamedTuple):
  """Some steps in a row.

  Attributes:
    done: the steps of the run up to the last of them.
    seconds: of the run so far, without compilation and evaluation.
    shown: what they told, leaves ``[steps, ...]``.
    rows: what their batches held, ``[steps, batch]``.
  """

  done: int
  seconds: float
  shown: Shown
  rows: np.ndarray


class Trainer:
  """A run of a method: its state, its batches, its checkpoints.

  Step ``t`` depends on the state, the stream and ``t`` alone: a restored run goes on bit for bit.
  """

  def __init__(
    self,
    program: Program,
    params: Any,
    sequences: Sequences,
    batch_size: int,
    stream: tuple[int, ...],
    folder: Path,
    devices: Devices,
  ):
    self.program = program
    self.state = program.init(params)
    self.seconds = 0.0
    self._sequences = sequences
    self._batch_size = batch_size
    self._stream = stream
    self._devices = devices
    self.checkpoints = Checkpoints(folder)

  def restore(self) -> int:
    """Goes back to the last checkpoint if there is one; returns the steps done."""
    self.state, self.seconds, done = self.checkpoints.restore(self.state)
    return done

  def close(self) -> None:
    """Waits until all checkpoints are written."""
    self.checkpoints.close()

  def batch(self, rows: np.ndarray) -> dict[str, jax.Array]:
    """These sequences, on the devices."""
    return batch_of(self._sequences, rows, self._devices)

  def fit(
    self, done: int, num_steps: int, every: int, on_step: Callable[[int], None] = lambda done: None
  ) -> Iterator[Window]:
    """Trains from step ``done`` on; yields what ``every`` so many steps told.

    ``on_step`` is called with the number of steps that the devices have finished. A checkpoint is
    written after what the caller does with a window, so that none is left out when the run is
    stopped in between.
    """
    if done >= num_steps:
      return
    step_once = self.program.compile(self.state, self.batch(np.arange(self._batch_size)))
    while done < num_steps:
      stop = min(num_steps, (done // every + 1) * every)
      shown, all_rows = [], []
      start = time.perf_counter()
      for step in range(done, stop):
        rows = rows_of_batch(len(self._sequences.tokens), self._batch_size, self._stream, step)
        self.state, one = step_once(self.state, self.batch(rows))
        jax.block_until_ready(shown[-1:])  # One step waits while another runs.
        on_step(step)
        shown.append(one)
        all_rows.append(rows)
      jax.block_until_ready(self.state)
      self.seconds += time.perf_counter() - start
      done = stop
      told = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *shown)
      yield Window(done, self.seconds, told, np.stack(all_rows))
      self.checkpoints.save(done, self.state, self.seconds)


def batch_of(sequences: Sequences, rows: np.ndarray, devices: Devices) -> dict[str, jax.Array]:
  """What a step takes of the sequences in these rows."""
  fields = {"tokens": sequences.tokens, "domain": sequences.domain}
  return {name: put(devices, array, rows) for name, array in fields.items()}
