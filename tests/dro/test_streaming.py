"""Streams give the gradient of the whole batch, to rounding, in one pass or two."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.dro import problem

pytestmark = pytest.mark.slow  # All together, not each.

PARAMS = problem.params()
# The hardest examples come in the middle and last, so that the running maximum moves twice.
BATCH = problem.batch()
BATCH = {**BATCH, "y": BATCH["y"].at[11].add(8.0).at[23].add(20.0)}
MASK, PRIOR = np.arange(problem.N) != 5, np.linspace(0.1, 2.0, problem.N, dtype=np.float32)
PRIOR[2] = np.inf  # is excluded
WEIGHTINGS = {
  "kl": jaxbo.dro.kl(optax.piecewise_constant_schedule(3.0, {1: 0.5})),
  "tilted": jaxbo.dro.tilted(-0.4),
  "compositional": jaxbo.dro.compositional(jaxbo.dro.kl(2.0), 0.3),
  "cvar": jaxbo.dro.cvar(0.3),
}
close = functools.partial(chex.assert_trees_all_close, rtol=3e-5, atol=1e-5)


def whole(weighting, state, batch=BATCH):
  grads = jaxbo.per_example_grad(problem.loss_fn, repair=True)(PARAMS, batch)
  return jaxbo.reweight(weighting).update(grads, state, PARAMS, mask=MASK, prior=PRIOR)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_stream_is_the_whole_batch(name):
  """For two batches in a row, with a mask, a prior, and one of each that is not finite."""
  weighting = WEIGHTINGS[name]
  streamed = jaxbo.streaming_grad(problem.loss_fn, weighting, microbatch_size=4, repair=True)
  batches = BATCH, {**BATCH, "y": BATCH["y"].at[9].set(jnp.nan)}

  @jax.jit
  def both(batches):
    results, states = [], [jaxbo.reweight(weighting).init(PARAMS)] * 2
    for batch in batches:
      expected, states[0] = whole(weighting, states[0], batch)
      result, states[1] = streamed(PARAMS, batch, states[1], mask=MASK, prior=PRIOR)
      results.append((expected, result))
    return results, states

  results, states = both(batches)
  for expected, result in results:
    chex.assert_tree_all_finite(result)
    close(result, expected)
  close(*states)
  assert states[0].info.num_excluded == 2


@pytest.mark.parametrize("name", ["kl", "cvar"])
def test_without_repair_one_bad_row_gives_no_gradient(name):
  """What the other microbatches have is the gradient of another batch."""
  streamed = jax.jit(jaxbo.streaming_grad(problem.loss_fn, WEIGHTINGS[name], microbatch_size=4))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(streamed(PARAMS, BATCH)[0]))
  bad = {**BATCH, "y": BATCH["y"].at[9].set(jnp.nan)}
  for mask in (None, np.arange(problem.N) != 9):  # A mask does not silence the row.
    gradient, info = streamed(PARAMS, bad, mask=mask)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert info.num_excluded == 1


@pytest.mark.parametrize("name", ["kl", "compositional", "cvar"])
def test_scores_groups_and_aux_are_those_of_the_whole_batch(name):
  """One score is not finite, and so is another loss; an aux comes back in the order of the rows."""
  loss_fn = lambda params, batch: (problem.loss_fn(params, batch), {"x": batch["x"]})
  options = {
    "scores": np.random.default_rng(1).normal(size=problem.N).astype(np.float32),
    "mask": MASK,
    "prior": PRIOR,
    "groups": np.arange(problem.N) % 3,
  }
  options["scores"][7] = np.nan
  bad = {**BATCH, "y": BATCH["y"].at[9].set(jnp.nan)}

  @jax.jit
  def both(batch):
    make = {"has_aux": True, "repair": True}
    grads = jaxbo.per_example_grad(loss_fn, **make)(PARAMS, batch)
    tx, weighting = jaxbo.reweight(WEIGHTINGS[name]), WEIGHTINGS[name]
    expected, state = tx.update(grads, tx.init(PARAMS), PARAMS, **options)
    streamed = jaxbo.streaming_grad(loss_fn, weighting, microbatch_size=4, **make)
    return streamed(PARAMS, batch, **options), (expected, state.info, grads.aux)

  streamed, whole = both(bad)
  close(streamed, whole)
  assert streamed[1].num_excluded == 3
  np.testing.assert_array_equal(streamed[2]["x"], BATCH["x"])


@pytest.mark.parametrize("name", ["kl", "cvar"])
def test_a_row_without_a_target_does_not_count_by_itself(name):
  """The loss says so; a mask that is given takes away more."""

  class Loss:
    def __call__(self, params, batch):
      return problem.loss_fn(params, batch)

    def example_mask(self, batch):
      return batch["x"][:, 0] > 0

  there = np.asarray(BATCH["x"][:, 0] > 0)
  few = jax.tree.map(lambda leaf: np.asarray(leaf)[there & MASK], BATCH)
  tx = jaxbo.reweight(WEIGHTINGS[name])
  update = lambda grads, **mask: tx.update(grads, tx.init(PARAMS), PARAMS, **mask)
  of_few = jaxbo.per_example_grad(problem.loss_fn)
  expected, right = jax.jit(lambda batch: update(of_few(PARAMS, batch)))(few)
  for size in (None, 4):
    lazy = jaxbo.per_example_grad(Loss(), microbatch_size=size)
    result, state = jax.jit(lambda batch, lazy=lazy: update(lazy(PARAMS, batch), mask=MASK))(BATCH)
    close(result, expected)
    assert state.info.num_valid == right.info.num_valid
    assert state.info.num_excluded == 0
  streamed = jax.jit(jaxbo.streaming_grad(Loss(), WEIGHTINGS[name], microbatch_size=4))
  result, info = streamed(PARAMS, BATCH, mask=MASK)
  close(result, expected)
  assert info.num_valid == right.info.num_valid


def test_arguments_are_checked_as_those_of_reweight_are(as_users_run):
  for weighting in (jaxbo.dro.kl(1.0), jaxbo.dro.cvar(0.5)):
    streamed = jaxbo.streaming_grad(problem.loss_fn, weighting, microbatch_size=4)
    for options, error, match in (
      ({"scores": jnp.ones(3)}, ValueError, r"scores must have the shape .*, got \(3,\)"),
      ({"mask": jnp.ones(24)}, TypeError, "mask must be boolean, got dtype float32"),
      ({"mask": jnp.ones(3, bool)}, ValueError, r"mask must have the shape .*, got \(3,\)"),
      ({"prior": jnp.ones((24, 1))}, ValueError, r"prior must have the shape .*\(24, 1\)"),
      ({"groups": jnp.ones(24)}, TypeError, "groups must be integers, got dtype float32"),
    ):
      with pytest.raises(error, match=match):
        streamed(PARAMS, BATCH, **options)
    sums = lambda params, batch: (problem.loss_fn(params, batch), batch["y"].sum())
    with pytest.raises(ValueError, match=r"aux must be \[batch, ...\] .* got shape \(\)"):
      jaxbo.streaming_grad(sums, weighting, microbatch_size=4, has_aux=True)(PARAMS, BATCH)


def passes(weighting):
  """How often the model runs forward and backward over the data."""
  calls = []

  @jax.custom_vjp
  def counted(x):
    jax.debug.callback(lambda: calls.append("forward"))
    return x

  def backward(_, cotangent):
    jax.debug.callback(lambda: calls.append("backward"))
    return (cotangent,)

  def forward(x):
    jax.debug.callback(lambda: calls.append("forward"))
    return x, None

  counted.defvjp(forward, backward)
  loss_fn = lambda params, batch: problem.loss_fn(jax.tree.map(counted, params), batch)
  streamed = jaxbo.streaming_grad(loss_fn, weighting, microbatch_size=8)
  jax.block_until_ready(jax.jit(streamed)(PARAMS, BATCH))
  jax.effects_barrier()
  num_microbatches, num_leaves = 3, 2
  return [calls.count(name) / (num_microbatches * num_leaves) for name in ("forward", "backward")]


def test_exponential_weights_take_one_pass_and_the_others_two():
  assert passes(jaxbo.dro.kl(0.5)) == [1, 1]
  assert passes(jaxbo.dro.cvar(0.5)) == [2, 1]


def test_without_a_state_the_info_is_returned_and_nothing_left_gives_zero():
  streamed = jax.jit(jaxbo.streaming_grad(problem.loss_fn, jaxbo.dro.kl(0.5), microbatch_size=8))
  gradient, info = streamed(PARAMS, BATCH)
  losses, _ = problem.per_example(BATCH)
  weights = np.exp((losses - losses.max()) / 0.5)
  close(gradient, problem.weighted(BATCH, weights / weights.sum()))
  assert isinstance(info, jaxbo.dro.WeightInfo)
  gradient, info = streamed(PARAMS, {**BATCH, "y": jnp.full(problem.N, jnp.nan)})
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
  assert info.num_valid == 0


def test_averaging_the_gradients_of_microbatches_is_something_else():
  tx = jaxbo.reweight(jaxbo.dro.kl(0.5))
  total = np.zeros(3)
  for j in range(3):
    rows = jax.tree.map(lambda leaf, j=j: leaf[j::3], BATCH)
    grads = jaxbo.per_example_grad(problem.loss_fn)(PARAMS, rows)
    total += tx.update(grads, tx.init(PARAMS))[0]["w"] / 3
  streamed = jaxbo.streaming_grad(problem.loss_fn, jaxbo.dro.kl(0.5), microbatch_size=8)
  right = jax.jit(streamed)(PARAMS, BATCH)[0]["w"]
  assert np.linalg.norm(total - right) > 0.5 * np.linalg.norm(right)


def test_huge_scores_neither_overflow_nor_vanish():
  streamed = jaxbo.streaming_grad(problem.loss_fn, jaxbo.dro.kl(1e-4), microbatch_size=4)
  gradient, _ = jax.jit(streamed)(PARAMS, BATCH)
  close(gradient, problem.weighted(BATCH, np.arange(problem.N) == 23))


def test_double_precision_is_the_whole_batch_to_its_rounding(x64):
  double = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float64))
  streamed = jaxbo.streaming_grad(problem.loss_fn, jaxbo.dro.kl(0.5), microbatch_size=4)
  gradient, _ = jax.jit(streamed)(double(PARAMS), double(BATCH))
  losses, _ = problem.per_example(BATCH)
  weights = np.exp((losses - losses.max()) / 0.5)
  expected = problem.weighted(BATCH, weights / weights.sum())
  chex.assert_trees_all_close(gradient, expected, rtol=1e-12)
