"""Searches: against enumeration of all captions, forced and forbidden tokens, ends, errors."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxbo_models import captioner

from tests.cases import cases
from tests.catalogue import assert_same_on_meshes
from tests.models.captioner_setup import BOS, EOS, FEATURES, batch, draw_params, make

pytestmark = pytest.mark.slow

V, T, BATCH, END = 4, 4, 3, 1
SIZES = {"bos_id": 0, "eos_id": END}
# Log-probabilities of the next token, by position, by the token before, and by the image.
TABLE = np.log(np.random.default_rng(7).dirichlet(np.ones(V), size=(BATCH, T, V)))


def step_fn(tokens, state):
  """A model that remembers its position and its image."""
  image, position = state
  table = jnp.asarray(TABLE, jnp.float32)
  return table[image, jnp.minimum(position, T - 1), tokens], (image, position + 1)


def first_state(size=BATCH):
  return jnp.arange(size), jnp.zeros(size, jnp.int32)


def enumerate_captions(image, length=T, penalty=0.0, forced=None, forbidden=()):
  """All captions, the finished first, by their score: (tokens, log-probability), in Python."""
  finished, cut = [], []
  for n in range(1, length + 1):
    for caption in itertools.product(range(V), repeat=n):
      ends = [token == END for token in caption]
      if any(ends[:-1]) or not (ends[-1] or n == length):
        continue
      wanted = [-1] * length if forced is None else forced
      if any(
        (w >= 0 and u != w) or (w < 0 and u in forbidden)
        for u, w in zip(caption, wanted[:n], strict=True)
      ):
        continue
      before = (0, *caption[:-1])
      total = sum(TABLE[image, t, before[t], u] for t, u in enumerate(caption))
      score = total / ((5 + n) / 6) ** penalty
      full = caption + (END,) * (length - n)
      (finished if ends[-1] else cut).append((score, full, total))
  best_first = lambda found: sorted(found, key=lambda item: -item[0])
  return [item[1:] for item in best_first(finished) + best_first(cut)]


@functools.cache
def compiled(beam_size, penalty=0.0, max_length=T):
  def run(forced, forbidden):
    return captioner.beam_search(
      step_fn,
      first_state(),
      batch_size=BATCH,
      beam_size=beam_size,
      max_length=max_length,
      length_penalty=penalty,
      forced=forced,
      forbidden=forbidden,
      **SIZES,
    )

  return jax.jit(run)


FREE, NONE = np.full((BATCH, T), -1, np.int32), np.zeros(V, bool)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize(
  "forced, forbidden",
  [(None, ()), ((-1, 3, -1, -1), ()), (None, (2,)), ((2, -1, -1, 1), (2, 3))],
)
def test_a_wide_beam_finds_what_enumeration_finds(penalty, forced, forbidden):
  rows = FREE if forced is None else np.tile(np.array(forced, np.int32)[None], (BATCH, 1))
  mask = np.isin(np.arange(V), forbidden)
  tokens, sums = jax.device_get(compiled(V**T, penalty)(rows, mask))
  assert tokens.shape == (BATCH, V**T, T)
  for image in range(BATCH):
    expected = enumerate_captions(image, penalty=penalty, forced=forced, forbidden=forbidden)
    n = len(expected)
    np.testing.assert_array_equal(tokens[image, :n], [caption for caption, _ in expected])
    np.testing.assert_allclose(sums[image, :n], [total for _, total in expected], rtol=1e-5)
    np.testing.assert_array_equal(sums[image, n:], -np.inf)
  if forced is None and not forbidden:
    np.testing.assert_allclose(np.exp(sums).sum(1), 1, rtol=1e-5)


def reference_beam(image, beam_size, penalty=0.0, length=T):
  """The algorithm in Python, without an early end."""
  live, finished = [((), 0.0)], []
  for t in range(length):
    options = [
      ((*caption, u), total + TABLE[image, t, (0, *caption)[-1], u])
      for caption, total in live
      for u in range(V)
    ]
    options = sorted(options, key=lambda item: -item[1])[: 2 * beam_size]
    score = lambda item: item[1] / ((5 + len(item[0])) / 6) ** penalty
    finished = sorted(
      finished + [item for item in options if item[0][-1] == END], key=lambda item: -score(item)
    )[:beam_size]
    live = [item for item in options if item[0][-1] != END][:beam_size]
  found = (finished + live)[:beam_size]
  return [(caption + (END,) * (length - len(caption)), total) for caption, total in found]


@pytest.mark.parametrize("beam_size, penalty", [(1, 0.0), (2, 0.0), (3, 0.6), (2, 2.0)])
def test_a_narrow_beam_is_the_algorithm_written_in_python(beam_size, penalty):
  tokens, sums = jax.device_get(compiled(beam_size, penalty)(FREE, NONE))
  for image in range(BATCH):
    expected = reference_beam(image, beam_size, penalty)
    np.testing.assert_array_equal(tokens[image], [caption for caption, _ in expected])
    np.testing.assert_allclose(sums[image], [total for _, total in expected], rtol=1e-5)


def test_the_search_ends_as_soon_as_nothing_can_overtake():
  """Counted by a step that counts itself; the captions are those of the whole search."""
  end = math.log(0.9)
  table = jnp.log(jnp.array([0.04, 0.9, 0.03, 0.03]))
  counting = lambda tokens, state: (
    jnp.broadcast_to(table, (*tokens.shape, V)) + 0 * state[..., None],
    state + 1,
  )
  calls = []

  def noted(tokens, state):
    jax.debug.callback(lambda _: calls.append(1), state.sum())
    return counting(tokens, state)

  options = {"batch_size": 2, "beam_size": 2, "max_length": 50, **SIZES}
  tokens, sums = jax.jit(lambda state: captioner.beam_search(noted, state, **options))(np.zeros(2))
  jax.effects_barrier()
  # After the second step two captions have ended, with 0.9 and 0.04 * 0.9, and 0.04 ** 2 is open.
  assert len(calls) == 2
  np.testing.assert_array_equal(tokens[:, :, :2], [[[1, 1], [0, 1]]] * 2)
  np.testing.assert_array_equal(tokens[:, :, 2:], END)
  np.testing.assert_allclose(sums, [[end, math.log(0.04) + end]] * 2, rtol=1e-5)


def test_without_an_end_live_captions_are_returned():
  tokens, sums = jax.device_get(compiled(2)(FREE, np.arange(V) == END))
  assert (tokens != END).all()
  for image in range(BATCH):
    best = enumerate_captions(image, forbidden=(END,))[0]
    assert sums[image, 0] <= best[1] + 1e-5
    before = np.concatenate([[0], tokens[image, 0, :-1]])
    total = sum(TABLE[image, t, before[t], u] for t, u in enumerate(tokens[image, 0]))
    np.testing.assert_allclose(sums[image, 0], total, rtol=1e-5)


def test_one_compilation_serves_all_values():
  traces = []

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(forced, forbidden):
    traces.append(1)
    return captioner.beam_search(
      step_fn,
      first_state(),
      batch_size=BATCH,
      beam_size=2,
      max_length=3,
      forced=forced,
      forbidden=forbidden,
      **SIZES,
    )[1]

  first = run(FREE[:, :3], NONE)
  other = run(np.where(np.arange(3) == 0, 2, FREE[:, :3]), np.arange(V) == 3)
  assert len(traces) == 1
  assert np.abs(first - other).max() > 1e-3


def test_greedy_takes_the_most_probable_token_and_stops_at_the_end():
  run = jax.jit(
    lambda forced, forbidden: captioner.greedy(
      step_fn,
      first_state(),
      batch_size=BATCH,
      max_length=T,
      forced=forced,
      forbidden=forbidden,
      **SIZES,
    )
  )
  for forced, forbidden in (
    ((-1,) * 4, ()),
    ((-1, 2, -1, -1), ()),
    ((-1,) * 4, (1,)),
    ((3, -1, 3, -1), (3,)),
    ((-1, 1, -1, -1), ()),
  ):
    tokens, sums = run(
      np.tile(np.array(forced)[None], (BATCH, 1)), np.isin(np.arange(V), forbidden)
    )
    for image in range(BATCH):
      caption, total = [], 0.0
      for t in range(T):
        row = TABLE[image, t, [0, *caption][-1]].copy()
        allowed = [forced[t]] if forced[t] >= 0 else [u for u in range(V) if u not in forbidden]
        caption.append(max(allowed, key=lambda u: row[u]))
        total += row[caption[-1]]
        if caption[-1] == END:
          break
      np.testing.assert_array_equal(tokens[image], caption + [END] * (T - len(caption)))
      np.testing.assert_allclose(sums[image], total, rtol=1e-5)


@functools.cache
def sampler():
  def run(key, temperature, forbidden, forced):
    return captioner.sample(
      step_fn,
      first_state(),
      key,
      batch_size=BATCH,
      num_samples=4000,
      max_length=T,
      temperature=temperature,
      forbidden=forbidden,
      forced=forced,
      **SIZES,
    )

  return jax.jit(run)


def test_samples_have_the_frequencies_of_the_model_and_its_log_probabilities():
  tokens, sums = sampler()(jax.random.key(0), 1.0, NONE, FREE)
  assert tokens.shape == (BATCH, 4000, T)
  for image in range(BATCH):
    drawn = [tuple(row) for row in np.asarray(tokens[image]).tolist()]
    probability = {caption: math.exp(total) for caption, total in enumerate_captions(image)}
    assert set(drawn) <= set(probability)
    np.testing.assert_allclose(
      sums[image], [math.log(probability[caption]) for caption in drawn], rtol=1e-4
    )
    # Pearson's statistic over captions expected at least 5 times: mean k, variance 2 k.
    counts = {c: drawn.count(c) for c, p in probability.items() if 4000 * p > 5}
    statistic = sum(
      (n - 4000 * probability[c]) ** 2 / (4000 * probability[c]) for c, n in counts.items()
    )
    assert abs(statistic - len(counts)) < 4 * math.sqrt(2 * len(counts))


def test_temperature_and_forbidden_tokens_change_what_is_drawn():
  first = lambda tokens: np.asarray(tokens[:, :, 0])
  tokens, sums = sampler()(jax.random.key(1), 0.5, np.arange(V) == 2, FREE)
  for image in range(BATCH):
    power = np.exp(2 * TABLE[image, 0, 0]) * (np.arange(V) != 2)
    p = power / power.sum()
    share = np.bincount(first(tokens)[image], minlength=V) / 4000
    assert (np.abs(share - p) <= 4 * np.sqrt(p * (1 - p) / 4000)).all()
  cold, _ = sampler()(jax.random.key(1), 1e-4, NONE, FREE)
  np.testing.assert_array_equal(first(cold), TABLE[:, 0, 0].argmax(-1)[:, None].repeat(4000, 1))
  forced, sums = sampler()(jax.random.key(1), 1.0, NONE, np.where(np.arange(T) == 0, 3, FREE))
  assert (first(forced) == 3).all()
  assert (np.asarray(sums) <= TABLE[:, 0, 0, 3][:, None] + 1e-5).all()
  np.testing.assert_array_equal(
    sampler()(jax.random.key(1), 1.0, NONE, FREE)[0],
    sampler()(jax.random.key(1), 1.0, NONE, FREE)[0],
  )


@pytest.mark.parametrize("flags", [{}, {"guide": "static", "init_state": "pooled"}], ids=str)
def test_the_captioners_steps_are_its_scan(flags):
  """Also where beams share an image whose cells are masked."""
  model = make(**flags)
  params = draw_params(model)
  cell_mask = jnp.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]], bool)

  @jax.jit
  def run(features):
    captions = captioner.caption_images(
      model,
      params,
      features,
      bos_id=BOS,
      eos_id=EOS,
      beam_size=4,
      max_length=5,
      cell_mask=cell_mask,
    )
    tokens = captions.tokens.reshape(12, 5)
    read = jnp.concatenate([jnp.full((12, 1), BOS), tokens[:, :-1]], axis=1)
    repeat = lambda x: jnp.repeat(x, 4, axis=0)
    output = model.apply({"params": params}, repeat(features), read, cell_mask=repeat(cell_mask))
    return captions, output, jax.nn.log_softmax(output.logits)

  captions, output, log_probabilities = run(batch()["features"])
  tokens = np.asarray(captions.tokens).reshape(12, 5)
  sums = np.take_along_axis(np.asarray(log_probabilities), tokens[:, :, None], 2)[:, :, 0]
  ended = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) > 0
  np.testing.assert_allclose(
    captions.log_probabilities.reshape(-1), np.where(ended, 0, sums).sum(1), rtol=1e-4
  )
  np.testing.assert_allclose(captions.attention, output.attention[::4], rtol=1e-4, atol=1e-5)
  assert (np.diff(captions.log_probabilities, axis=1) <= 0).all()


@cases(
  "changes, message",
  [
    ({"beam_size": 0}, "beam_size must be at least 1, got 0"),
    ({"beam_size": 5, "max_length": 1}, r"vocab_size \*\* max_length = 4, got 5"),
    ({"max_length": 0}, "max_length must be at least 1, got 0"),
    ({"length_penalty": -0.1}, "length_penalty must be non-negative, got -0.1"),
    ({"bos_id": 4}, r"bos_id must be in \[0, vocab_size = 4\), got 4"),
    ({"eos_id": -1}, r"eos_id must be in \[0, vocab_size = 4\), got -1"),
    ({"batch_size": 2}, r"init_state must have leaves \[batch_size = 2, ...\], got .* \(3,\)"),
    ({"forced": -jnp.ones((3, 3), int)}, r"integers .* = \(3, 4\), got int32 .*\(3, 3\)"),
    ({"forced": -jnp.ones((3, 4))}, "forced must be integers .*, got float32"),
    ({"forbidden": jnp.zeros(3, bool)}, r"forbidden must be bool \[vocab_size = 4\], got bool"),
    ({"forbidden": jnp.zeros(4)}, r"forbidden must be bool .*, got float32"),
    ({"step_fn": lambda tokens, state: (tokens, state)}, r"must return .* \(3, 2\).* got \(3, 2\)"),
  ],
)
def test_searches_that_cannot_run_are_refused(changes, message):
  options = {"batch_size": BATCH, "beam_size": 2, "max_length": T, **SIZES} | changes
  function = options.pop("step_fn", step_fn)
  with pytest.raises(ValueError, match=message):
    captioner.beam_search(function, first_state(), **options)


@cases(
  "changes, message",
  [
    ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
    ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
  ],
)
def test_samples_that_cannot_be_drawn_are_refused(changes, message):
  options = {"batch_size": BATCH, "max_length": T, **SIZES} | changes
  with pytest.raises(ValueError, match=message):
    captioner.sample(step_fn, first_state(), jax.random.key(0), **options)


@cases("beam_size", [0, 12])
def test_a_beam_wider_than_the_vocabulary_is_refused(beam_size):
  model = make()
  message = rf"beam_size must be in \[1, vocab_size = 11\], got {beam_size}"
  with pytest.raises(ValueError, match=message):
    captioner.caption_images(
      model, {}, jnp.asarray(FEATURES), bos_id=BOS, eos_id=EOS, beam_size=beam_size
    )


def test_images_divided_on_a_mesh_get_the_captions_of_one_device():
  model = make()

  def decode(params, features):
    step_fn, state = captioner.make_step(model, params, features)
    options = {"max_length": 4, "bos_id": BOS, "eos_id": EOS}
    sizes = {"batch_size": len(features), **options}
    return (
      captioner.greedy(step_fn, state, **sizes),
      captioner.sample(step_fn, state, jax.random.key(0), num_samples=2, **sizes),
      captioner.caption_images(model, params, features, beam_size=3, **options),
    )

  features = jnp.resize(jnp.asarray(FEATURES, jnp.float32), (8, *FEATURES.shape[1:]))
  specs = PartitionSpec(), PartitionSpec("d")
  assert_same_on_meshes(decode, (draw_params(model), features), specs)
