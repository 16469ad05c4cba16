"""Steps of training by reweighted losses, on all devices of all processes.

Parameters are on every device, a batch is divided among them, and a process reads the rows of its
own devices alone. Weights are those of the whole batch: under ``jit``, sums over a divided batch
are global.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.common.devices import Devices, in_batches, put
from scripts.common.task import Program
from scripts.continual_lm import methods as lm_methods
from scripts.continual_lm.data import Sequences

LossFn = Callable[[Any, dict[str, Any]], jax.Array]  # loss_fn(params, batch) -> [places]


class State(NamedTuple):
  """What a step takes over from the last one."""

  params: Any
  opt_state: Any


class Shown(NamedTuple):
  """What a step tells, of all places for examples in its rows."""

  losses: Any  # Before the update, [places].
  weights: Any  # Relative ones, 1 if uniform, [places].
  effective_sample_size: Any  # As a share of the examples.


def make_program(
  loss_fn: LossFn,
  weighting: jaxbo.dro.Weighting,
  learning_rate: optax.ScalarOrSchedule,
  devices: Devices,
) -> tuple[Callable[[Any], State], Program]:
  """``init(params) -> State``, from a copy of ``params``, and the program of its steps."""
  tx: Any = lm_methods.make_optimizer(weighting, learning_rate)
  # A gradient without the bad losses would double the time of compilation; a batch with one is
  # skipped as it is.
  gradients = jaxbo.per_example_grad(loss_fn)

  def init(params):
    return State(jax.tree.map(jnp.copy, params), tx.init(params))

  def step(state, t, batch):
    del t
    domain = batch["domain"].reshape(-1)  # -1 where there is no example: no weight either.
    grads = gradients(state.params, {n: field for n, field in batch.items() if n != "domain"})
    reweight_state = state.opt_state[0]
    groups = {"groups": jnp.maximum(domain, 0)}
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **groups)
    # The same weights once more, to look at: XLA computes them once.
    mask = {"mask": grads.mask, **groups}
    weights, *_ = weighting.weigh(grads.losses, reweight_state.weighting_state, **mask)
    number = jnp.sum(domain >= 0)
    share = opt_state[0].info.effective_sample_size / number
    shown = Shown(grads.losses, number * weights, share)
    return State(optax.apply_updates(state.params, updates), opt_state), shown

  everywhere = devices.everywhere
  return jax.jit(init, out_shardings=everywhere), Program(step, out_shardings=everywhere)


def batch_of(sequences: Sequences, rows: np.ndarray, devices: Devices) -> dict[str, jax.Array]:
  """What a step takes of the sequences in these rows."""
  fields = sequences.batch() | {"domain": sequences.domain}
  return {name: put(devices, field, rows) for name, field in fields.items()}


def make_evaluate(
  loss_fn: LossFn, batch_size: int, devices: Devices
) -> Callable[[Any, Sequences], np.ndarray]:
  """Makes ``evaluate(params, sequences)``, the losses ``[examples, ...]``, in batches."""
  of_batch = jax.jit(loss_fn, out_shardings=devices.everywhere)

  def evaluate(params, sequences):
    names, fields = zip(*sequences.batch().items(), strict=True)

    def by_row(params, *fields):
      losses = of_batch(params, dict(zip(names, fields, strict=True)))
      return losses.reshape(len(fields[0]), -1, *losses.shape[1:])

    losses = in_batches(devices, by_row, params, *fields, size=batch_size)
    return sequences.of_examples(losses.reshape(-1, *losses.shape[2:]))

  return evaluate
