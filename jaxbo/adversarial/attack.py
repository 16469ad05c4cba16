"""What all attacks share: their type, their input, and the choice among their results."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import _check, _random, _tree
from jaxbo._types import Data, Key, PyTree
from jaxbo.adversarial.box import Box
from jaxbo.adversarial.objectives import Objective, values_of

T = TypeVar("T")


class AttackInfo(NamedTuple):
  """What an attack observed for each example; ``[batch]``.

  Attributes:
    num_correct: the number of points at which the model still classified the example correctly,
      int32. Points are those where the attack took a gradient (for
      :func:`jaxbo.adversarial.square`: its queries). As floats, these are the scores of
      :func:`jaxbo.adversarial.gairat`.
    not_finite: whether the attack found an objective or a gradient that is not finite. It did not
      move the example there.
    clipped: whether the clean image was outside the range ``[low, high]``, so that the attack
      started at the clipped image instead. If any image was clipped, ``low`` and ``high`` do not
      fit these images.
  """

  num_correct: jax.Array
  not_finite: jax.Array
  clipped: jax.Array

  @property
  def num_not_finite(self) -> jax.Array:
    """The number of examples with an objective or gradient that was not finite, int32."""
    return jnp.sum(self.not_finite, dtype=jnp.int32)

  @property
  def num_clipped(self) -> jax.Array:
    """The number of clean images that were outside the range of pixels, int32."""
    return jnp.sum(self.clipped, dtype=jnp.int32)


class Attack(NamedTuple):
  """A pure, compiled attack; :func:`jaxbo.adversarial.pgd` and the other attacks return one.

  ``attack(params, (images, labels), key)`` returns perturbed images. It works inside jitted
  functions, under ``vmap`` and in ``shard_map``. It computes no gradients of the parameters, and no
  gradient flows back through it. The same key gives the same result.

  Attributes:
    run: ``run(params, (images, labels), key) -> (perturbed, AttackInfo)``. ``images`` are floats
      ``[batch, ...]`` within ``low`` and ``high`` of the attack's :class:`Box`; ``labels`` are
      integers ``[batch]``; ``key`` is an int, a raw key array or a typed key (``None`` for attacks
      that are not random). Perturbed images are at least float32, because narrower floats could
      leave the ball. Images out of range and labels that are not classes raise ``ValueError``.
      Under ``jit``, where values are not known, the attack clips images to the range and marks
      those as clipped; it leaves an example whose label is not a class at its start and marks it as
      not finite.
    box: the :class:`Box` that the attack stays in; :func:`evaluate_robustness` checks that images
      lie in its range.
  """

  run: Callable[..., tuple[jax.Array, AttackInfo]]
  box: Box | None = None

  def __call__(self, params: PyTree, batch: Data, key: Key | None = None) -> jax.Array:
    """The perturbed images alone."""
    return self.run(params, batch, key)[0]


class Found(NamedTuple):
  """What one run of an attack found.

  Attributes:
    perturbed: the perturbed images, ``[batch, ...]``.
    values: their objective, ``[batch]``.
    wrong: whether they are misclassified, ``[batch]``.
    num_correct: as in :class:`AttackInfo`.
    not_finite: as in :class:`AttackInfo`.
  """

  perturbed: jax.Array
  values: jax.Array
  wrong: jax.Array
  num_correct: jax.Array
  not_finite: jax.Array


def make_attack(
  model: Callable[..., jax.Array],
  find: Callable[..., Found],
  box: Box,
  *,
  needs_key: bool = True,
  min_classes: int = 2,
) -> Attack:
  """Builds an attack from ``find(forward, images, labels, key)``; ``forward`` returns logits.

  ``find`` sees images within the range, in at least float32.
  """
  _check.takes_arguments("model", model, "params", "images")
  of_model = jax.jit(model)

  @jax.jit
  def compiled(params, images, labels, key):
    clipped = box.outside(images)
    params, images = jax.lax.stop_gradient((params, _tree.at_least_float32(images)))
    forward = lambda x: _tree.at_least_float32(model(params, x))
    found = find(forward, box.clip(images), labels, key)
    return found.perturbed, AttackInfo(found.num_correct, found.not_finite, clipped)

  def run(params: PyTree, batch: Data, key: Any = None):
    images, labels = check_batch(batch, box)
    num_classes = check_logits(jax.eval_shape(of_model, params, images), images, min_classes)
    check_labels(labels, num_classes)
    labels = _tree.at_least_int32(labels)
    return compiled(params, images, labels, _random.typed_key(key) if needs_key else None)

  return Attack(run, box)


def check_batch(batch: Data, box: Box | None = None) -> tuple[jax.Array, jax.Array]:
  """Returns images and labels; raises unless an attack can take them, in its box if given."""
  if not isinstance(batch, tuple | list) or len(batch) != 2:
    raise TypeError(f"batch must be a pair (images, labels), got {type(batch).__name__}")
  images, labels = batch
  _check.floating("images", images)
  if jnp.ndim(images) < 2 or not jnp.shape(images)[0]:
    raise ValueError(f"images must be [batch, ...], at least one, got shape {jnp.shape(images)}")
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise TypeError(f"labels must be integers, got dtype {jnp.result_type(labels)}")
  if jnp.shape(labels) != jnp.shape(images)[:1]:
    raise ValueError(
      f"labels must be [batch], one for each of {jnp.shape(images)[0]} images, got shape "
      f"{jnp.shape(labels)}"
    )
  images, labels = jnp.asarray(images), jnp.asarray(labels)
  if box is not None:
    check_pixels(images, box)
  return images, labels


def check_pixels(images: jax.Array, box: Box) -> None:
  """Raises ``ValueError`` if a known image is outside of the box."""
  if not all(map(_check.is_known, (images, box.low, box.high))):
    return
  with jax.ensure_compile_time_eval():  # Under jit too, of what is known there.
    outside = np.any(box.outside(images))
  if outside:
    values = np.asarray(images)
    # Unlike nanmin, this does not warn if all values are NaN.
    smallest, largest = (float(f.reduce(values, axis=None)) for f in (np.fmin, np.fmax))
    raise ValueError(
      f"images must be from low={box.low} to high={box.high}, got values from {smallest:.6g} to "
      f"{largest:.6g}; give their range, jaxbo.adversarial.Box(epsilon, low, high), or normalize "
      "inside the model, by jaxbo.adversarial.normalized"
    )


def check_logits(
  logits: jax.typing.ArrayLike | jax.ShapeDtypeStruct, images: jax.Array, min_classes: int = 2
) -> int:
  """Returns the number of classes; raises unless logits are ``[batch, num_classes]``."""
  shape = getattr(logits, "shape", None)
  if shape is None or len(shape) != 2 or shape[0] != images.shape[0]:
    got = type(logits).__name__ if shape is None else shape
    raise ValueError(f"model must return logits, [{images.shape[0]}, num_classes], got {got}")
  _check.floating("logits", logits)
  if shape[1] < min_classes:
    raise ValueError(
      f"the objective must have at least {min_classes} classes to compare, got {shape[1]}"
    )
  return shape[1]


def check_labels(labels: jax.typing.ArrayLike, num_classes: int) -> None:
  """Raises ``ValueError`` if a known label is not a class."""
  if _check.is_known(labels) and np.size(labels):
    values = np.asarray(labels)  # The methods of a jax.Array would be traced under jit.
    lowest, largest = int(np.min(values)), int(np.max(values))
    if lowest < 0 or largest >= num_classes:
      raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {lowest} to {largest}")


def gradient(
  forward: Callable[[jax.Array], jax.Array],
  objective: Objective,
  perturbed: jax.Array,
  labels: jax.Array,
  clean_logits: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns ``(gradient, values, wrong, bad)`` at ``perturbed``; a bad gradient is set to zero."""

  def total(images):
    logits = forward(images)
    values = values_of(objective, logits, labels, clean_logits)
    return jnp.sum(values), (values, is_wrong(logits, labels))

  direction, (values, wrong) = jax.grad(total, has_aux=True)(perturbed)
  axes = tuple(range(1, direction.ndim))
  bad = ~jnp.isfinite(values) | ~jnp.all(jnp.isfinite(direction), axis=axes)
  return jnp.where(jnp.expand_dims(bad, axes), 0, direction), values, wrong, bad


def is_wrong(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Whether another class than the label has the largest logit, or a logit is NaN; ``[batch]``."""
  predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return (predicted != labels.astype(jnp.int32)) | jnp.any(jnp.isnan(logits), axis=-1)


def best(found: Found) -> Found:
  """Chooses one run for each example; the leaves of ``found`` are ``[runs, batch, ...]``.

  It chooses the run with the largest objective, among the misclassified runs if there are any.
  """
  finite = jnp.isfinite(found.values)
  some = jnp.any(found.wrong & finite, axis=0)
  eligible = (found.wrong | ~some[None]) & finite
  index = jnp.argmax(jnp.where(eligible, found.values, -jnp.inf), axis=0)
  take = jax.vmap(lambda runs, i: jax.tree.map(lambda leaf: leaf[i], runs), in_axes=(1, 0))
  chosen = take(found, index)
  return chosen._replace(not_finite=jnp.any(found.not_finite, axis=0))
