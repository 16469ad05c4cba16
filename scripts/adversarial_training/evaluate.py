"""What a trained classifier withstands."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbo
from scripts.adversarial_training.config import Config
from scripts.adversarial_training.data import Images, as_floats
from scripts.common.devices import Devices
from scripts.common.task import Row

PGD = "pgd"
TEMPERATURES = 2.0 ** (np.arange(-16, 25) / 8)  # Of the softmax, 0.25 to 8.
Model = Callable[[Any, jax.Array], jax.Array]


def divided(model: Model, devices: Devices) -> Model:
  """The same logits and gradients on all devices, of which each computes those of some images."""

  def of_all(params, images):
    num = len(images)
    images = jax.lax.with_sharding_constraint(images, devices.everywhere)  # Gradients, too.
    filled = jnp.pad(images, [(0, -num % devices.number), *[(0, 0)] * (images.ndim - 1)])
    logits = model(params, jax.lax.with_sharding_constraint(filled, devices.rows))
    return jax.lax.with_sharding_constraint(logits, devices.everywhere)[:num]

  return model if devices.number == 1 else of_all


class Evaluator:
  """Accuracies on images; every attack is compiled once, and shared by all devices."""

  def __init__(self, model: Model, config: Config, devices: Devices):
    self._model, self._batch_size = (model := divided(model, devices)), config.test_batch_size
    self._right = jax.jit(
      lambda params, part: jnp.argmax(model(params, as_floats(part.images)), axis=-1) == part.labels
    )
    epsilon = config.largest_change()
    box = jaxbo.adversarial.Box(epsilon)
    attacks = {
      PGD: jaxbo.adversarial.pgd(model, box, step_size=epsilon / 4, num_steps=config.test_steps),
      **jaxbo.adversarial.autoattack(
        model,
        box,
        num_steps=config.worst_steps,
        num_targets=config.num_targets,
        num_queries=config.num_queries,
      ),
    }
    copy = jax.jit(lambda found: found, out_shardings=devices.everywhere)
    found_everywhere = lambda attack: attack._replace(run=lambda *args: copy(attack.run(*args)))
    self._attacks = {name: found_everywhere(attack) for name, attack in attacks.items()}
    self._logits = jax.jit(self._logits_under_attack, out_shardings=devices.everywhere)

  def accuracy(self, params: Any, part: Images) -> float:
    """The percentage of clean images that are named correctly."""
    return 100 * float(np.mean(self._right(params, part)))

  def of_test(self, params: Any, part: Images, names: Sequence[str]) -> Row:
    """Accuracies in percent: clean, under PGD, in the worst case, of its tail, and of each class.

    Tail and classes are those of the worst case over attacks. ``doubts`` are reasons not to believe
    it.
    """
    batch = _as_batch(part)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", UserWarning)
      found = jaxbo.adversarial.evaluate_robustness(
        self._model, params, batch, 0, self._attacks, batch_size=self._batch_size, drop_broken=True
      )
    classes = 100 * found.class_accuracies()
    percent = {name: 100 * value for name, value in found.accuracies().items()}
    return {
      "clean": percent["clean"],
      "pgd": percent[PGD],
      "worst": percent["worst_case"],
      "tail": 100 * found.tail_accuracy(),
      "worst_class": float(classes.min()),
      "tail_pgd": 100 * jaxbo.adversarial.tail_accuracy(found.correct[PGD], batch[1], len(names)),
      "doubts": "; ".join(found.warnings),
      **{f"robust/{name}": float(value) for name, value in zip(names, classes, strict=True)},
    }

  def of_losses(self, params: Any, part: Images, validation: Images) -> Row:
    """The loss under PGD of the tenth of the images where it is highest, and with a control.

    Weights that prefer great losses are after it. They may lower it by lowering a model's
    confidence alone, which one temperature of the softmax does without any training: that which is
    best on the images for validation, by their mean loss under PGD.
    """
    (logits, labels), of_validation = (self._attacked(params, one) for one in (part, validation))
    means = [losses_at(temperature, *of_validation).mean() for temperature in TEMPERATURES]
    best = float(TEMPERATURES[np.argmin(means)])
    return {
      "tail_loss": of_tail(losses_at(1.0, logits, labels)),
      "tail_loss_calibrated": of_tail(losses_at(best, logits, labels)),
      "softmax_temperature": best,
    }

  def _attacked(self, params: Any, part: Images) -> tuple[np.ndarray, np.ndarray]:
    """Logits under PGD, and labels."""
    (images, labels), size = _as_batch(part), self._batch_size
    parts = [slice(i, i + size) for i in range(0, len(labels), size)]
    found = [self._logits(params, images[part], labels[part], part.start) for part in parts]
    return np.concatenate(found), labels

  def _logits_under_attack(self, params: Any, images: Any, labels: Any, index: Any) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(1), index)
    return self._model(params, self._attacks[PGD](params, (images, labels), key))


def losses_at(temperature: float, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """The cross-entropy of each image at a temperature of the softmax."""
  return np.asarray(jaxbo.adversarial.cross_entropy_loss(logits / temperature, labels))


def of_tail(losses: np.ndarray) -> float:
  """The mean of the highest tenth."""
  return float(np.sort(losses)[-max(1, len(losses) // 10) :].mean())


def _as_batch(part: Images) -> tuple[np.ndarray, np.ndarray]:
  return np.asarray(part.images, np.float32) / 255, np.asarray(part.labels)
