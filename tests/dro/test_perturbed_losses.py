"""Wasserstein and Sinkhorn losses against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from jaxbo.dro import sinkhorn_loss, wasserstein_loss

MOVES = {"x": True, "y": False}
PARAMS = jnp.array([0.8, -0.5, 0.3])
BATCH = {
  "x": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32),
  "y": jnp.array([1.0, -1.0, 0.5, 2.0]),
}


def squares(params, batch):
  return (batch["x"] @ params - batch["y"]) ** 2


def linear(params, batch):
  return batch["x"] @ params


def closed_form(params, batch, penalty):
  """The largest ``squares - penalty |x' - x|^2``, where the penalty is above ``|params|^2``."""
  return penalty * squares(params, batch) / (penalty - jnp.sum(params**2))


def test_losses_and_gradients_are_those_of_the_closed_form():
  def ours(params, penalty):
    losses = wasserstein_loss(squares, penalty=penalty, num_steps=80, moves=MOVES)(params, BATCH)
    return jnp.mean(losses), losses

  def exact(params, penalty):
    losses = closed_form(params, BATCH, penalty)
    return jnp.mean(losses), losses

  gradients = [jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)) for loss in (ours, exact)]
  for penalty in (1.5, 5.0):
    (found, losses), (expected, right) = (gradient(PARAMS, penalty) for gradient in gradients)
    np.testing.assert_allclose(losses, right, rtol=2e-5)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)  # Minus the squared distance.


def test_an_example_moves_along_the_slope_of_its_own_loss_alone():
  robust = wasserstein_loss(linear, penalty=0.25, num_steps=1, moves=MOVES)
  moved = robust.perturb(PARAMS, BATCH)
  np.testing.assert_allclose(moved["x"] - BATCH["x"], 2 * np.tile(PARAMS, (4, 1)), rtol=1e-5)
  np.testing.assert_array_equal(moved["y"], BATCH["y"])
  expected = linear(PARAMS, BATCH) + jnp.sum(PARAMS**2)
  np.testing.assert_allclose(robust(PARAMS, BATCH), expected, rtol=1e-5)
  # By default labels move too, if they are floats.
  both = wasserstein_loss(squares, penalty=4.0, num_steps=1).perturb(PARAMS, BATCH)
  residual = BATCH["x"] @ PARAMS - BATCH["y"]
  np.testing.assert_allclose(both["y"] - BATCH["y"], -2 * residual / 8, rtol=1e-5)


def test_below_half_of_the_curvature_the_loss_is_not_finite_and_does_not_count():
  robust = wasserstein_loss(squares, penalty=0.1, num_steps=1000, moves=MOVES)
  tx = jaxbo.reweight(jaxbo.dro.kl(1.0))
  grads = jaxbo.per_example_grad(robust)(PARAMS, BATCH)
  _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
  assert state.info.num_excluded == 4


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_it_composes_with_a_weighting_and_with_the_mask_of_the_loss(microbatch_size):
  class Masked:
    def __call__(self, params, batch):
      return squares(params, batch)

    def example_mask(self, batch):
      return batch["y"] > 0

  robust = wasserstein_loss(Masked(), penalty=2.0, num_steps=60, moves=MOVES)
  tx = optax.chain(jaxbo.reweight(jaxbo.dro.kl(0.7)), optax.sgd(1.0))
  grads = jaxbo.per_example_grad(robust, microbatch_size=microbatch_size)(PARAMS, BATCH)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)

  def value(params):
    losses, mask = closed_form(params, BATCH, 2.0), BATCH["y"] > 0
    return jaxbo.dro.robust_value(losses, jaxbo.dro.kl(0.7), mask=mask)

  np.testing.assert_allclose(updates, -jax.grad(value)(PARAMS), rtol=1e-4)


def test_narrow_floats_move_in_single_precision():
  batch = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BATCH)
  robust = wasserstein_loss(linear, penalty=500.0, num_steps=1, moves=MOVES)
  moved = robust.perturb(PARAMS, batch)["x"]
  assert moved.dtype == jnp.float32
  np.testing.assert_allclose(moved - batch["x"], np.tile(PARAMS / 1000, (4, 1)), atol=2e-7)


def test_the_sinkhorn_loss_of_a_linear_function_is_its_closed_form():
  temperature, scale, n = 0.6, 0.5, 40_000

  @jax.jit
  def losses(params, key):
    options = {"temperature": temperature, "scale": scale, "num_samples": n, "key": key}
    return sinkhorn_loss(linear, **options, moves=MOVES)(params, BATCH)

  spread = scale**2 * jnp.sum(PARAMS**2)  # The variance of the loss over the noise.
  expected = linear(PARAMS, BATCH) + spread / (2 * temperature)
  error = temperature * np.sqrt(np.expm1(spread / temperature**2) / n)
  found = losses(PARAMS, 0)
  assert np.all(np.abs(found - expected) < 4 * error)
  assert len(np.unique(np.round(found - expected, 7))) == 4  # Each has noise of its own.
  assert not np.array_equal(losses(PARAMS, 1), found)
  gradient = jax.grad(lambda params: jnp.mean(losses(params, 1)))(PARAMS)
  exact = jnp.mean(BATCH["x"], axis=0) + scale**2 * PARAMS / temperature
  np.testing.assert_allclose(gradient, exact, atol=0.02)


def test_the_temperature_goes_from_the_mean_of_the_draws_to_the_largest():
  options = {"scale": 0.3, "num_samples": 50, "key": 3, "moves": MOVES}
  at = lambda temperature: sinkhorn_loss(squares, temperature=temperature, **options)(PARAMS, BATCH)
  noise = jax.vmap(lambda k: jax.random.normal(jax.random.split(k, 1)[0], (4, 3)))(
    jax.random.split(jax.random.key(3), 50)
  )
  draws = jax.vmap(lambda n: squares(PARAMS, BATCH | {"x": BATCH["x"] + 0.3 * n}))(noise)
  np.testing.assert_allclose(at(1e5), draws.mean(0), rtol=1e-2)
  np.testing.assert_allclose(at(1e-5), draws.max(0), rtol=1e-4)


def test_the_estimate_is_too_low_by_what_the_docstring_says():
  options = {"temperature": 1.0, "scale": 1.0, "num_samples": 8, "key": 0}
  found = sinkhorn_loss(lambda w, x: x[:, 0] * w, **options)(0.5, jnp.zeros((200_000, 1)))
  np.testing.assert_allclose(np.mean(found) - 0.125, -np.expm1(0.25) / 16, rtol=0.1)


def test_an_example_without_a_loss_does_not_count_in_a_sinkhorn_loss():
  class Masked:
    def __call__(self, params, batch):
      return squares(params, batch)

    def example_mask(self, batch):
      return batch["y"] > 0

  options = {"temperature": 1.0, "scale": 1e-3, "num_samples": 1, "key": 0, "moves": MOVES}
  grads = jaxbo.per_example_grad(sinkhorn_loss(Masked(), **options))(PARAMS, BATCH)
  np.testing.assert_array_equal(grads.mask, BATCH["y"] > 0)


@pytest.mark.parametrize(
  "make",
  [
    lambda moves: wasserstein_loss(squares, penalty=1.0, num_steps=1, moves=moves),
    lambda moves: sinkhorn_loss(
      squares, temperature=1.0, scale=1.0, num_samples=1, key=0, moves=moves
    ),
  ],
)
def test_what_moves_must_be_floats_of_the_batch(make):
  with pytest.raises(ValueError, match="moves must be a prefix of the batch"):
    make({"z": True})(PARAMS, BATCH)
  with pytest.raises(ValueError, match="moves must name a leaf of floats of the batch, got False"):
    make(False)(PARAMS, BATCH)


def test_bad_arguments(as_users_run):
  pair = lambda params, batch: (squares(params, batch), None)
  with pytest.raises(TypeError, match="loss_fn must return losses alone, got a tuple"):
    wasserstein_loss(pair, penalty=1.0, num_steps=1)(PARAMS, BATCH)
  with pytest.raises(ValueError, match="penalty must be positive and finite, got 0"):
    wasserstein_loss(squares, penalty=0.0, num_steps=1)
  with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
    wasserstein_loss(squares, penalty=1.0, num_steps=0)
  for name in ("temperature", "scale"):
    options = {"temperature": 1.0, "scale": 1.0, "num_samples": 1, "key": 0, name: -1.0}
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got -1.0"):
      sinkhorn_loss(squares, **options)
