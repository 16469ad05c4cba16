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
    box, worst_steps = jaxbo.adversarial.Box(epsilon), config.worst_steps
    targeted = {"objective": "targeted_dlr", "num_targets": config.num_targets}
    attacks = {
      PGD: jaxbo.adversarial.pgd(model, box, step_size=epsilon / 4, num_steps=config.test_steps),
      "apgd_ce": jaxbo.adversarial.apgd(model, box, num_steps=worst_steps),
      "apgd_t": jaxbo.adversarial.apgd(model, box, num_steps=worst_steps, **targeted),
    }
    copy = jax.jit(lambda found: found, out_shardings=devices.everywhere)
    found_everywhere = lambda attack: attack._replace(run=lambda *args: copy(attack.run(*args)))
    self._attacks = {name: found_everywhere(attack) for name, attack in attacks.items()}
    self._losses = jax.jit(self._losses_under_attack, out_shardings=devices.everywhere)

  def accuracy(self, params: Any, part: Images) -> float:
    """The percentage of clean images that are named correctly."""
    return 100 * float(np.mean(self._right(params, part)))

  def of_test(self, params: Any, part: Images, names: Sequence[str]) -> Row:
    """Accuracies in percent: clean, under PGD, in the worst case, of its tail, and of each class.

    Tail and classes are those of the worst case over attacks. Weights that prefer great losses are
    after ``tail_loss``. ``doubts`` are reasons not to believe it.
    """
    batch = np.asarray(part.images, np.float32) / 255, np.asarray(part.labels)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", UserWarning)
      found = jaxbo.adversarial.evaluate_robustness(
        self._model, params, batch, 0, self._attacks, batch_size=self._batch_size
      )
    classes = 100 * found.class_accuracies()
    percent = {name: 100 * value for name, value in found.accuracies().items()}
    return {
      "clean": percent["clean"],
      "pgd": percent[PGD],
      "worst": percent["worst_case"],
      "tail": 100 * found.tail_accuracy(),
      "worst_class": float(classes.min()),
      "tail_loss": self.tail_loss(params, *batch),
      "tail_pgd": 100 * jaxbo.adversarial.tail_accuracy(found.correct[PGD], batch[1], len(names)),
      "doubts": "; ".join(found.warnings),
      **{f"robust/{name}": float(value) for name, value in zip(names, classes, strict=True)},
    }

  def _losses_under_attack(self, params: Any, images: Any, labels: Any, index: Any) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(1), index)
    attacked = self._attacks[PGD](params, (images, labels), key)
    return jaxbo.adversarial.cross_entropy_loss(self._model(params, attacked), labels)

  def tail_loss(self, params: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """The mean cross-entropy under PGD of the tenth of the images, in [0, 1], with the highest."""
    parts = [slice(i, i + self._batch_size) for i in range(0, len(labels), self._batch_size)]
    losses = [self._losses(params, images[part], labels[part], part.start) for part in parts]
    return float(np.sort(np.concatenate(losses))[-max(1, len(labels) // 10) :].mean())
