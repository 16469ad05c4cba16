"""The arguments of adversarial training, and what must hold for them."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

import optax
from pydantic import Field, model_validator

from scripts.adversarial_training.data import BALANCED, DATASETS, LONG_TAILED, SETS
from scripts.adversarial_training.methods import METHODS, Part, Rates
from scripts.common.config import FREE, GROWS, Among, Count, Index, NonNegative, Positive
from scripts.common.devices import DistributedConfig
from scripts.common.tuning import TunedConfig

EPSILONS = {"mnist": 0.1, "fashion_mnist": 0.05, "cifar10": 8 / 255, "cifar10_subset": 8 / 255}
COLOUR = ("cifar10", "cifar10_subset")


class Config(DistributedConfig, TunedConfig):
  """Adversarial training: ten methods, balanced and imbalanced, at the same budget.

  A seed draws images, parameters, batches and attacks, the same for all methods.
  """

  smallest: ClassVar = {
    "sets": (LONG_TAILED,), "methods": ("at", "at_kl"), "seeds": 1, "epochs": 2, "largest": 300,
    "ratio": 10.0, "test_per_class": 20, "validation_per_class": 20,
  }  # fmt: skip

  dataset: Annotated[str, Among(DATASETS)] = "mnist"
  """The data set, prepared by tensorflow-datasets."""
  sets: Annotated[tuple[str, ...], Among(SETS), FREE] = (BALANCED, LONG_TAILED)
  """Which training sets to run. In a step-imbalanced set, half of the classes are rare."""
  methods: Annotated[tuple[str, ...], Among(METHODS), FREE] = tuple(METHODS)
  """Which methods to run."""
  largest: Count = 1200
  """Images of the most frequent class of the long-tailed set, whose total the other sets share."""
  ratio: Annotated[float, Field(ge=1)] = 20.0
  """Images of the most frequent class divided by those of the rarest class."""
  epochs: Annotated[Count, GROWS] = 10
  """Passes over the training set; a resumed run may have more."""
  batch_size: Count = 64
  """Images in a batch, over all devices."""
  learning_rate: Positive = 2e-3
  """The peak learning rate: a schedule rises for a quarter of the steps, then falls to zero."""
  weight_decay: NonNegative = 1e-4
  """AdamW's weight decay; each step multiplies it by the learning rate."""
  widths: tuple[Count, Count] = (8, 16)
  """Channels of the network's convolutions."""
  num_hidden: Count = 64
  """Width of the network's dense layer."""
  epsilon: Annotated[float, Field(gt=0, le=1)] | None = None
  """The largest change of a pixel; by default 0.1 (mnist), 0.05 (fashion_mnist) or 8/255."""
  epsilon_rise: Part = 0.2
  """The share of training in which the largest change rises to epsilon. Without this rise, on the
  balanced MNIST set one seed of three learns nothing with AT, and two learn nothing with MART."""
  attack_steps: Count = 5
  """Steps of the attack in training (the papers' K)."""
  validation_per_class: Count = 100
  """Images of each class for curves and for --tune."""
  test_per_class: Count = 200
  """Images of each class for the report."""
  test_steps: Count = 20
  """Steps of PGD for the report."""
  worst_steps: Count = 10
  """Steps of each APGD and of FAB-T for the report."""
  num_targets: Count = 3
  """How many classes the targeted attacks aim at, one after the other."""
  num_queries: Index = 200
  """Queries of the Square attack for the report; 0 leaves this attack out."""
  test_batch_size: Count = 500
  """How many images are attacked at once for the report."""
  rates: Rates = Rates()
  """The hyperparameters of the methods, but for the rate of each that --tune has chosen."""
  output_dir: Annotated[Path, FREE] = Path("runs/adversarial_training")
  """Where results and checkpoints go."""

  @model_validator(mode="after")
  def _rarest_class_has_an_image(self) -> Self:
    if self.ratio > self.largest:
      raise ValueError(f"ratio must be in [1, {self.largest}], got {self.ratio}")
    return self

  def name(self) -> str:
    """The name of the table of rates."""
    return self.dataset

  def chosen(self, kind: str, method: str) -> Rates:
    """What a method takes on a training set."""
    return self.rates.but(**self.rates_tables().get(self.name(), {}).get(kind, {}).get(method, {}))

  def largest_change(self) -> float:
    """Epsilon."""
    return EPSILONS[self.dataset] if self.epsilon is None else self.epsilon

  def augment(self) -> bool:
    """Whether images are moved and mirrored: those in color."""
    return self.dataset in COLOUR

  def optimizer(self, num_steps: int) -> optax.GradientTransformation:
    """Adam, the same for all methods."""
    rise = max(num_steps // 4, 1)
    schedule = optax.join_schedules(
      [
        optax.linear_schedule(self.learning_rate / rise, self.learning_rate, rise),
        optax.linear_schedule(self.learning_rate, 0.0, max(num_steps - rise, 1)),
      ],
      [rise],
    )
    return optax.adamw(schedule, weight_decay=self.weight_decay)
