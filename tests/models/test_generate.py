"""Generation: with a cache as without, greedy and sampled, prompts of unequal lengths, ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import transformer

from tests.cases import cases
from tests.models.random_params import random_params

pytestmark = pytest.mark.slow  # All together, not each.

SMALL = {"vocab_size": 50, "max_length": 16, "num_layers": 2, "width": 32, "num_heads": 4}
FAMILIES = {
  "opt": transformer.opt(**SMALL, ffn_width=48),
  "pythia": transformer.pythia(**SMALL, rotary_fraction=0.5),
  "mistral": transformer.mistral(
    **SMALL, num_kv_heads=2, ffn_width=48, window=4, full_attention_layers=(1,)
  ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
PROMPTS = np.random.default_rng(0).integers(50, size=(3, 6)).astype(np.int32)
MASK = np.ones((3, 6), bool)
MASK[1, :4] = False  # padding on the left
MASK[2, 3:] = False  # and on the right


@functools.cache
def setup(family):
  model = transformer.Transformer(FAMILIES[family])
  params = random_params(model)
  return model, params, jax.jit(lambda tokens, mask: model.apply({"params": params}, tokens, mask))


@functools.cache
def greedy(family):
  """Continuations by the whole forward pass, without a cache: the likeliest tokens and logits."""
  _, _, run = setup(family)
  tokens, mask = np.zeros((3, 16), np.int32), np.zeros((3, 16), bool)
  lengths = MASK.sum(1)
  for row in range(3):
    tokens[row, : lengths[row]] = PROMPTS[row][MASK[row]]
  added = np.zeros((3, 8), np.int32)
  for i in range(8):
    mask[:] = np.arange(16) < (lengths + i)[:, None]
    logits = np.asarray(run(tokens, mask))[np.arange(3), lengths + i - 1]
    added[:, i] = logits.argmax(-1)
    tokens[np.arange(3), lengths + i] = added[:, i]
  return added


def generate(family, **options):
  model, params, _ = setup(family)
  return jax.device_get(
    transformer.generate(
      model, params, jnp.asarray(PROMPTS), jnp.asarray(MASK), num_tokens=8, **options
    )
  )


@every_family
def test_the_likeliest_tokens_are_those_of_the_forward_pass_without_a_cache(family):
  expected = greedy(family)
  assert len(np.unique(expected)) > 3
  found = generate(family)
  np.testing.assert_array_equal(found.tokens, expected)
  assert found.mask.all()


@every_family
def test_logits_with_a_cache_are_those_without(family):
  model, params, run = setup(family)
  tokens = np.zeros((3, 16), np.int32)
  tokens[:] = np.random.default_rng(1).integers(50, size=(3, 16))
  mask = np.arange(16) >= np.array([[0], [2], [3]])
  expected = np.asarray(run(tokens, mask))

  @jax.jit
  def cached(tokens, mask):
    cache = transformer.empty_cache(model.config, 3, 16)
    logits, cache = model.apply({"params": params}, tokens[:, :5], mask[:, :5], cache=cache)

    def step(cache, place):
      positions = jnp.sum(mask[:, :5], axis=1)[:, None] + place - 5
      token = jax.lax.dynamic_slice_in_dim(tokens, place, 1, axis=1)
      logits, cache = model.apply({"params": params}, token, positions=positions, cache=cache)
      return cache, logits

    _, others = jax.lax.scan(step, cache, jnp.arange(5, 16))
    return jnp.concatenate([logits[None], others]).swapaxes(0, 1)

  np.testing.assert_allclose(cached(tokens, mask), expected[:, 4:], rtol=1e-4, atol=2e-5)


def test_a_text_ends_with_the_token_that_ends_it_and_padding_follows():
  expected, text = greedy("opt"), greedy("opt")[0]
  end = text[3]
  found = generate("opt", eos_id=int(end), pad_id=49)
  for row in range(3):
    places = np.flatnonzero(expected[row] == end)
    length = places[0] + 1 if len(places) else 8
    np.testing.assert_array_equal(found.mask[row], np.arange(8) < length)
    np.testing.assert_array_equal(found.tokens[row, :length], expected[row, :length])
    np.testing.assert_array_equal(found.tokens[row, length:], 49)
  assert found.mask[0].sum() <= 4


def test_a_row_without_a_prompt_gets_no_tokens_and_changes_no_other():
  model, params, _ = setup("opt")
  mask = jnp.asarray(MASK).at[1].set(False)
  options = {"num_tokens": 8, "pad_id": 49}
  found = transformer.generate(model, params, jnp.asarray(PROMPTS), mask, **options)
  np.testing.assert_array_equal(found.tokens[1], 49)
  np.testing.assert_array_equal(found.mask.any(1), [True, False, True])
  np.testing.assert_array_equal(found.tokens[0], greedy("opt")[0])


def test_sampled_tokens_have_the_probabilities_of_the_temperature():
  """Those of 4,000 texts of one token, by a chi-square test at four standard errors."""
  model, params, run = setup("opt")
  tokens, mask = np.zeros((3, 16), np.int32), np.tile(np.arange(16) < 6, (3, 1))
  tokens[:, :6] = PROMPTS[0]
  z = np.asarray(run(tokens, mask))[0, 5].astype(float)
  prompts = jnp.asarray(PROMPTS[:1].repeat(4000, axis=0))
  run_all = functools.partial(transformer.generate, model, params, prompts, num_tokens=1, key=4)
  for temperature, top_p, num_kept in ((1.0, 1.0, 50), (2.5, 1.0, 50), (2.0, 0.6, 18)):
    expected = np.exp((z - z.max()) / temperature)
    expected /= expected.sum()
    order = np.argsort(-expected)
    kept = order[np.cumsum(expected[order]) - expected[order] < top_p]
    assert len(kept) == num_kept
    counts = 4000 * expected[kept] / expected[kept].sum()
    tokens = np.asarray(run_all(temperature=temperature, top_p=top_p).tokens)[:, 0]
    found = np.bincount(tokens, minlength=50)[kept]
    assert found.sum() == 4000
    freedom = num_kept - 1
    assert np.sum((found - counts) ** 2 / counts) < freedom + 4 * np.sqrt(2 * freedom)


def test_keys_decide_samples_and_the_program_is_compiled_once():
  one, same, other = (generate("opt", key=key, temperature=3.0).tokens for key in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert (one != other).mean() > 0.5
  assert (one[:, 1:] != one[:, :-1]).mean() > 0.5  # Not the same draw at each step.
  from jaxbo_models.transformer.generate import _generate

  before = _generate._cache_size()
  generate("opt", key=5, temperature=0.5, top_p=0.3, eos_id=7)
  assert _generate._cache_size() == before


@cases(
  "options, message",
  [
    ({"num_tokens": 0}, r"num_tokens must be in \[1, max_length - length = 10\], got 0"),
    ({"num_tokens": 11}, r"num_tokens must be in \[1, max_length - length = 10\], got 11"),
    ({"key": 0, "temperature": 0.0}, r"temperature must be in \(0, inf\], got 0.0"),
    ({"key": 0, "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ({"temperature": 0.5}, "temperature needs a key"),
  ],
)
def test_what_cannot_be_generated_is_refused(options, message):
  model, params, _ = setup("opt")
  with pytest.raises(ValueError, match=message):
    transformer.generate(model, params, jnp.asarray(PROMPTS), **({"num_tokens": 1} | options))
  with pytest.raises(ValueError, match=r"prompts must be .* got \(6,\) and None"):
    transformer.generate(model, params, jnp.asarray(PROMPTS[0]), num_tokens=1)
  with pytest.raises(ValueError, match=r"mask of the same shape, got \(3, 6\) and \(3, 5\)"):
    transformer.generate(
      model, params, jnp.asarray(PROMPTS), jnp.asarray(MASK[:, 1:]), num_tokens=1
    )
