"""What a trained classifier withstands."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbo
from scripts.common.adv_config import Config
from scripts.common.adv_data import Images
from scripts.common.adv_report import Row
from scripts.common.adv_train import as_floats

PGD, APGD_CE, APGD_T = "pgd", "apgd_ce", "apgd_t"


class Evaluator:
  """Accuracies on images; every attack is compiled once.

  Attributes:
    doubts: reasons to doubt robust accuracies that were found on the way.
  """

  def __init__(self, model: Callable[[Any, jax.Array], jax.Array], config: Config):
    self.doubts: set[str] = set()
    self._model = model
    self._batch_size = config.test_batch_size
    self._right = jax.jit(
      lambda params, part: jnp.argmax(model(params, as_floats(part.images)), axis=-1) == part.labels
    )
    epsilon = config.largest_change()
    self._attacks = {
      PGD: jaxbo.pgd(model, epsilon=epsilon, step_size=epsilon / 4, num_steps=config.test_steps),
      APGD_CE: jaxbo.apgd(model, epsilon=epsilon, num_steps=config.worst_steps),
      APGD_T: jaxbo.apgd(
        model,
        epsilon=epsilon,
        num_steps=config.worst_steps,
        objective="targeted_dlr",
        num_targets=config.num_targets,
      ),
    }

  def accuracy(self, params: Any, part: Images) -> float:
    """The percentage of clean images that are named correctly."""
    return 100 * float(np.mean(self._right(params, part)))

  def of_test(self, params: Any, part: Images, names: Sequence[str]) -> Row:
    """Accuracies in percent: clean, under PGD, in the worst case, of its tail, and of each class.

    Tail and classes are those of the worst case over attacks.
    """
    batch = np.asarray(part.images, np.float32) / 255, np.asarray(part.labels)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", UserWarning)
      found = jaxbo.evaluate_robustness(
        self._model, params, batch, 0, self._attacks, batch_size=self._batch_size
      )
    self.doubts.update(found.warnings)
    classes = 100 * found.class_accuracies()
    percent = {name: 100 * value for name, value in found.accuracies().items()}
    return {
      "clean": percent["clean"],
      "pgd": percent[PGD],
      "worst": percent["worst_case"],
      "tail": 100 * found.tail_accuracy(),
      "worst_class": float(classes.min()),
      "tail_pgd": 100 * jaxbo.tail_accuracy(found.correct[PGD], batch[1], len(names)),
      **{f"robust/{name}": float(value) for name, value in zip(names, classes, strict=True)},
    }
