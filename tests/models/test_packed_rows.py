"""Packed rows and losses on responses: what a document's tokens see, and which targets count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import transformer

import jaxbo
from tests.cases import cases
from tests.models.random_params import random_params

pytestmark = pytest.mark.slow  # All together, not each.

SMALL = {"vocab_size": 50, "max_length": 16, "num_layers": 2, "width": 32, "num_heads": 4}
FAMILIES = {
  "gpt2": transformer.gpt2(**SMALL),
  "opt": transformer.opt(**SMALL, ffn_width=48),
  "pythia": transformer.pythia(**SMALL, rotary_fraction=0.5),
  "llama": transformer.llama(**SMALL, num_kv_heads=2, ffn_width=48),
  "mistral": transformer.mistral(**SMALL, ffn_width=48, window=4, full_attention_layers=(1,)),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.integers(50, size=(2, 5)), RNG.integers(50, size=(2, 7))
PACKED = np.concatenate([FIRST, SECOND], axis=1).astype(np.int32)
SEGMENTS = np.where(np.arange(12) < 5, 3, 8)[None].repeat(2, axis=0)


@functools.cache
def setup(family):
  """A model, parameters none of which is special, and a compiled forward pass of 12 tokens."""
  model = transformer.Transformer(FAMILIES[family])
  params = random_params(model)
  run = jax.jit(
    lambda tokens, mask, segment_ids, positions: model.apply(
      {"params": params}, tokens, mask, segment_ids=segment_ids, positions=positions
    )
  )
  return model, params, run


@every_family
def test_a_packed_document_has_the_logits_that_it_has_alone(family):
  _, _, run = setup(family)
  everything, own = (
    np.ones((2, 12), bool),
    np.where(np.arange(12) < 5, np.arange(12), np.arange(12) - 5),
  )
  counted = np.broadcast_to(own, (2, 12)).astype(np.int32)
  packed = np.asarray(run(PACKED, everything, SEGMENTS, counted))
  for document, place in ((FIRST, slice(0, 5)), (SECOND, slice(5, 12))):
    alone = np.zeros((2, 12), np.int32)
    length = document.shape[1]
    alone[:, :length] = document
    mask = np.broadcast_to(np.arange(12) < length, (2, 12))
    order = np.broadcast_to(np.arange(12), (2, 12)).astype(np.int32)
    expected = np.asarray(run(alone, mask, np.zeros((2, 12), int), order))[:, :length]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(packed[:, place], expected, rtol=1e-5, atol=2e-5)


def test_positions_are_counted_in_each_segment():
  """Of the real tokens, in whatever places the document's tokens are."""
  model, params, run = setup("opt")
  counted = jax.jit(
    lambda mask, segment_ids: model.apply(
      {"params": params}, jnp.asarray(PACKED), mask, segment_ids=segment_ids
    )
  )
  segments = np.array([[7, 7, 7, 2, 2, 2, 2, 2, 9, 9, 9, 9], [1, 1, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2]])
  mask = np.ones((2, 12), bool)
  mask[0, [0, 4, 11]] = False
  positions = np.array([[0, 0, 1, 0, 0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 2, 3, 4, 5, 6]])
  np.testing.assert_allclose(
    counted(mask, segments)[mask], run(PACKED, mask, segments, positions)[mask], atol=1e-6
  )


def test_positions_outside_the_table_make_logits_nan():
  _, _, run = setup("opt")
  everything, one = np.ones((2, 12), bool), np.zeros((2, 12), int)
  for unknown in (16, -1):  # Row 1 of OPT's table is there, but not a position.
    positions = np.tile(np.arange(12), (2, 1))
    positions[0, 3] = unknown
    logits = np.asarray(run(PACKED, everything, one, positions))
    np.testing.assert_array_equal(np.isnan(logits).any((1, 2)), [True, False])


def log_probabilities(logits):
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_loss_on_a_response_is_that_of_its_tokens_given_all_before():
  model, params, run = setup("opt")
  response = np.arange(12) >= np.array([[4], [9]])
  everything, order = np.ones((2, 12), bool), np.tile(np.arange(12), (2, 1))
  logits = run(PACKED, everything, np.zeros((2, 12), int), order)
  found = log_probabilities(logits)
  expected = [
    -np.mean([found[i, t - 1, PACKED[i, t]] for t in range(12) if response[i, t]]) for i in (0, 1)
  ]
  loss_fn = jax.jit(transformer.sequence_losses(model))
  tokens = jnp.asarray(PACKED)
  masked = loss_fn(params, {"tokens": tokens, "loss_mask": jnp.asarray(response)})
  np.testing.assert_allclose(masked, expected, rtol=1e-5)
  labels = jnp.where(response, tokens, -100)
  np.testing.assert_allclose(
    loss_fn(params, {"tokens": tokens, "labels": labels}), expected, rtol=1e-5
  )
  losses, weights = transformer.token_losses(logits, tokens, loss_mask=jnp.asarray(response))
  np.testing.assert_array_equal(weights, response[:, 1:])
  np.testing.assert_allclose(losses.sum(1) / weights.sum(1), expected, rtol=1e-5)
  # Labels are targets: they need not be the tokens.
  others = jnp.asarray((PACKED + 1) % 50)
  losses, _ = transformer.token_losses(logits, tokens, labels=others)
  right = -np.take_along_axis(found[:, :-1], np.asarray(others)[:, 1:, None], axis=-1)[..., 0]
  np.testing.assert_allclose(losses, right, rtol=1e-5)
  for unknown in (-1, 50):
    losses, _ = transformer.token_losses(logits, tokens, labels=others.at[1, 3].set(unknown))
    np.testing.assert_array_equal(np.isnan(losses), np.arange(22).reshape(2, 11) == 13)


def test_no_target_crosses_documents_and_masks_narrow_each_other():
  logits, tokens = jnp.zeros((2, 12, 50)), jnp.asarray(PACKED)
  mask = jnp.asarray(np.arange(12) < np.array([[12], [10]]))
  chosen = jnp.asarray(np.arange(12) != 2)[None].repeat(2, axis=0)
  _, weights = transformer.token_losses(
    logits, tokens, mask, loss_mask=chosen, segment_ids=jnp.asarray(SEGMENTS)
  )
  expected = np.ones((2, 12))
  expected[:, [0, 2, 5]] = 0
  expected[1, 10:] = 0
  np.testing.assert_array_equal(weights, expected[:, 1:])


def test_a_row_without_a_chosen_target_does_not_count_where_losses_are_reweighted():
  model, params, _ = setup("opt")
  loss_fn = transformer.sequence_losses(model)
  tokens = jnp.asarray(np.concatenate([PACKED, PACKED[:1]]))
  labels = tokens.at[2].set(-100).at[0, 6:].set(-100)
  only_first = jnp.arange(12)[None] == 0  # The first token is nobody's target.
  batch = {"tokens": tokens, "labels": labels}
  assert loss_fn.example_mask(batch).tolist() == [True, True, False]
  masked = {"tokens": tokens, "loss_mask": (labels != -100) | only_first}
  assert loss_fn.example_mask(masked).tolist() == [True, True, False]
  tx = jaxbo.reweight(jaxbo.dro.kl(0.5))

  @jax.jit
  def robust(batch):
    grads = jaxbo.per_example_grad(loss_fn)(params, batch)
    updates, state = tx.update(grads, tx.init(params), params)
    return updates, state.info.num_valid

  updates, num_valid = robust(batch)
  expected, right = robust({"tokens": tokens[:2], "labels": labels[:2]})
  assert num_valid == right == 2
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, expected
  )


ONES = jnp.ones((2, 12), jnp.int32)


@cases(
  "batch, message",
  [
    ({"loss_mask": ONES}, r"loss_mask must be bool of the shape of tokens, \(2, 12\), got int32"),
    ({"loss_mask": ONES == 1, "labels": ONES}, "loss_mask and labels must not both be given"),
    ({"labels": ONES[:, 1:]}, r"labels must be integers .* \(2, 12\), got int32 .*\(2, 11\)"),
    ({"segment_ids": ONES == 1}, r"segment_ids must be integers .* \(2, 12\), got bool"),
    ({"positions": ONES[0]}, r"positions must be integers .* \(2, 12\), got int32 .*\(12,\)"),
    ({"attention_mask": ONES}, "batch must have 'mask' instead of 'attention_mask'"),
  ],
)
def test_what_a_batch_cannot_have_is_refused(batch, message):
  model, params, _ = setup("opt")
  loss_fn = transformer.sequence_losses(model)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(loss_fn, params, {"tokens": jnp.asarray(PACKED)} | batch)
