"""Which leaves of a batch are per example is said, and never guessed from their shapes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.cases import cases

# As many rows as the table of classes has: what shapes tell is wrong.
N = NUM_CLASSES = 6
PARAMS = jax.random.normal(jax.random.key(0), (4, NUM_CLASSES))
BATCH = {
  "x": jax.random.normal(jax.random.key(1), (N, 4)),
  "y": (5 * jnp.arange(N)) % NUM_CLASSES,
  "class_weights": jnp.arange(1.0, 1 + NUM_CLASSES),
}
AXES = {"x": 0, "y": 0, "class_weights": None}
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def loss_fn(params, batch):
  """Cross entropy, weighted by class."""
  losses = optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ params, batch["y"])
  return batch["class_weights"][batch["y"]] * losses


def right(batch, keep=slice(None)):
  """The mean gradient of some rows."""
  rows = batch | {name: np.asarray(batch[name])[keep] for name in ("x", "y")}
  return jax.jit(jax.grad(lambda params: loss_fn(params, rows).mean()))(PARAMS)


def reweighted(batch, **options):
  tx = jaxbo.reweight(jaxbo.dro.uniform())
  grads = jaxbo.per_example_grad(loss_fn, batch_axes=AXES, **options)(PARAMS, batch)
  return grads.losses, tx.update(grads, tx.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("size", [None, 2])
def test_a_table_with_as_many_rows_as_the_batch_goes_whole_to_every_part(size, repair):
  step = jax.jit(functools.partial(reweighted, microbatch_size=size, repair=repair))
  losses, gradient = step(BATCH)
  close(losses, jax.jit(loss_fn)(PARAMS, BATCH))
  close(gradient, right(BATCH))
  bad = np.where(np.arange(N)[:, None] == 4, np.nan, BATCH["x"])
  _, gradient = step(BATCH | {"x": bad.astype(np.float32)})
  close(gradient, right(BATCH, np.arange(N) != 4) if repair else 0 * PARAMS)


@cases("weighting", [jaxbo.dro.uniform(), jaxbo.dro.cvar(1.0)])  # one pass, and two
def test_streams_take_batch_axes_too(weighting):
  options = {"microbatch_size": 3, "batch_axes": AXES}
  close(
    jax.jit(jaxbo.streaming_grad(loss_fn, weighting, **options))(PARAMS, BATCH)[0], right(BATCH)
  )


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("size", [None, 2])
def test_examples_may_lie_along_any_axis(size, axis):
  """A prefix says it for all leaves below; a row that is not finite is replaced all the same."""
  of_rows = lambda params, batch: loss_fn(params, batch[0] | {"x": batch[0]["x"].T} | batch[1])
  rows = {"x": BATCH["x"].at[4].set(jnp.nan).T, "y": BATCH["y"]}
  grads = jaxbo.per_example_grad(
    of_rows, batch_axes=({"x": axis, "y": 0}, None), microbatch_size=size, repair=True
  )
  tx = jaxbo.reweight(jaxbo.dro.uniform())
  step = jax.jit(lambda batch: tx.update(grads(PARAMS, batch), tx.init(PARAMS))[0])
  batch = (rows, {"class_weights": BATCH["class_weights"]})
  close(step(batch), right(BATCH, np.arange(N) != 4))


def test_a_batch_that_is_not_cut_needs_no_axes():
  """A frozen model in the batch, with as many layers as there are examples."""
  grads = jaxbo.per_example_grad(loss_fn)(PARAMS, BATCH | {"key": jax.random.key(0)})
  close(grads.pullback(jnp.full(N, 1 / N)), right(BATCH))


@cases(
  ("options", "error", "match"),
  [
    (
      {"microbatch_size": 2},
      ValueError,
      r"batch\['class_weights'\] must have 8 rows along axis 0, one for each loss, got shape "
      r"\(6,\): batch_axes, here 0, must be None",
    ),
    ({"repair": True}, ValueError, r"batch\['class_weights'\] must have 8 rows"),
    ({"batch_axes": AXES | {"x": 1}}, ValueError, r"batch\['x'\] .* axis 1, .* shape \(8, 4\)"),
    ({"batch_axes": AXES | {"y": 1}}, ValueError, r"batch\['y'\] .* axis 1, .* shape \(8,\)"),
    ({"batch_axes": {"x": 0}}, ValueError, r"batch_axes must be a prefix .*, got {'x': 0}: "),
    ({"batch_axes": "x"}, TypeError, "batch_axes must hold integers and None, got 'x'"),
  ],
)
def test_a_leaf_without_the_axis_is_named(options, error, match):
  batch = BATCH | {"x": jnp.ones((8, 4)), "y": jnp.arange(8) % 6}
  with pytest.raises(error, match=match):
    jaxbo.per_example_grad(loss_fn, **options)(PARAMS, batch)
  if "repair" not in options:
    streamed = jaxbo.streaming_grad(loss_fn, jaxbo.dro.kl(1.0), **{"microbatch_size": 2, **options})
    with pytest.raises(error, match=match):
      streamed(PARAMS, batch)
