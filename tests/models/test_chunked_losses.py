"""Losses whose logits exist for some positions at a time, beside those of all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import Conv4, transformer

from tests.models.random_params import random_params

SMALL = {"max_length": 16, "num_layers": 1, "width": 16, "num_heads": 2}
RNG = np.random.default_rng(0)
LENGTH = 13  # Chunks of 5 do not divide it.
CONFIGS = {
  "tied": transformer.gpt2(vocab_size=50, **SMALL),
  "own head": transformer.llama(vocab_size=300, **SMALL),
}


def batch_of(vocab_size, *, unknown):
  """Padding, labels that do not count, and if asked for a label outside the vocabulary."""
  tokens = RNG.integers(vocab_size, size=(3, LENGTH))
  mask = np.ones((3, LENGTH), bool)
  mask[1, 8:] = False
  labels = RNG.integers(vocab_size, size=(3, LENGTH))
  labels[0, 2:5] = -100
  if unknown:
    labels[2, 4] = vocab_size
  return {"tokens": tokens, "mask": mask, "labels": labels}


@functools.cache
def losses_and_gradient(which, chunk_length):
  model = transformer.Transformer(CONFIGS[which])
  loss_fn = transformer.sequence_losses(model, chunk_length=chunk_length)

  @jax.jit
  def run(params, batch, weights):
    losses, pull_back = jax.vjp(lambda params: loss_fn(params, batch), params)
    return losses, pull_back(weights)[0]

  return run, random_params(model)


@pytest.mark.parametrize("which", CONFIGS)
def test_losses_and_gradients_are_those_of_all_logits(which):
  batch = batch_of(CONFIGS[which].vocab_size, unknown=False)
  weights = jnp.array([0.5, 2.0, 1.0])
  (whole, params), (chunked, _) = (losses_and_gradient(which, c) for c in (None, 5))
  (losses, gradient), (expected, expected_gradient) = (
    run(params, batch, weights) for run in (chunked, whole)
  )
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected_gradient))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest),
    gradient,
    expected_gradient,
  )


@pytest.mark.parametrize("which", CONFIGS)
def test_a_label_outside_the_vocabulary_spoils_its_own_sequence_alone(which):
  batch = batch_of(CONFIGS[which].vocab_size, unknown=True)
  run, params = losses_and_gradient(which, 5)
  losses, gradient = run(params, batch, jnp.array([1.0, 1.0, 0.0]))
  assert np.isnan(losses).tolist() == [False, False, True]
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
  _, spoiled = run(params, batch, jnp.ones(3))
  assert np.all(np.isnan(spoiled["token_embedding"][:, 0]))


def test_a_batch_divided_on_explicit_axes_has_the_gradient_of_one_device():
  model = transformer.Transformer(CONFIGS["tied"])
  params = random_params(model)
  tokens = jnp.asarray(RNG.integers(50, size=(8, LENGTH)), jnp.int32)
  losses = transformer.sequence_losses(model, chunk_length=5)
  gradient = jax.jit(jax.grad(lambda params, tokens: jnp.sum(losses(params, {"tokens": tokens}))))
  expected = gradient(params, tokens)
  with jax.set_mesh(jax.make_mesh((8,), ("data",))):
    whole = jax.device_put(params, jax.sharding.PartitionSpec())
    found = gradient(whole, jax.device_put(tokens, jax.sharding.PartitionSpec("data")))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_logits_of_all_positions_are_never_there():
  """Neither in the forward nor in the backward pass; the padded vocabulary of 300 is 384."""
  model = transformer.Transformer(CONFIGS["own head"])
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
  batch = {"tokens": jax.ShapeDtypeStruct((3, LENGTH), jnp.int32)}

  def text(chunk_length):
    loss_fn = transformer.sequence_losses(model, chunk_length=chunk_length)
    gradient = jax.grad(lambda params, batch: jnp.sum(loss_fn(params, batch)))
    return str(jax.make_jaxpr(gradient)(params, batch))

  assert f"f32[3,{LENGTH},300]" in text(None)
  chunked = text(4)
  assert "f32[3,4,384]" in chunked
  assert all(f"f32[3,{LENGTH},{n}]" not in chunked for n in (300, 384))
  assert f"f32[3,{LENGTH - 1},300]" not in chunked


def test_bad_arguments(as_users_run):
  model = transformer.Transformer(CONFIGS["tied"])
  for bad in (0, 2.5, True):
    with pytest.raises(
      ValueError, match=f"chunk_length must be an integer of at least 1, got {bad}"
    ):
      transformer.sequence_losses(model, chunk_length=bad)
  with pytest.raises(TypeError, match="model must be a Transformer with chunk_length, got Conv4"):
    transformer.sequence_losses(Conv4(5), chunk_length=4)
