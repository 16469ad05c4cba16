"""What adversarial training is of: its arguments, and what must hold for them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import optax
from jaxbo_models import SmallCNN

from scripts.adversarial_training.data import DATASETS, LONG_TAILED, SETS
from scripts.adversarial_training.methods import METHODS, Rates

EPSILONS = {"mnist": 0.1, "fashion_mnist": 0.05, "cifar10": 8 / 255, "cifar10_subset": 8 / 255}
COLOUR = ("cifar10", "cifar10_subset")


@dataclasses.dataclass(frozen=True)
class Config:
  """Adversarial training: ten methods, balanced and imbalanced, at the same budget."""

  dataset: str = "mnist"
  """mnist, fashion_mnist, cifar10 or cifar10_subset, as tensorflow-datasets has prepared it."""
  sets: tuple[str, ...] = ("balanced", LONG_TAILED)
  """Training sets: balanced, long_tailed or step (half of the classes are rare)."""
  methods: tuple[str, ...] = tuple(METHODS)
  """Which methods."""
  seeds: int = 3
  """How many; each draws images, parameters, batches and attacks, the same for all methods."""
  first_seed: int = 0
  """The first of them."""
  largest: int = 1200
  """Images of the most frequent class of the long-tailed set; other sets have as many in all."""
  ratio: float = 20.0
  """How many times as many images the most frequent class has as the rarest one."""
  epochs: int = 10
  """Passes over the training set."""
  batch_size: int = 64
  """Images of a batch, over all devices."""
  learning_rate: float = 2e-3
  """The highest of a schedule that rises for a quarter of the steps and then falls to zero."""
  weight_decay: float = 1e-4
  """Of the parameters, times the learning rate."""
  widths: tuple[int, int] = (8, 16)
  """Channels of the network's convolutions."""
  num_hidden: int = 64
  """Width of its dense layer."""
  epsilon: float | None = None
  """The largest change of a pixel; by default 0.1 (mnist), 0.05 (fashion_mnist) or 8/255."""
  epsilon_rise: float = 0.2
  """The share of training in which the largest change rises to epsilon. Without, one seed of three
  learns nothing on the balanced MNIST set by AT, and two by MART."""
  attack_steps: int = 5
  """Steps of the attack in training; K."""
  validation_per_class: int = 100
  """Images of each class for curves and for --tune."""
  test_per_class: int = 200
  """Images of each class for the report."""
  test_steps: int = 20
  """Steps of PGD for the report."""
  worst_steps: int = 10
  """Steps of each APGD for the report."""
  num_targets: int = 3
  """How many classes the targeted APGD aims at, one after the other."""
  test_batch_size: int = 500
  """Images that are attacked at once for the report."""
  rates: Rates = dataclasses.field(default_factory=Rates)
  """What the methods take."""
  tune: bool = False
  """Instead of the report: varies one rate at a time and prints what validation images say."""
  resume: bool = False
  """Goes on from the checkpoints in output_dir; methods, sets and seeds may be others."""
  data_dir: Path | None = None
  """Where tensorflow-datasets has its files, instead of TFDS_DATA_DIR or ~/tensorflow_datasets."""
  output_dir: Path = Path("runs/adversarial_training")
  """Where results and checkpoints go."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run."""
    if self.dataset not in DATASETS:
      raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {self.dataset!r}")
    for name, allowed in (("methods", METHODS), ("sets", SETS)):
      values = getattr(self, name)
      if not values or not set(values) <= set(allowed):
        got = " ".join(values) or "none"
        raise ValueError(f"{name} must be among {', '.join(allowed)}; got {got}")
      if len(set(values)) < len(values):
        raise ValueError(f"{name} must name each one once, got {' '.join(values)}")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      may_be_zero = field.name in ("first_seed", "weight_decay", "epsilon_rise")
      is_number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
      numbers = filter(is_number, value if isinstance(value, tuple) else (value,))
      if any(not (math.isfinite(x) and (x > 0 or (x == 0 and may_be_zero))) for x in numbers):
        allowed = "at least 0" if may_be_zero else "positive"
        raise ValueError(f"{field.name} must be {allowed}, got {value}")
    if self.largest_change() > 1:
      raise ValueError(f"epsilon must be at most 1, the range of pixels; got {self.epsilon}")
    if self.epsilon_rise > 1:
      raise ValueError(f"epsilon_rise must be at most 1, got {self.epsilon_rise}")
    if self.ratio < 1 or self.ratio > self.largest:
      raise ValueError(f"ratio must be in [1, {self.largest}], got {self.ratio}")
    if self.batch_size % jax.device_count():
      raise ValueError(
        f"batch_size must be a multiple of the number of devices, {jax.device_count()}, got "
        f"{self.batch_size}"
      )
    self.rates.check()
    if self.tune and self.resume:
      raise ValueError("resume must not be given with tune, which has no checkpoints")

  def largest_change(self) -> float:
    """Epsilon."""
    return EPSILONS[self.dataset] if self.epsilon is None else self.epsilon

  def augment(self) -> bool:
    """Whether images are moved and mirrored: those of things in colour."""
    return self.dataset in COLOUR

  def all_seeds(self) -> range:
    """The seeds."""
    return range(self.first_seed, self.first_seed + self.seeds)

  def make_model(self, num_classes: int) -> SmallCNN:
    """The network."""
    return SmallCNN(num_classes, self.widths, self.num_hidden)

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

  def identity(self) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it continues, as JSON has it."""
    left_out = (
      "sets", "methods", "seeds", "first_seed", "tune", "resume", "data_dir", "output_dir",
    )  # fmt: skip
    values = dataclasses.asdict(self)
    kept = {name: value for name, value in values.items() if name not in left_out}
    return json.loads(json.dumps(kept, default=str))
