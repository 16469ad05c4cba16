"""Shapes with captions: what is drawn and said, how often, and with which entropy."""

import collections
import functools
import math

import jax
import numpy as np
import pytest

from scripts.captioning.language import CAPTIONS, KINDS, PARTS, VERTICAL, VOCABULARY
from scripts.captioning.scenes import ShapesCaptions

pytestmark = pytest.mark.slow  # All together, not each.

N = 1000
EITHER = ShapesCaptions(order="either")
NOISY = ShapesCaptions(order="either", color_flips=0.2, swaps=0.25)
SWAPPED = ShapesCaptions(swaps=1.0)


@functools.cache
def sample(data, part="train", seed=0, num=N):
  batch = jax.jit(functools.partial(data.sample, num=num, part=part))(jax.random.key(seed))
  return jax.tree.map(np.asarray, batch)


def said(tokens):
  return " ".join(VOCABULARY.decode(tokens))


def seen(image, cell):
  """What is in a cell, by its brightest channels and its size, with its corner and brightness."""
  top, left = 8 * (cell // 4), 8 * (cell % 4)
  pixels = image[top : top + 8, left : left + 8]
  there = pixels.max(axis=-1) > 0.4
  color = tuple((pixels.max(axis=(0, 1)) > 0.4).astype(int))
  name = {
    (1, 0, 0): "red",
    (0, 1, 0): "green",
    (0, 0, 1): "blue",
    (1, 1, 0): "yellow",
    (1, 0, 1): "magenta",
    (0, 1, 1): "cyan",
  }[color]
  shape = {36: "square", 32: "circle", 24: "triangle", 20: "cross"}[int(there.sum())]
  corner = top + there.any(axis=1).argmax(), left + there.any(axis=0).argmax()
  return f"{name} {shape}", corner, pixels.max()


def described(objects, cells):
  """A caption written from what stands where."""
  (first, second), (cell, other) = objects, cells
  assert first != second
  if cell // 4 == other // 4:
    relation = "left of" if cell % 4 < other % 4 else "right of"
  else:
    assert cell % 4 == other % 4
    relation = "above" if cell // 4 < other // 4 else "below"
  return f"a {first} {relation} a {second}"


def test_captions_say_what_the_pixels_show():
  batch = jax.tree.map(lambda leaf: leaf[:200], sample(EITHER))
  assert batch.images.shape == (200, 32, 32, 3)
  assert batch.images.min() == 0
  assert batch.images.max() <= 1
  assert batch.tokens.shape == (200, 10)
  for image, tokens, valid, cells, *_ in zip(*batch, strict=True):
    objects, corners, _ = zip(*(seen(image, cell) for cell in cells), strict=True)
    text = described(objects, cells)
    assert said(tokens) == text
    assert {said(caption) for caption in valid} == {text, described(objects[::-1], cells[::-1])}
    outside = image.copy()
    for top, left in corners:
      outside[top : top + 6, left : left + 6] = 0
    assert outside.max() < 0.35  # Noise alone.


def test_places_colors_and_noise_are_drawn_over_their_whole_range():
  batch = sample(EITHER)
  images = zip(batch.images, batch.cells, strict=True)
  objects = [[seen(image, cell) for cell in cells] for image, cells in images]
  shift = np.array([corner for of_image in objects for _, corner, _ in of_image]) % 8
  assert shift.max() == 2
  shift = np.eye(3)[shift]  # Downwards and to the right.
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

  # The greatest of many noisy pixels, clipped: above the brightness by 0.1.
  bright = np.array([[brightness for _, _, brightness in of_image] for of_image in objects])
  assert bright.min() < 0.85
  assert np.mean(bright < 0.9) > 0.2
  assert abs(np.corrcoef(bright.T)[0, 1]) < 4 / math.sqrt(N)


def test_tokens_have_a_beginning_an_end_and_padding_behind_it():
  tokens = sample(EITHER).tokens
  assert (tokens[:, 0] == VOCABULARY.bos).all()
  ends = (tokens == VOCABULARY.eos).argmax(axis=1)
  assert set(ends) == {8, 9}
  np.testing.assert_array_equal(tokens != VOCABULARY.pad, np.arange(10) <= ends[:, None])
  assert len(VOCABULARY) == 19


def test_canonical_captions_begin_with_what_is_read_first():
  batch = sample(SWAPPED, "validation")
  assert (batch.cells[:, 0] < batch.cells[:, 1]).all()
  assert not {"right", "below"} & {word for row in batch.tokens for word in said(row).split()}
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
  of_part = {}
  for part, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
    numbers = np.flatnonzero(PARTS[part])
    assert abs(len(numbers) / 1104 - share) < 0.002
    pairs = np.sort(KINDS[numbers], axis=1).tolist()
    triples = [(*p, way) for p, way in zip(pairs, VERTICAL[numbers], strict=True)]
    assert set(collections.Counter(triples).values()) == {2}  # Both orders of the two objects.
    of_part[part] = set(triples)
  assert len(set.union(*of_part.values())) == sum(map(len, of_part.values())) == 552
  # A pair that is held out in one direction may be trained on in the other.
  assert abs(len({triple[:2] for triple in of_part["test"]}) - 276 * (1 - 0.8**2)) < 15
  trained = {said(caption) for caption in CAPTIONS[:, PARTS["train"]].reshape(-1, 10)}
  assert len(trained) == 2 * PARTS["train"].sum()
  assert {said(tokens) for tokens in sample(EITHER).tokens} < trained


def test_entropies_are_those_of_captions_that_are_all_as_frequent():
  for part, scenes in PARTS.items():
    canonical, either = (ShapesCaptions(order=o).entropies(part) for o in ("canonical", "either"))
    assert canonical == (0, pytest.approx(math.log(scenes.sum())))
    assert either == pytest.approx((math.log(2), math.log(2 * scenes.sum())))


def test_noise_comes_at_its_rates_and_is_reported():
  batch = sample(NOISY)
  assert abs(batch.swapped.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / N)
  assert abs(batch.flipped.mean() - 0.2) < 4 * math.sqrt(0.16 / (2 * N))
  is_color = (batch.tokens >= 9) & (batch.tokens < 15)
  for i in np.flatnonzero(~batch.swapped):
    wrong = batch.tokens[i] != batch.valid[i, 0]
    assert wrong[is_color[i]].tolist() == batch.flipped[i].tolist()
    assert not wrong[~is_color[i]].any()


def test_scenes_are_as_frequent_as_each_other_and_so_are_their_swapped_captions():
  batch = sample(SWAPPED, "validation")
  assert batch.swapped.all()
  assert not (batch.tokens[:, None] == batch.valid).all(axis=2).any()
  for captions in (batch.valid[:, 0], batch.tokens):
    found = collections.Counter(said(caption) for caption in captions)
    assert found.keys() == {said(caption) for caption in CAPTIONS[0, PARTS["validation"]]}
    assert max(abs(count - N / 112) for count in found.values()) < 4 * math.sqrt(N / 112)


def test_flipped_colors_are_uniform_and_independent():
  batch = sample(ShapesCaptions(color_flips=1.0))
  is_color = (batch.valid[:, 0] >= 9) & (batch.valid[:, 0] < 15)
  shift = ((batch.tokens - batch.valid[:, 0])[is_color] % 6).reshape(N, 2)
  counts = np.bincount(6 * shift[:, 0] + shift[:, 1], minlength=36).reshape(6, 6)
  assert counts[0].sum() + counts[:, 0].sum() == 0
  assert (abs(counts[1:, 1:] - N / 25) < 4 * math.sqrt(N / 25)).all()
