"""What the online experiments are of: arguments, data, pools of examples, problems and rates."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.common import data
from scripts.common.data import Examples
from scripts.online_hyperopt import problems as online_problems
from scripts.online_hyperopt import streams as online_streams
from scripts.online_hyperopt import tuning as online_tuning
from scripts.online_hyperopt.methods import METHODS, Rates
from scripts.online_hyperopt.problems import Problem
from scripts.online_hyperopt.streams import Pools

RATES_FILE = Path(__file__).with_name("rates.json")
NUM_EVALUATIONS = 20
PUBLISHED_WINDOW = 5
STREAMS = {
  "loss_tuning": online_streams.IMBALANCED,
  "ridge": online_streams.NOISY,
  "representation": online_streams.SHIFTING,
}


class Sizes(NamedTuple):
  """How many examples of each class the inner and the outer losses are drawn from."""

  train: int
  val: int


DATASETS = {"digits": Sizes(100, 40), "mnist": Sizes(4000, 1000), "newsgroups": Sizes(170, 55)}


@dataclasses.dataclass(frozen=True)
class Config:
  """Online hyperparameter optimization: SOBOW and OAGD on streams that change."""

  problem: str = "loss_tuning"
  """loss_tuning, ridge or representation."""
  dataset: str = "digits"
  """digits (in scikit-learn's wheel), mnist or newsgroups (prepared by tensorflow-datasets)."""
  streams: tuple[str, ...] | None = None
  """Which streams, instead of all: gradual, zigzag, static; static, staged, dynamic elsewhere."""
  methods: tuple[str, ...] | None = None
  """Which methods, instead of all: ogd, sobow, ogd_replay, oagd; loss_tuning has
  ogd_published, ogd_replay_published and oagd_published too."""
  windows: tuple[int, ...] = (1, 5)
  """Windows K of those methods that have one; the published ones have 5."""
  model: str | None = None
  """linear, mlp or conv4; linear by default, mlp for representation."""
  width: int | None = None
  """Units of mlp or channels of conv4, instead of 64."""
  log_ridge: float = -4.0
  """Where the logarithms of the ridge begin, in [-7, -2]."""
  rounds: int = 400
  """Rounds of a stream, a multiple of 20."""
  batch_size: int = 64
  """Examples of a batch, inside and outside."""
  seeds: int = 5
  """How many seeds; each draws the split of the digits, the stream and the initial parameters."""
  first_seed: int = 0
  """The first of them."""
  tune: bool = False
  """Chooses learning rates on the seeds 100 to 102 and writes them to rates_file; no report."""
  rates_file: Path = RATES_FILE
  """Where the chosen learning rates are."""
  inner_learning_rate: float | None = None
  """Instead of the chosen ones, for all methods that are not published; with the next one."""
  outer_learning_rate: float | None = None
  """See inner_learning_rate."""
  damping: float = 0.0
  """Damping of conjugate gradient, with the learning rates above."""
  data_dir: Path | None = None
  """Where tensorflow-datasets has its files, instead of TFDS_DATA_DIR or ~/tensorflow_datasets."""
  output_dir: Path = Path("runs/online_hyperopt")
  """Where results go. Files of an earlier run there are replaced."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run."""
    for name, allowed in (("problem", STREAMS), ("dataset", DATASETS)):
      value = getattr(self, name)
      if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    lists = (
      ("streams", self.stream_names(), STREAMS[self.problem]),
      ("methods", self.method_names(), self.allowed_methods()),
    )
    for name, values, allowed in lists:
      if not values or not set(values) <= set(allowed):
        got = " ".join(values) or "none"
        raise ValueError(f"{name} must be among {', '.join(allowed)}; got {got}")
    for name, values in (*(pair[:2] for pair in lists), ("windows", self.windows)):
      if len(set(values)) < len(values):
        raise ValueError(f"{name} must name each one once, got {' '.join(map(str, values))}")
    if not self.windows or min(self.windows) < 1:
      raise ValueError(f"windows must be at least 1 each, got {self.windows}")
    if self.rounds < NUM_EVALUATIONS or self.rounds % NUM_EVALUATIONS:
      raise ValueError(f"rounds must be a multiple of {NUM_EVALUATIONS}, got {self.rounds}")
    for name in ("width", "batch_size", "seeds"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if self.tune and self.grid_name() not in online_tuning.GRIDS:
      raise ValueError(
        f"tune must be of one of {', '.join(online_tuning.GRIDS)}; got {self.grid_name()}"
      )
    if self.first_seed < 0:
      raise ValueError(f"first_seed must not be negative, got {self.first_seed}")
    given = (self.inner_learning_rate, self.outer_learning_rate)
    if (given[0] is None) != (given[1] is None):
      raise ValueError(
        f"inner_learning_rate and outer_learning_rate must be given together, got {given}"
      )
    for name in ("inner_learning_rate", "outer_learning_rate"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    if not self.damping >= 0:
      raise ValueError(f"damping must not be negative, got {self.damping}")
    if self.problem == "ridge" and self.model_name() != "linear":
      raise ValueError(f"model must be linear for ridge, got {self.model!r}")
    if self.problem == "representation" and self.model_name() == "linear":
      raise ValueError("model must be mlp or conv4 for representation, got 'linear'")

  def allowed_methods(self) -> list[str]:
    """The methods that the problem has."""
    published = self.problem == "loss_tuning"
    return [name for name, method in METHODS.items() if published or not method.published]

  def method_names(self) -> tuple[str, ...]:
    """The methods to run."""
    return tuple(self.allowed_methods()) if self.methods is None else self.methods

  def stream_names(self) -> tuple[str, ...]:
    """The streams to run."""
    return tuple(STREAMS[self.problem]) if self.streams is None else self.streams

  def model_name(self) -> str:
    """The model to train."""
    return self.model or ("mlp" if self.problem == "representation" else "linear")

  def name(self) -> str:
    """The name of the table of learning rates."""
    return f"{self.problem}/{self.dataset}/{self.model_name()}"

  def grid_name(self) -> str:
    """The name of the grid of learning rates."""
    return f"{self.problem}/{self.dataset}"

  def variants(self) -> list["Variant"]:
    """The methods with their windows, without those that a window of 1 makes equal to others."""
    variants = []
    for name in self.method_names():
      method = METHODS[name]
      windows = self.windows if method.windowed else (1,)
      if method.published and method.windowed:
        windows = (PUBLISHED_WINDOW,)
      variants += [Variant(name, k) for k in windows if not method.inner_per_window or k > 1]
    return variants


class Variant(NamedTuple):
  """A method with a window."""

  method: str
  window: int

  @property
  def label(self) -> str:
    """Its name in tables."""
    method = METHODS[self.method]
    return f"{method.label}, K={self.window}" if method.windowed else method.label


def read(config: Config) -> tuple[Examples, np.ndarray | None]:
  """All examples, and the rows of an official test set if there is one."""
  if config.dataset == "digits":
    examples, test = data.digits(), None
  elif config.dataset == "newsgroups":
    examples, num_train = data.newsgroups(config.data_dir)
    test = np.arange(num_train, len(examples.labels))
  else:
    train = data.tfds_images("mnist", "train", config.data_dir)
    fresh = data.tfds_images("mnist", "test[:1000]", config.data_dir)  # as the published code
    test = len(train.labels) + np.arange(1000)
    examples = Examples(*(np.concatenate(pair) for pair in zip(train, fresh, strict=True)))
  if config.problem == "ridge":  # Rows of unit norm bound the curvature of the inner loss.
    norms = np.linalg.norm(examples.images, axis=1, keepdims=True)
    return examples._replace(images=examples.images / np.maximum(norms, 1e-6)), test
  if config.dataset == "mnist":  # As the published code normalises it.
    return examples._replace(images=(examples.images - 0.1307) / 0.3081), test
  return examples, test


def pools_of(config: Config, examples: Examples, test: np.ndarray | None, seed: int) -> Pools:
  """The rows of a seed. MNIST keeps its order, as in the published code."""
  shuffle = None if config.dataset == "mnist" else seed
  return online_streams.split_by_class(examples, *DATASETS[config.dataset], shuffle, test)


def make_problem(config: Config, examples: Examples) -> Problem:
  """The problem on these examples."""
  num_inputs, num_classes = examples.images.shape[1], int(examples.labels.max()) + 1
  if config.problem == "ridge":
    exact = num_inputs * num_classes <= 1000  # Else the true hypergradient would take hours.
    return online_problems.feature_ridge(num_inputs, num_classes, config.log_ridge, exact=exact)
  features = online_problems.make_features(config.model_name(), num_inputs, config.width or 64)
  if config.problem == "representation":
    return online_problems.representation(features, num_classes, ridge=0.01)
  return online_problems.loss_tuning(features, num_classes)


def rates_of(config: Config, variant: Variant) -> Rates:
  """The learning rates of a method."""
  if METHODS[variant.method].published:
    return Rates(math.nan, math.nan, math.nan)
  if config.inner_learning_rate is not None and config.outer_learning_rate is not None:
    return Rates(config.inner_learning_rate, config.outer_learning_rate, config.damping)
  tables = online_tuning.read(config.rates_file)
  return online_tuning.look_up(tables, config.name(), variant.method, variant.window)
