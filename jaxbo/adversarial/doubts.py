"""Reasons to doubt that a model is as robust as attacks say."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxbo import _tree
from jaxbo._types import PyTree
from jaxbo.adversarial.losses import cross_entropy_loss

# How far probabilities may be from summing to 1, given the rounding of bfloat16.
_ROUNDING = 1e-2
# A different order of summation is neither randomness nor the influence of other images.
_SAME_PROGRAM, _OTHER_PLACE = 1e-3, 1e-2


class Seen(NamedTuple):
  """What is looked at of each image, ``[batch, ...]``.

  Attributes:
    logits: the logits.
    again: those of a second call in the same program.
    no_slope: whether the gradient of the cross entropy is exactly zero.
  """

  logits: np.ndarray
  again: np.ndarray
  no_slope: np.ndarray


def look(
  model: Callable[..., jax.Array], params: PyTree, images: np.ndarray, labels: np.ndarray
) -> Seen:
  """Looks at a batch of images."""
  return Seen(*map(np.asarray, _look(model, params, images, labels)))


@functools.partial(jax.jit, static_argnums=0)  # Compiled once for each model.
def _look(model, params, images, labels):
  def total(images):
    logits = _tree.at_least_float32(model(params, images))
    loss = cross_entropy_loss(logits, labels)
    return jnp.sum(loss), logits

  images = _tree.at_least_float32(images)
  slope, logits = jax.grad(total, has_aux=True)(images)
  # The barrier keeps the compiler from merging the two calls.
  again = _tree.at_least_float32(model(params, jax.lax.optimization_barrier(images)))
  return logits, again, jnp.all(slope == 0, axis=tuple(range(1, slope.ndim)))


def depends_on_company(
  model: Callable[..., jax.Array],
  params: PyTree,
  images: np.ndarray,
  labels: np.ndarray,
  logits: np.ndarray,
) -> bool:
  """Whether logits of the first half of a batch change at other places among other images.

  A batch of one image is compared with a batch of two.
  """
  size = max(len(images), 2)
  kept = size // 2
  strangers = np.repeat(0.5 * images[:1], size - kept, axis=0)
  mixed = np.concatenate([strangers, images[:kept]]), np.resize(labels, size)
  elsewhere = look(model, params, *mixed).logits[size - kept :]
  return _differ(logits[:kept], elsewhere, _OTHER_PLACE)


def about_model(
  model: Callable[..., jax.Array], params: PyTree, first: tuple[np.ndarray, np.ndarray], seen: Seen
) -> Iterator[str]:
  """Doubts about the model itself, by its first batch and by what was seen of all images."""
  logits, again, no_slope = seen
  if np.min(logits) >= 0 and np.all(np.abs(np.sum(logits, axis=1) - 1) < _ROUNDING):
    yield "the model gives probabilities; it must give logits, before the softmax"
  if _differ(logits, again, _SAME_PROGRAM):
    yield "the model is random: two calls on the same images differ; attacks must average over many"
  elif depends_on_company(model, params, *first, logits):
    yield (
      "the logits of an image depend on the other images of its batch, or on its place among them, "
      "as with batch normalization or dropout in training mode; so do accuracies and attacks; "
      "evaluate with the running statistics, and without dropout"
    )
  if np.mean(no_slope) > 0.1:
    yield (
      f"gradients of the cross entropy are exactly zero for {np.mean(no_slope):.0%} of the images; "
      "attacks that follow them find nothing there"
    )
  if _has_while(jax.make_jaxpr(model)(params, first[0][:1]).jaxpr):
    yield (
      "the model runs a loop of unknown length, as optimization at inference does; attacks by "
      "gradients may not see through it"
    )


def about_gradients(correct: dict[str, np.ndarray]) -> Iterator[str]:
  """Doubts about gradients, by which images withstood each attack."""
  others = [row for name, row in correct.items() if name != "square"]
  if "square" in correct and others:
    left = functools.reduce(np.logical_and, others)
    broken = int(np.sum(left & ~correct["square"]))
    if broken:
      yield (
        f"square, which uses no gradients, breaks {broken} images that withstood all other "
        "attacks; gradients may be masked"
      )


def about_boxes(clipped: dict[str, int]) -> Iterator[str]:
  """Doubts about the range of the images, by how many each attack clipped."""
  for name, count in clipped.items():
    if count:
      yield (
        f"{name} clipped {count} clean images to its range, and so attacked other images; give it "
        "the range of your images, jaxbo.adversarial.Box(epsilon, low, high)"
      )


def _differ(logits: np.ndarray, others: np.ndarray, tolerance: float) -> bool:
  scale = np.max(np.abs(logits), axis=1, keepdims=True)
  return bool(np.any(np.abs(logits - others) > tolerance * scale))


def _has_while(jaxpr: core.Jaxpr) -> bool:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "while":
      return True
    if any(map(_has_while, core.jaxprs_in_params(equation.params))):
      return True
  return False
