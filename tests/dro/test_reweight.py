"""The transformation on one device: the right gradient, whatever form gradients come in."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.cases import cases
from tests.dro import problem

PARAMS, BATCH = problem.params(), problem.batch()
KL = jaxbo.dro.kl(0.5)
close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=2e-5, atol=1e-6)


def softmax(losses, temperature=0.5, mask=None):
  mask = np.ones(len(losses), bool) if mask is None else mask
  powers = np.where(mask, np.exp((losses - losses[mask].max()) / temperature), 0)
  return powers / powers.sum()


def update(weighting, grads, *, scale="mean", **options):
  tx = jaxbo.reweight(weighting, scale=scale)
  return tx.update(grads, tx.init(PARAMS), PARAMS, **options)


@jax.jit
def lazy_kl(batch, mask):
  grads = jaxbo.per_example_grad(problem.loss_fn)(PARAMS, batch)
  return update(KL, grads, mask=mask), grads.losses


ALL = np.ones(problem.N, bool)


def test_the_gradient_is_the_weighted_sum():
  losses, _ = problem.per_example(BATCH)
  (gradient, state), jax_losses = lazy_kl(BATCH, ALL)
  np.testing.assert_allclose(jax_losses, losses, rtol=1e-5)
  weights = softmax(losses)
  close(gradient, problem.weighted(BATCH, weights))
  np.testing.assert_allclose(state.info.effective_sample_size, 1 / np.sum(weights**2), rtol=1e-5)
  np.testing.assert_allclose(state.info.surrogate, weights @ losses, rtol=1e-5)


def test_the_gradient_is_that_of_the_robust_value():
  """No term comes from the weights (Danskin)."""
  value = lambda params: jaxbo.dro.robust_value(problem.loss_fn(params, BATCH), KL)
  close(jax.jit(jax.grad(value))(PARAMS), lazy_kl(BATCH, ALL)[0][0])


def test_stored_gradients_give_the_same_with_scale_and_arguments():
  losses, grads = problem.per_example(BATCH)
  grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
  mask, prior = np.arange(problem.N) < 20, np.linspace(0.0, 2.0, problem.N)
  weights = np.where(mask, prior * np.exp(losses / 0.5), 0)
  weights /= weights.sum()

  @jax.jit
  def both(grads):
    arguments = {"mask": mask, "prior": prior, "scale": "sum"}
    lazy = jaxbo.per_example_grad(problem.loss_fn)(PARAMS, BATCH)
    return update(KL, grads, losses=lazy.losses, **arguments), update(KL, lazy, **arguments)

  for gradient, state in both(grads):
    close(gradient, problem.weighted(BATCH, 19 * weights))  # one prior of 20 is zero
    assert state.info.num_valid == 19
  scattered = jax.tree.map(lambda g: g.at[21].set(jnp.nan), grads)
  close(both(scattered)[0][0], both(grads)[0][0])  # Example 21 is masked.


def test_scores_may_stand_for_the_losses():
  scores = np.random.default_rng(1).normal(size=problem.N).astype(np.float32)
  scores[3] = np.inf

  @jax.jit
  def gradient(batch):
    lazy = jaxbo.per_example_grad(problem.loss_fn, repair=True)(PARAMS, batch)
    return update(KL, lazy, scores=scores)

  bad = {**BATCH, "y": BATCH["y"].at[5].set(jnp.nan)}
  result, state = gradient(bad)
  keep = ~np.isin(np.arange(problem.N), [3, 5])
  close(result, problem.weighted(BATCH, softmax(scores.astype(np.float64), mask=keep)))
  assert state.info.num_excluded == 2


@pytest.mark.parametrize("microbatch_size", [None, 6])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_never_reaches_the_parameters(microbatch_size, bad):
  batch = {**BATCH, "y": BATCH["y"].at[jnp.array([0, 7])].set(bad)}

  @jax.jit
  def gradient(batch, mask):
    lazy = jaxbo.per_example_grad(problem.loss_fn, microbatch_size=microbatch_size, repair=True)
    return update(KL, lazy(PARAMS, batch), mask=mask)

  keep = ~np.isin(np.arange(problem.N), [0, 7])
  result, state = gradient(batch, ALL)
  expected = problem.weighted(BATCH, softmax(problem.per_example(BATCH)[0], mask=keep))
  close(result, expected)
  assert state.info.num_excluded == 2
  # A masked one does not either, and is not counted.
  masked, state = gradient(batch, keep)
  close(masked, expected)
  assert state.info.num_excluded == 0
  # The plain pullback would have failed.
  _, pullback = jax.vjp(lambda p: problem.loss_fn(p, batch), PARAMS)
  assert not np.all(np.isfinite(pullback(jnp.where(keep, 0.1, 0.0))[0]["w"]))
  # And if nothing is left, the gradient is zero.
  nothing = {**BATCH, "y": jnp.full(problem.N, bad)}
  for empty, mask in ((nothing, ALL), (BATCH, ~ALL)):
    result, state = gradient(empty, mask)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(result))
    assert state.info.num_valid == 0


def test_the_gradient_is_zero_if_no_row_is_good_and_zeros_are_not_either():
  """Zeros are in the place of the bad rows, then, where this logarithm has no slope."""
  loss_fn = lambda params, batch: params * jnp.log(batch)
  for size in (None, 2):
    grads = jaxbo.per_example_grad(loss_fn, microbatch_size=size, repair=True)
    step = jax.jit(lambda batch, grads=grads: update(KL, grads(jnp.ones(()), batch)))
    result, state = step(jnp.array([-1.0, 0.0, jnp.nan, -2.0]))
    assert result == 0
    assert state.info.num_excluded == 4


def test_without_repair_a_bad_batch_gives_no_gradient():
  lazy = jaxbo.per_example_grad(problem.loss_fn)
  step = jax.jit(lambda batch: update(KL, lazy(PARAMS, batch)))
  close(step(BATCH)[0], lazy_kl(BATCH, ALL)[0][0])
  result, state = step({**BATCH, "y": BATCH["y"].at[0].set(jnp.nan)})
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(result))
  assert state.info.num_excluded == 1
  # A masked row does the same, and is counted for it.
  masked = jax.jit(lambda batch, mask: update(KL, lazy(PARAMS, batch), mask=mask))
  bad = {**BATCH, "y": BATCH["y"].at[0].set(jnp.nan)}
  result, state = masked(bad, np.arange(problem.N) != 0)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(result))
  assert state.info.num_excluded == 1
  # A pullback of the user's own cannot be repaired either.
  losses, vjp = jax.vjp(lambda p: problem.loss_fn(p, BATCH), PARAMS)
  own = jaxbo.dro.PerExampleGrads(losses, lambda weights: vjp(weights)[0])
  close(update(KL, own)[0], lazy_kl(BATCH, ALL)[0][0])


def test_without_repair_a_bad_loss_counts_even_if_its_gradient_is_finite():
  """A loss may be set to NaN behind its gradient; the rule is that of the losses."""
  third = jnp.arange(problem.N) == 3
  spoilt = lambda params, batch: jnp.where(third, jnp.nan, problem.loss_fn(params, batch))
  for repair in (False, True):
    lazy = jaxbo.per_example_grad(spoilt, repair=repair)
    result, state = update(KL, lazy(PARAMS, BATCH))
    keep = np.arange(problem.N) != 3
    expected = problem.weighted(BATCH, softmax(problem.per_example(BATCH)[0], mask=keep))
    close(result, expected if repair else jax.tree.map(jnp.zeros_like, result))
    assert state.info.num_excluded == 1


def test_replaced_rows_keep_integers_booleans_and_keys():
  """Rows are replaced whole; a key for each example stays, and a shared one goes to all."""

  def loss_fn(params, batch):
    noise = jax.vmap(jax.random.normal)(batch["keys"])
    shared = jax.random.normal(batch["key"])
    sign = jnp.where(batch["flag"], 1.0, -1.0)
    table = jnp.array([1.0, 2.0, jnp.nan])
    return sign * table[batch["label"]] * params + 0.1 * (noise + shared)

  batch = {
    "keys": jax.random.split(jax.random.key(0), 4),
    "key": jax.random.key(1),
    "flag": jnp.array([True, True, False, True]),
    "label": jnp.array([2, 0, 1, 1]),  # The first one gives NaN.
  }
  axes = {"keys": 0, "key": None, "flag": 0, "label": 0}
  for size in (None, 2):
    grads = jaxbo.per_example_grad(loss_fn, batch_axes=axes, microbatch_size=size, repair=True)
    step = jax.jit(
      lambda batch, grads=grads: update(jaxbo.dro.uniform(), grads(jnp.ones(()), batch))
    )
    np.testing.assert_allclose(step(batch)[0], (1 - 2 + 2) / 3, rtol=1e-6)


def test_microbatches_give_the_losses_the_aux_and_the_gradient_of_the_whole():
  def loss_fn(params, batch):
    losses = problem.loss_fn(params, batch)
    return losses, {"twice": 2 * losses, "rows": batch["x"]}

  whole = jaxbo.per_example_grad(loss_fn, has_aux=True)(PARAMS, BATCH)
  grads = jaxbo.per_example_grad(loss_fn, has_aux=True, microbatch_size=4)
  weights = jnp.linspace(0.0, 1.0, problem.N)
  losses, aux, gradient = jax.jit(
    lambda: (lambda g: (g.losses, g.aux, g.pullback(weights)))(grads(PARAMS, BATCH))
  )()
  close(losses, whole.losses)
  close(aux, whole.aux)
  close(gradient, problem.weighted(BATCH, weights))


def test_an_optax_aggregator_is_what_it_is():
  """Per-example clipping before, SGD behind."""
  experimental = pytest.importorskip("optax.experimental")
  if not hasattr(experimental, "aggregating"):
    pytest.skip("this optax has no aggregators yet")
  aggregating = experimental.aggregating
  losses, grads = problem.per_example(BATCH)
  grads = {"w": jnp.asarray(grads["w"], jnp.float32)}
  params = {"w": PARAMS["w"]}
  clip = optax.with_extra_args_support(
    optax.stateless(lambda g, _: jax.tree.map(lambda leaf: jnp.clip(leaf, -1, 1), g))
  )
  sgd = optax.with_extra_args_support(optax.sgd(0.5))
  aggregator = aggregating.Aggregator(*jaxbo.reweight(KL))
  tx = aggregating.process(clip, aggregator, sgd)
  result, _ = tx.update(grads, tx.init(params), params, losses=jnp.asarray(losses, jnp.float32))
  expected = -0.5 * softmax(losses) @ np.clip(np.asarray(grads["w"]), -1, 1)
  np.testing.assert_allclose(result["w"], expected, rtol=1e-4)


def test_a_loss_that_closes_over_the_whole_batch_is_told_so():
  scale = jnp.linspace(0.5, 2.0, problem.N)
  loss_fn = lambda params, batch: scale * problem.loss_fn(params, batch)
  whole = jax.jit(lambda batch: update(KL, jaxbo.per_example_grad(loss_fn)(PARAMS, batch)))
  assert np.any(whole(BATCH)[0]["w"])
  repaired = jaxbo.per_example_grad(loss_fn, repair=True)
  with pytest.raises(ValueError, match=r"for each row of a batch of 1, .* got shape \(24,\)"):
    jax.jit(lambda batch: update(KL, repaired(PARAMS, batch)))(BATCH)


def test_wide_losses_leave_the_types_of_the_state(x64):
  """float64 losses of float32 parameters: the state is as wide as the parameters."""
  state = jaxbo.reweight(KL).init(PARAMS)
  wide = lambda params, batch: problem.loss_fn(params, batch).astype(jnp.float64)
  _, after = update(KL, jaxbo.per_example_grad(wide)(PARAMS, BATCH))
  chex.assert_trees_all_equal_dtypes(after, state)


def test_low_precision_parameters_and_losses():
  low = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
  grads = jaxbo.per_example_grad(problem.loss_fn)(low(PARAMS), low(BATCH))
  assert grads.losses.dtype == jnp.bfloat16
  tx = jaxbo.reweight(KL)
  gradient, state = tx.update(grads, tx.init(low(PARAMS)))
  assert gradient["w"].dtype == jnp.bfloat16
  assert state.info.surrogate.dtype == jnp.float32
  expected = lazy_kl(BATCH, ALL)[0][0]
  np.testing.assert_allclose(gradient["w"].astype(jnp.float32), expected["w"], rtol=0.15)


def test_microbatches_are_summed_in_single_precision():
  """In bfloat16 a sum of 1/1024 each would stop growing at 1/4."""
  grads = jaxbo.per_example_grad(lambda params, batch: params * batch, microbatch_size=1)
  ones, one = jnp.ones(1024, jnp.bfloat16), jnp.ones((), jnp.bfloat16)
  gradient = jax.jit(lambda batch: update(jaxbo.dro.uniform(), grads(one, batch))[0])(ones)
  assert gradient.dtype == jnp.bfloat16
  assert gradient == 1


class TestErrors:
  def test_losses_must_be_a_vector_of_floats(self):
    for loss_fn, error, match in (
      (lambda p, b: jnp.mean(b["y"]), ValueError, r"one-dimensional.*got shape \(\)"),
      (lambda p, b: jnp.ones((2, 3)), ValueError, r"one-dimensional.*got shape \(2, 3\)"),
      (lambda p, b: jnp.ones(3, jnp.int32), TypeError, "must be real floats, got dtype int32"),
      (lambda p, b: jnp.ones(0), ValueError, "at least one example"),
      (
        lambda p, b: (b["y"], b["y"]),
        TypeError,
        r"got a tuple; for \(losses, aux\) set has_aux=True",
      ),
    ):
      with pytest.raises(error, match=match):
        jaxbo.per_example_grad(loss_fn)(PARAMS, BATCH)
    with pytest.raises(ValueError, match=r"losses must be one-dimensional.*got shape \(1, 2\)"):
      KL.weigh(jnp.ones((1, 2)), KL.init())

  def test_lists_will_do(self, as_users_run):
    weighting = jaxbo.dro.group(2, 0.1)
    losses, groups = [1.0, 2.0], [0, 1]
    for given in (losses, groups), (jnp.array(losses), jnp.array(groups)):
      weights = weighting.weigh(given[0], weighting.init(), groups=given[1])[0]
      np.testing.assert_allclose(weights, [0.475021, 0.524979], rtol=1e-5)

  def test_what_per_example_grad_is_given(self, as_users_run):
    with pytest.raises(TypeError, match=r"loss_fn must be a function loss_fn\(params, batch\)"):
      jaxbo.per_example_grad(lambda params: params)
    with pytest.raises(ValueError, match="microbatch_size must be at least 1, got 0"):
      jaxbo.per_example_grad(problem.loss_fn, microbatch_size=0)
    with pytest.raises(ValueError, match=r"microbatch_size must divide .* 24, got 7"):
      jaxbo.per_example_grad(problem.loss_fn, microbatch_size=7)(PARAMS, BATCH)
    with pytest.raises(TypeError, match="params must be real floats, got dtype int32"):
      jaxbo.per_example_grad(problem.loss_fn)({"w": jnp.arange(3), "b": 0.0}, BATCH)
    with pytest.raises(TypeError, match=r"must return \(losses, aux\) with has_aux=True"):
      jaxbo.per_example_grad(problem.loss_fn, has_aux=True)(PARAMS, BATCH)

  def test_what_reweight_is_given(self, as_users_run):
    with pytest.raises(TypeError, match=r"weighting must be a jaxbo.dro.Weighting, .* got 0.5"):
      jaxbo.reweight(0.5)
    with pytest.raises(ValueError, match="scale must be one of 'mean', 'sum', got 'max'"):
      jaxbo.reweight(KL, scale="max")
    stored = {"w": jnp.ones((4, 3)), "b": jnp.ones(4)}
    lazy = jaxbo.per_example_grad(problem.loss_fn)(PARAMS, BATCH)
    for grads, options, error, match in (
      (stored, {}, ValueError, "must be given PerExampleGrads, from jaxbo.per_example_grad"),
      (stored, {"losses": jnp.ones(5)}, ValueError, r"grads\['b'\] must be \[5, \*param_shape\]"),
      (PARAMS, {"losses": jnp.ones(3)}, ValueError, r"grads\['b'\] must be .*, got \(\)"),
      (
        {"w": jnp.ones((3, 3)), "b": jnp.ones((3, 3))},
        {"losses": jnp.ones(3)},
        ValueError,
        "grads of one example must have the structure and shapes of params",
      ),
      (lazy, {"losses": jnp.ones(24)}, ValueError, "PerExampleGrads has its own"),
      (
        lazy,
        {"scores": jnp.ones(3)},
        ValueError,
        r"scores must have the shape .*, got \(3,\)",
      ),
      (lazy, {"mask": jnp.ones(24)}, TypeError, "mask must be boolean, got dtype float32"),
      (lazy, {"mask": jnp.ones(3, bool)}, ValueError, r"mask must have the shape .*, got \(3,\)"),
      (lazy, {"prior": jnp.ones((24, 1))}, ValueError, r"prior must have the shape .*\(24, 1\)"),
      (lazy, {"prior": jnp.arange(24.0) - 1}, ValueError, "prior must be non-negative, got -1"),
    ):
      with pytest.raises(error, match=match):
        update(KL, grads, **options)

  def test_groups(self, as_users_run):
    weighting = jaxbo.dro.group(3, 0.1)
    for groups, error, match in (
      (None, TypeError, "groups= must be given"),
      (jnp.array([0, 3]), ValueError, "groups must be from 0 to 2, got 0 to 3"),
      (np.array([-1, 0]), ValueError, "groups must be from 0 to 2, got -1 to 0"),
      (jnp.array([0.0, 1.0]), TypeError, "groups must be integers, got dtype float32"),
      (jnp.array([0]), ValueError, r"groups must have the shape of the losses, \(2,\), got \(1,\)"),
    ):
      with pytest.raises(error, match=match):
        weighting.weigh(jnp.ones(2), weighting.init(), groups=groups)

  @cases(
    ("make", "error", "match"),
    [
      (lambda: jaxbo.dro.kl(0.0), ValueError, "temperature must be positive and finite, got 0.0"),
      (lambda: jaxbo.dro.kl(float("nan")), ValueError, "temperature must be positive .* got nan"),
      (lambda: jaxbo.dro.kl(-1), ValueError, "temperature must be positive and finite, got -1"),
      (lambda: jaxbo.dro.kl("hot"), TypeError, "temperature must be a number, got 'hot'"),
      (lambda: jaxbo.dro.kl(lambda: 1.0), TypeError, r"must be a function temperature\(count\)"),
      (lambda: jaxbo.dro.lin_upper(0.0), ValueError, "temperature must be positive"),
      (lambda: jaxbo.dro.kl_cvar(0.5, -1.0), ValueError, "temperature must be positive"),
      (lambda: jaxbo.dro.kl_cvar(0.0, 1.0), ValueError, r"level must be in \(0, 1\], got 0.0"),
      (lambda: jaxbo.dro.cvar(1.5), ValueError, r"level must be in \(0, 1\], got 1.5"),
      (lambda: jaxbo.dro.cvar(float("nan")), ValueError, r"level must be in \(0, 1\], got nan"),
      (lambda: jaxbo.dro.kl_ball(0.0), ValueError, "radius must be positive and finite, got 0.0"),
      (lambda: jaxbo.dro.chi_square_ball(-1.0), ValueError, "radius must be positive"),
      (lambda: jaxbo.dro.cressie_read_ball(0.1, 1.0), ValueError, r"power must be in \[1.01, 3\]"),
      (lambda: jaxbo.dro.total_variation_ball(0), ValueError, r"radius must be in \(0, 1\]"),
      (
        lambda: jaxbo.dro.chi_square(0.0),
        ValueError,
        "temperature must be positive and finite, got 0.0",
      ),
      (lambda: jaxbo.dro.tilted(float("inf")), ValueError, "tilt must be finite, got inf"),
      (lambda: jaxbo.dro.target_ess(0.0), ValueError, r"fraction must be in \(0, 1\], got 0.0"),
      (lambda: jaxbo.dro.top_k(0), ValueError, "k must be at least 1, got 0"),
      (lambda: jaxbo.dro.mid_rank(0.0, 0), ValueError, r"fraction must be in \(0, 1\], got 0.0"),
      (
        lambda: jaxbo.dro.mid_rank(0.25, 4),
        ValueError,
        "band must be below 1 / fraction = 4, .*got 4",
      ),
      (lambda: jaxbo.dro.mid_rank(1 / 49, 49), ValueError, "band must be below 1 / fraction = 49"),
      (lambda: jaxbo.dro.mid_rank(0.25, -1), ValueError, "band must be .* at least 0, got -1"),
      (
        lambda: jaxbo.dro.doro(jaxbo.dro.cvar(0.5), 1.0),
        ValueError,
        r"fraction must be in \[0, 1\)",
      ),
      (lambda: jaxbo.dro.doro(0.5, 0.1), TypeError, "weighting must be a jaxbo.dro.Weighting"),
      (lambda: jaxbo.dro.group(0, 0.1), ValueError, "num_groups must be at least 1"),
      (lambda: jaxbo.dro.group(2, 0.0), ValueError, "learning_rate must be positive"),
      (lambda: jaxbo.dro.group(2, 0.1, adjustment=1.0), ValueError, "group_sizes must be given"),
      (lambda: jaxbo.dro.group(2, 0.1, group_sizes=[1, 0]), ValueError, "2 positive numbers"),
      (lambda: jaxbo.dro.compositional(KL, 0.0), ValueError, r"rate must be in \(0, 1\], got 0.0"),
      (lambda: jaxbo.dro.compositional(jaxbo.dro.cvar(0.5), 0.1), TypeError, "must be exponential"),
      (
        lambda: jaxbo.dro.compositional(jaxbo.dro.kl(jaxbo.dro.target_ess(0.5)), 0.1),
        TypeError,
        "must be exponential",
      ),
      (
        lambda: jaxbo.dro.quantile_range(0.9, 0.1),
        ValueError,
        r"high must be in \(0.9, 1\], got 0.1",
      ),
      (lambda: jaxbo.dro.running_range(0.0), ValueError, r"rate must be in \(0, 1\], got 0.0"),
      (lambda: jaxbo.dro.min_max(0.0), ValueError, "floor must be positive"),
      (lambda: jaxbo.dro.shaped(KL, jnp.abs, "min_max"), TypeError, "normalizer must be a jaxbo"),
      (lambda: jaxbo.dro.shaped(KL, 1.0), TypeError, r"shape must be a function shape\(scores\)"),
      (lambda: jaxbo.ir_dro(0.1, 0.0), ValueError, "temperature must be positive"),
      (lambda: jaxbo.dro.robust_value(jnp.ones(2), 1.0), TypeError, "weighting must be"),
      (
        lambda: jaxbo.streaming_grad(problem.loss_fn, KL, microbatch_size=0),
        ValueError,
        "microbatch_size must be at least 1, got 0",
      ),
    ],
  )
  def test_ranges(self, make, error, match, as_users_run):
    with pytest.raises(error, match=match):
      make()
