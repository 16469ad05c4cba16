"""Shapes with captions: what is drawn and said, and entropies by enumeration."""

import collections
import functools
import math

import jax
import numpy as np
import pytest

from scripts.captioning import language
from scripts.captioning.scenes import ShapesCaptions

pytestmark = pytest.mark.slow  # All together, not each.

N = 1000
EITHER = ShapesCaptions(order="either")
NOISY = ShapesCaptions(order="either", color_flips=0.2, swaps=0.25, duplicates=0.1, tail=1.0)


@functools.cache
def sample(data, part="train", seed=0, num=N):
  batch = jax.jit(functools.partial(data.sample, num=num, part=part))(jax.random.key(seed))
  return jax.tree.map(np.asarray, batch)


def seen(image, box):
  """The kind of the object in a box of an image, by its brightest channels and nearest mask."""
  top, left, bottom, right = box
  pixels = image[top:bottom, left:right]
  color = (pixels.max(axis=(0, 1)) > 0.4).astype(int)
  name = {(1, 0, 0): 0, (0, 1, 0): 1, (0, 0, 1): 2, (1, 1, 0): 3, (1, 0, 1): 4, (0, 1, 1): 5}
  filled = pixels.max(axis=-1) > 0.4
  shape = {36: 0, 32: 1, 24: 2, 20: 3}[int(filled.sum())]
  return 4 * name[tuple(color)] + shape


def words_of(kind):
  color, shape = divmod(int(kind), 4)
  return f"a {language.COLORS[color]} {language.SHAPES[shape]}"


def described(kinds, cells):
  """A caption written from what stands where."""
  words = words_of(kinds[0])
  for (kind, other), (cell, before) in zip(
    zip(kinds[1:], kinds, strict=False), zip(cells[1:], cells, strict=False), strict=True
  ):
    assert kind != other
    if cell // 4 == before // 4:
      relation = "left of" if before % 4 < cell % 4 else "right of"
    else:
      assert cell % 4 == before % 4
      relation = "above" if before // 4 < cell // 4 else "below"
    words += f" {relation} {words_of(kind)}"
  return words


@pytest.mark.parametrize("data", [EITHER, ShapesCaptions(num_objects=4, order="either")])
def test_captions_say_what_the_pixels_show(data):
  batch = jax.tree.map(lambda leaf: leaf[:200], sample(data))
  num_objects = data.num_objects
  assert batch.images.shape == (200, 32, 32, 3)
  assert batch.images.min() == 0
  assert batch.images.max() <= 1
  assert batch.tokens.shape == (200, 5 * num_objects)
  for i in range(200):
    kinds = [seen(batch.images[i], box) for box in batch.boxes[i]]
    assert kinds == batch.kinds[i].tolist()
    for box, cell in zip(batch.boxes[i], batch.cells[i], strict=True):
      assert [box[0] // 8, (box[2] - 1) // 8, box[1] // 8] == [cell // 4, cell // 4, cell % 4]
    text = described(batch.kinds[i], batch.cells[i])
    assert data.decode(batch.tokens[i]) == text
    valid = {data.decode(tokens) for tokens in batch.valid[i]}
    turned = described(batch.kinds[i][::-1], batch.cells[i][::-1])
    assert valid == {text, turned}
    outside = batch.images[i].copy()
    for top, left, bottom, right in batch.boxes[i]:
      outside[top:bottom, left:right] = 0
    assert outside.max() < 0.35  # Noise alone.


def test_places_colors_and_noise_are_drawn_over_their_whole_range():
  batch = sample(EITHER)
  shift = np.eye(3)[batch.boxes[:, :, :2].reshape(-1, 2) % 8]  # Downwards and to the right.
  error = 4 * math.sqrt(2 / 9 / len(shift))
  assert (abs(shift.mean(axis=0) - 1 / 3) < error).all()
  both = np.einsum("ni,nj->ij", shift[:, 0], shift[:, 1]) / len(shift)
  assert (abs(both - 1 / 9) < error).all()  # One says nothing of the other.
  cells = np.bincount(batch.cells.ravel(), minlength=16) / batch.cells.size
  assert (abs(cells - 1 / 16) < 4 * math.sqrt(1 / 16 / N)).all()

  corners = batch.images[:, 0, [0, -1]]  # Two pixels: shapes are there in few images.
  corners = corners[corners.max(axis=(1, 2)) < 0.35]
  positive = corners[corners > 0]
  assert abs(np.mean(corners > 0) - 0.5) < 4 * math.sqrt(0.25 / corners.size)
  assert abs(np.sqrt(np.mean(positive**2)) / 0.05 - 1) < 4 / math.sqrt(2 * positive.size)
  signs = np.sign(corners).reshape(-1, 6) - 0.5
  assert (abs(signs.T @ signs / len(signs) - np.eye(6) / 4) < 1 / math.sqrt(len(signs))).all()

  bright = np.array(
    [
      [image[top:bottom, left:right].max() for top, left, bottom, right in boxes]
      for image, boxes in zip(batch.images, batch.boxes, strict=True)
    ]
  )  # The greatest of many noisy pixels, clipped: above the brightness by 0.1.
  assert bright.min() < 0.85
  assert np.mean(bright < 0.9) > 0.2
  assert abs(np.corrcoef(bright.T)[0, 1]) < 4 / math.sqrt(N)


def test_tokens_have_a_beginning_an_end_and_padding_behind_it():
  batch = sample(EITHER)
  assert (batch.tokens[:, 0] == language.BOS).all()
  ends = (batch.tokens == language.EOS).argmax(axis=1)
  assert set(ends) == {8, 9}
  np.testing.assert_array_equal(batch.mask, np.arange(10) <= ends[:, None])
  assert len(set(language.VOCABULARY)) == 19


def test_canonical_captions_begin_with_what_is_read_first():
  batch = sample(ShapesCaptions())
  assert (batch.cells[:, 0] < batch.cells[:, 1]).all()
  words = {word for row in batch.tokens for word in row}
  assert not {language.RIGHT, language.BELOW} & words
  assert batch.valid.shape == (N, 1, 10)


def test_a_coin_turns_captions_round():
  turned = np.mean(sample(EITHER).cells[:, 0] > sample(EITHER).cells[:, 1])
  assert abs(turned - 0.5) < 4 * math.sqrt(0.25 / N)


def test_an_example_depends_on_its_key_and_its_number_alone():
  draw = jax.jit(functools.partial(EITHER.sample, num=3))
  few = jax.tree.map(np.asarray, draw(jax.random.key(0)))
  for name, leaf in few._asdict().items():
    np.testing.assert_array_equal(leaf, getattr(sample(EITHER), name)[:3])
  assert (np.asarray(draw(jax.random.key(1)).images) != few.images).any()


def test_held_out_triples_are_a_fifth_with_both_orders_and_both_ways():
  data, scenes = ShapesCaptions(), language.compositions(2)
  of_part = {}
  for part, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
    numbers = np.flatnonzero(data.frequencies(part))
    assert abs(len(numbers) / 1104 - share) < 0.002
    pairs = np.sort(scenes.kinds[numbers], axis=1).tolist()
    triples = [(*p, way) for p, way in zip(pairs, scenes.vertical[numbers], strict=True)]
    assert set(collections.Counter(triples).values()) == {2}  # Both orders of the two objects.
    of_part[part] = set(triples)
  assert len(set.union(*of_part.values())) == sum(map(len, of_part.values())) == 552
  # A pair that is held out in one direction may be trained on in the other.
  assert abs(len({triple[:2] for triple in of_part["test"]}) - 276 * (1 - 0.8**2)) < 15
  drawn = sample(data)
  vertical = (drawn.tokens == language.ABOVE).any(axis=1)
  pairs = np.sort(drawn.kinds, axis=1).tolist()
  assert {(*p, w) for p, w in zip(pairs, vertical, strict=True)} <= of_part["train"]


def test_held_out_pairs_are_never_seen_in_training_but_each_word_is():
  data = ShapesCaptions(split="pair")
  held_out = lambda kinds: (kinds // 4 + kinds % 4) % 4 == 0
  train, test = (language.compositions(2).kinds[data.frequencies(p) > 0] for p in ("train", "test"))
  assert len(train) == 18 * 17 * 2
  assert len(train) + len(test) == 1104
  assert not held_out(train).any()
  np.testing.assert_array_equal(data.frequencies("validation"), data.frequencies("train"))
  assert held_out(test).any(axis=1).all()
  assert len(set(train.ravel() // 4)) == 6
  assert len(set(train.ravel() % 4)) == 4


def test_entropies_of_all_scenes_are_those_of_the_formulas():
  canonical = ShapesCaptions(split="iid").entropies("test")
  assert canonical.given_image == 0
  assert canonical.caption == pytest.approx(math.log(24 * 23 * 2))
  either = ShapesCaptions(split="iid", order="either").entropies("test")
  assert either.given_image == pytest.approx(math.log(2))
  assert either.caption == pytest.approx(math.log(24 * 23 * 4))
  assert either.information == pytest.approx(canonical.information)
  one = ShapesCaptions(num_objects=1, split="iid", order="either").entropies("test")
  assert one.given_image == 0
  assert one.caption == pytest.approx(math.log(24))
  three = ShapesCaptions(num_objects=3, split="iid").entropies("test")
  assert three.caption == pytest.approx(math.log(24 * 23 * 22 * 2))
  flips = ShapesCaptions(split="iid", color_flips=0.1).entropies("test")
  assert flips.given_image == pytest.approx(2 * 0.48603, abs=1e-4)
  one_flip = ShapesCaptions(num_objects=1, color_flips=0.1).entropies("test")
  assert one_flip.given_image == pytest.approx(flips.given_image / 2)
  held_out = np.count_nonzero(ShapesCaptions().frequencies("test"))
  assert ShapesCaptions().entropies("test").caption == pytest.approx(math.log(held_out))
  with pytest.raises(ValueError, match="read-only"):
    ShapesCaptions().frequencies("test")[0] = 1.0  # All who ask get the same array.


def enumerated(frequencies, either_order, flip, swaps):
  """Both entropies of noisy captions, with dictionaries: an independent way to the same numbers."""
  scenes, others = language.compositions(2), len(language.COLORS) - 1

  def own(i):
    captions = collections.Counter()
    for turned, share in ((0, 0.5), (1, 0.5)) if either_order else ((0, 1.0),):
      (c1, s1), (c2, s2) = (divmod(int(kind), 4) for kind in scenes.kinds[i])
      if turned:
        (c1, s1), (c2, s2) = (c2, s2), (c1, s1)
      for a in range(6):
        for b in range(6):
          p = (1 - flip if a == c1 else flip / others) * (1 - flip if b == c2 else flip / others)
          captions[turned, bool(scenes.vertical[i]), a, s1, b, s2] += share * p
    return captions

  each = {i: own(i) for i in np.flatnonzero(frequencies)}
  entropy = lambda captions: -sum(p * math.log(p) for p in captions.values() if p > 1e-300)
  given, blind = 0.0, collections.Counter()
  total = collections.Counter()
  for i, captions in each.items():
    for caption, p in captions.items():
      total[caption] += frequencies[i] * p
  for i, captions in each.items():
    rest = 1 - frequencies[i]
    mixed = {
      caption: (1 - swaps) * captions[caption]
      + swaps * (p - frequencies[i] * captions[caption]) / rest
      for caption, p in total.items()
    }
    given += frequencies[i] * entropy(mixed)
    for caption, p in mixed.items():
      blind[caption] += frequencies[i] * p
  return given, entropy(blind)


@pytest.mark.parametrize("either_order", [False, True])
def test_entropies_with_all_noise_and_a_long_tail_are_those_of_an_enumeration(either_order):
  frequencies = ShapesCaptions(tail=0.5).frequencies("train")
  frequencies = frequencies * (np.arange(1104) % 9 == 0)  # So few that dictionaries can hold all.
  frequencies /= frequencies.sum()
  found = language.entropies(
    language.compositions(2), frequencies, either_order=either_order, color_flips=0.2, swaps=0.25
  )
  np.testing.assert_allclose(found, enumerated(frequencies, either_order, 0.2, 0.25), rtol=1e-9)


def test_noise_comes_at_its_rates_and_is_reported():
  batch = sample(NOISY)
  original = batch.source == np.arange(N)
  assert original.sum() == 900
  assert (batch.source[~original] < 900).all()
  for field in batch[:-1]:
    np.testing.assert_array_equal(field, field[batch.source])
  batch = jax.tree.map(lambda leaf: leaf[:900], batch)
  assert abs(batch.swapped.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 900)
  rate = batch.flipped[~batch.swapped].mean()
  assert abs(rate - 0.2) < 4 * math.sqrt(0.16 / 1200)
  assert not batch.flipped[batch.swapped].any()
  is_color = (batch.tokens >= 9) & (batch.tokens < 15)
  for i in np.flatnonzero(~batch.swapped):
    wrong = batch.tokens[i] != batch.valid[i, 0]
    assert wrong[is_color[i]].tolist() == batch.flipped[i].tolist()
    assert not wrong[~is_color[i]].any()


def test_swapped_captions_are_never_right_and_those_of_frequent_scenes_come_often():
  data = ShapesCaptions(num_objects=1, split="iid", swaps=1.0, tail=1.0)  # 24 scenes.
  batch = sample(data)
  assert batch.tokens.shape == (N, 5)
  assert batch.swapped.all()
  assert not (batch.tokens[:, None] == batch.valid).all(axis=2).any()
  frequencies = data.frequencies("train")
  np.testing.assert_allclose(
    np.sort(frequencies)[::-1], (1 / np.arange(1, 25)) / (1 / np.arange(1, 25)).sum()
  )
  others = frequencies[None] / (1 - frequencies[:, None]) * (1 - np.eye(24))  # Of each scene.
  expected = frequencies @ others
  said = 4 * (batch.tokens[:, 2] - language.FIRST_COLOR) + batch.tokens[:, 3] - language.FIRST_SHAPE
  found = np.bincount(said, minlength=24) / N
  assert (abs(found - expected) < 4 * np.sqrt(expected / N)).all()


def test_flipped_colors_are_uniform_and_independent():
  batch = sample(ShapesCaptions(color_flips=1.0))
  is_color = (batch.valid[:, 0] >= language.FIRST_COLOR) & (batch.valid[:, 0] < 15)
  shift = ((batch.tokens - batch.valid[:, 0])[is_color] % 6).reshape(N, 2)
  counts = np.bincount(6 * shift[:, 0] + shift[:, 1], minlength=36).reshape(6, 6)
  assert counts[0].sum() + counts[:, 0].sum() == 0
  assert (abs(counts[1:, 1:] - N / 25) < 4 * math.sqrt(N / 25)).all()


def test_scenes_come_as_often_as_frequencies_say():
  data = NOISY
  frequencies = data.frequencies("train")
  nonzero = np.sort(frequencies[frequencies > 0])
  assert nonzero[-1] > 100 * nonzero[0]
  scenes = sample(data).scene[:900]  # Without those that repeat others.
  assert (frequencies[scenes] > 0).all()
  most = frequencies.argmax()
  error = math.sqrt(frequencies[most] / 900)
  assert abs(np.mean(scenes == most) - frequencies[most]) < 4 * error
  expected = frequencies @ frequencies
  assert abs(frequencies[scenes].mean() - expected) < 4 * frequencies[scenes].std() / 30
