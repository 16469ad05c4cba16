"""The linear head on features: its loss against NumPy, and that of a head of zeros."""

import jax
import numpy as np
from jaxbo_models import linear_head

from tests.models import oracle


@jax.jit
def loss(head, features, labels):
  return linear_head.cross_entropy(linear_head.logits(head, features), labels)


def test_loss_equals_that_of_numpy(x64):
  features, labels = oracle.images(6, 4), np.array([0, 2, 1, 1, 0, 2])
  head = oracle.perturbed(linear_head.zero_head(4, 3))
  z = features @ head["w"] + head["b"]
  expected = np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(6), labels])
  np.testing.assert_allclose(loss(head, features, labels), expected, rtol=1e-12)


def test_zero_head_gives_all_classes_the_same_probability():
  head = linear_head.zero_head(4, 3)
  assert {name: leaf.shape for name, leaf in head.items()} == {"w": (4, 3), "b": (3,)}
  np.testing.assert_allclose(
    loss(head, oracle.images(2, 4), np.array([0, 2])), np.log(3), rtol=1e-6
  )
