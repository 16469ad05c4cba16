"""How robust a model is: the worst case over attacks, by class, and reasons to doubt it."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import _check, _random
from jaxbo._types import Key, PyTree
from jaxbo.adversarial import class_metrics, doubts
from jaxbo.adversarial.attack import (
  Attack,
  check_batch,
  check_labels,
  check_pixels,
  is_wrong,
)


class RobustnessReport(NamedTuple):
  """What :func:`evaluate_robustness` found; NumPy arrays.

  Attributes:
    labels: ``[num_images]`` integers.
    clean: whether each image is classified correctly, ``[num_images]`` booleans.
    correct: for each attack by name, whether each image is classified correctly both clean and
      under the attack, and with ``drop_broken`` under all attacks before it, ``[num_images]``
      booleans.
    num_not_finite: for each attack by name, how many images had an objective or gradient that was
      not finite.
    num_clipped: for each attack by name, how many clean images were outside its range of pixels, so
      that it attacked the clipped images. Attacks of this module raise ``ValueError`` instead,
      unless you ``jit`` their ``run``, which hides the values.
    warnings: reasons to doubt the accuracies; see :func:`evaluate_robustness`.
    num_classes: the number of classes.
  """

  labels: np.ndarray
  clean: np.ndarray
  correct: dict[str, np.ndarray]
  num_not_finite: dict[str, int]
  num_clipped: dict[str, int]
  warnings: tuple[str, ...]
  num_classes: int

  @property
  def worst_case(self) -> np.ndarray:
    """Whether each image is classified correctly clean and under every attack, ``[num_images]``."""
    return functools.reduce(np.logical_and, self.correct.values(), self.clean)

  def accuracies(self) -> dict[str, float]:
    """Accuracies, clean, under each attack, and under the worst attack for each image."""
    rows = {"clean": self.clean, **self.correct, "worst_case": self.worst_case}
    return {name: float(np.mean(row)) for name, row in rows.items()}

  def class_accuracies(self) -> np.ndarray:
    """Worst-case accuracy of each class, ``[num_classes]``; NaN for a class without images."""
    return class_metrics.class_accuracy(self.worst_case, self.labels, self.num_classes)

  def tail_accuracy(self, fraction: float = 0.3) -> float:
    """Worst-case :func:`tail_accuracy` of a ``fraction`` of the classes; default RA-Tail-30."""
    return class_metrics.tail_accuracy(self.worst_case, self.labels, self.num_classes, fraction)


def evaluate_robustness(
  model: Callable[..., jax.Array],
  params: PyTree,
  batch: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
  key: Key,
  attacks: Mapping[str, Attack],
  *,
  batch_size: int = 256,
  drop_broken: bool = False,
) -> RobustnessReport:
  """Measures accuracy on clean images, under every attack, and under the worst for each image.

  By default every attack runs on every image, so the report has the accuracy under each attack
  alone. With ``drop_broken=True`` an attack runs only on the images that withstood the attacks
  before it, which saves time. The report then has the accuracy under each attack and those before
  it. The last batch repeats an image until it is full, so that each attack compiles only once.

  *Keys.* With ``drop_broken``, every image has its own key, ``fold_in(fold_in(key, i), j)`` for
  attack ``i`` and image ``j``. The random numbers of an image then do not depend on which other
  images are left or on ``batch_size``. So the worst case is the same, image by image and up to
  rounding, as if all attacks ran on all images with these keys. Without ``drop_broken``, one key
  draws for a whole batch, so random attacks start at other points; both are fair draws.

  *Checks.* A model that hides its gradients looks robust but is not. The function issues a
  ``UserWarning``, and adds it to ``report.warnings``, if

  * the model returns probabilities instead of logits: objectives saturate;
  * two calls on the same images differ: the model is random;
  * the logits of an image change at another place among other images: the model has batch
    normalization or dropout in training mode, and accuracies depend on ``batch_size``;
  * gradients of the cross entropy are exactly zero for more than a tenth of the images;
  * the attack named ``square``, which uses no gradients, breaks images that withstood all others;
  * the model runs a loop of unknown length (``while``), as optimization at inference does: gradient
    attacks may not see through the loop;
  * an attack had to clip clean images to its range: their pixels are not between its ``low`` and
    its ``high``.

  Cost: the attacks and one forward pass after each; two forward passes and one backward pass for
  the checks, and the same for one more batch.

  Args:
    model: ``model(params, images) -> logits``, ``[batch, num_classes]``; the logits of an example
      must not depend on other examples.
    params: the parameters of the model.
    batch: all ``(images, labels)``, as host or device arrays: floats ``[num_images, ...]`` and
      integers ``[num_images]``.
    key: an int, a raw key array or a typed key.
    attacks: a dict of attacks by name, in their order, such as :func:`autoattack` or
      :func:`standard_attacks`.
    batch_size: how many images to attack at once, at least 1; the last batch is padded.
    drop_broken: whether attacks leave out images that are already misclassified.

  Returns:
    A :class:`RobustnessReport`.

  Raises:
    ValueError: if images or labels are out of range, or if an attack is named ``"clean"`` or
      ``"worst_case"``.
    TypeError: if ``attacks`` is not a dict of attacks.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def model(params, images):
    ...   return jnp.concatenate([images, -images], axis=1) * params
    >>> pgd = jaxbo.adversarial.pgd(
    ...   model, jaxbo.adversarial.Box(0.3, low=-1.0), step_size=0.2, num_steps=4)
    >>> attacks = {"pgd": pgd}
    >>> batch = jnp.array([[0.5], [0.1], [-0.2]]), jnp.array([0, 0, 0])
    >>> report = jaxbo.adversarial.evaluate_robustness(model, jnp.float32(2.0), batch, 0, attacks)
    >>> {name: round(value, 2) for name, value in report.accuracies().items()}
    {'clean': 0.67, 'pgd': 0.33, 'worst_case': 0.33}

  References:
    Croce and Hein, `Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks <https://arxiv.org/abs/2003.01690>`_, 2020.
  """
  _check.takes_arguments("model", model, "params", "images")
  batch_size = _check.positive_int("batch_size", batch_size)
  _check_attacks(attacks)
  images, labels = map(np.asarray, check_batch(batch))
  batch_size = min(batch_size, len(labels))
  key = _random.typed_key(key)
  seen, num_classes = [], 0
  for _, rows, count in _cut(np.arange(len(labels)), batch_size):
    for attack in attacks.values():
      if attack.box is not None:
        check_pixels(jnp.asarray(images[rows]), attack.box)
    looked = doubts.look(model, params, images[rows], labels[rows])
    num_classes = looked.logits.shape[1]
    check_labels(labels, num_classes)
    seen.append([x[:count] for x in looked])
  of_all = doubts.Seen(*(np.concatenate(column) for column in zip(*seen, strict=True)))
  clean = ~np.asarray(_wrong(of_all.logits, labels))

  correct: dict[str, np.ndarray] = {}
  bad, clipped = dict.fromkeys(attacks, 0), dict.fromkeys(attacks, 0)
  left = clean
  for number, (name, attack) in enumerate(attacks.items()):
    correct[name] = np.zeros(len(labels), bool)
    chosen = np.flatnonzero(left) if drop_broken else np.arange(len(labels))
    for index, rows, count in _cut(chosen, batch_size):
      own, part = jax.random.clone(key), (images[rows], labels[rows])
      if drop_broken:
        keys = _keys(jax.random.fold_in(own, number), rows)
        perturbed, info = _attack_each(attack.run, params, *part, keys)
      else:
        own = jax.random.fold_in(jax.random.fold_in(own, index), number)
        perturbed, info = attack.run(params, part, own)
      fell = np.asarray(_falls(model, params, perturbed, part[1]))
      of_part = rows[:count]
      correct[name][of_part] = clean[of_part] & ~fell[:count]
      bad[name] += int(np.sum(np.asarray(info.not_finite)[:count]))
      clipped[name] += int(np.sum(np.asarray(info.clipped)[:count]))
    left = left & correct[name]

  first = images[:batch_size], labels[:batch_size]
  reasons = [
    *doubts.about_model(model, params, first, of_all),
    *doubts.about_gradients(correct),
    *doubts.about_boxes(clipped),
  ]
  for reason in reasons:
    warnings.warn(f"evaluate_robustness: {reason}", stacklevel=2)
  return RobustnessReport(labels, clean, correct, bad, clipped, tuple(reasons), num_classes)


def _check_attacks(attacks: object) -> None:
  is_attack = lambda value: callable(getattr(value, "run", None))
  if not (isinstance(attacks, Mapping) and all(map(is_attack, attacks.values()))):
    raise TypeError(f"attacks must be a dict of attacks by name, got {attacks!r}")
  # The report has its own rows of these names.
  if taken := {"clean", "worst_case"} & set(attacks):
    raise ValueError(f"attacks must have other names than 'clean' and 'worst_case', got {taken}")


@functools.partial(jax.jit, static_argnums=0)
def _falls(model, params, images, labels):
  return is_wrong(model(params, images), labels)


_wrong = jax.jit(is_wrong)


@functools.partial(jax.jit, static_argnums=0)
def _attack_each(run, params, images, labels, keys):
  """Attacks every image of a batch with a key of its own."""

  def attack_one(image, label, key):
    return jax.tree.map(lambda x: x[0], run(params, (image[None], label[None]), key))

  return jax.vmap(attack_one)(images, labels, keys)


_keys = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def _cut(chosen: np.ndarray, batch_size: int) -> Iterator[tuple[int, np.ndarray, int]]:
  """Yields ``(index, rows, count)`` for batches of equal size; pads the last one by repetition."""
  for index, first in enumerate(range(0, len(chosen), batch_size)):
    places = np.arange(first, first + batch_size)
    yield index, chosen[np.minimum(places, len(chosen) - 1)], int(np.sum(places < len(chosen)))
