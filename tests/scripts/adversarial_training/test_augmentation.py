"""Crops and mirror images: against a search over all shifts, and the odds of each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts.adversarial_training import augmentation

pytestmark = pytest.mark.slow  # All together, not each.

IMAGES = np.random.default_rng(0).integers(1, 255, (600, 5, 4, 2)).astype(np.uint8)
crop = jax.jit(
  lambda seed, images, padding: augmentation.random_crop(jax.random.key(seed), images, padding),
  static_argnums=2,
)
flip = jax.jit(lambda seed, images: augmentation.random_flip(jax.random.key(seed), images))


def test_a_crop_is_a_shift_with_zeros_and_all_shifts_are_equally_likely():
  padding = 1
  cropped = np.asarray(crop(0, IMAGES, padding))
  assert cropped.dtype == np.uint8
  wide = np.pad(IMAGES, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  corners = list(itertools.product(range(2 * padding + 1), repeat=2))
  cuts = np.stack([wide[:, i : i + 5, j : j + 4] for i, j in corners])
  is_cut = (cuts == cropped).all(axis=(2, 3, 4))
  np.testing.assert_array_equal(is_cut.sum(0), 1)  # of each image, exactly one
  shares = is_cut.mean(1)
  p = 1 / len(corners)
  assert np.abs(shares - p).max() < 4 * np.sqrt(p * (1 - p) / len(IMAGES))


def test_half_of_the_images_are_mirrored():
  flipped = np.asarray(flip(0, jnp.asarray(IMAGES, jnp.bfloat16)))
  assert flipped.dtype == jnp.bfloat16
  exact = IMAGES.astype(jnp.bfloat16)
  mirrored = (flipped == exact[:, :, ::-1]).all(axis=(1, 2, 3))
  np.testing.assert_array_equal((flipped == exact).all(axis=(1, 2, 3)), ~mirrored)
  assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(IMAGES))


def test_equal_keys_give_equal_images_and_no_padding_changes_nothing():
  np.testing.assert_array_equal(crop(3, IMAGES, 1), crop(3, IMAGES, 1))
  assert (crop(3, IMAGES, 1) != crop(4, IMAGES, 1)).any()
  np.testing.assert_array_equal(crop(3, IMAGES, 0), IMAGES)
