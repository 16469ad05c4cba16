"""What the online experiments are of: arguments, data, pools of examples, problems and rates."""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from scripts.common import data
from scripts.common.config import FREE, Among, Count, NonNegative, Positive, Several
from scripts.common.data import Examples
from scripts.common.tuning import TunedConfig
from scripts.online_hyperopt import problems, streams
from scripts.online_hyperopt.methods import METHODS, Rates, Variant
from scripts.online_hyperopt.problems import RIDGE_BOX, Problem
from scripts.online_hyperopt.streams import Pools

NUM_EVALUATIONS = 20
STREAMS = {
  "loss_tuning": streams.IMBALANCED,
  "ridge": streams.NOISY,
  "representation": streams.SHIFTING,
}
MODELS = {  # The first is the default.
  "loss_tuning": ("linear", "mlp", "conv4"),
  "ridge": ("linear",),
  "representation": ("mlp", "conv4"),
}
STREAM_NAMES = tuple(dict.fromkeys(name for kinds in STREAMS.values() for name in kinds))
DATASETS = {  # examples of each class that the inner and the outer losses are drawn from
  "digits": (100, 40),
  "mnist": (4000, 1000),
  "newsgroups": (170, 55),
}


class Config(TunedConfig):
  """Online hyperparameter optimization: SOBOW and OAGD on streams that change."""

  smallest: ClassVar = {
    "streams": ("static",), "methods": ("ogd", "sobow", "oagd"), "windows": (5,), "rounds": 20,
    "batch_size": 16, "seeds": 2,
  }  # fmt: skip

  problem: Annotated[str, Among(STREAMS)] = "loss_tuning"
  """What is learnt online."""
  dataset: Annotated[str, Among(DATASETS)] = "digits"
  """Digits are in scikit-learn's wheel; the others are prepared by tensorflow-datasets."""
  streams: Annotated[tuple[str, ...] | None, Among(STREAM_NAMES)] = None
  """Which streams, instead of all: gradual, zigzag, static; static, staged, dynamic elsewhere."""
  methods: Annotated[tuple[str, ...] | None, Among(METHODS), FREE] = None
  """Which methods, instead of all; the published ones are for loss_tuning alone."""
  windows: Several[Count] = (1, 5)
  """Windows K of those methods that have one; the published ones have 5."""
  model: Annotated[str | None, Among(MODELS["loss_tuning"])] = None
  """By default linear, mlp for representation."""
  width: Count | None = None
  """Units of mlp or channels of conv4, instead of 64."""
  log_ridge: Annotated[float, Field(ge=RIDGE_BOX[0], le=RIDGE_BOX[1])] = -4.0
  """Where the logarithms of the ridge begin, in [-7, -2]."""
  rounds: Annotated[int, Field(ge=NUM_EVALUATIONS, multiple_of=NUM_EVALUATIONS)] = 400
  """Rounds of a stream, a multiple of 20."""
  batch_size: Count = 64
  """Examples of a batch, inside and outside."""
  seeds: Count = 5
  """How many seeds; each draws the split of the digits, the stream and the initial parameters."""
  inner_learning_rate: Positive | None = None
  """Instead of the chosen ones, for all methods that are not published; with the next one."""
  outer_learning_rate: Positive | None = None
  """See inner_learning_rate."""
  damping: NonNegative = 0.0
  """Damping of conjugate gradient, with the learning rates above."""
  output_dir: Annotated[Path, FREE] = Path("runs/online_hyperopt")
  """Where results go."""

  @model_validator(mode="after")
  def _together(self) -> Self:
    for name, values, allowed in (
      ("streams", self.stream_names(), STREAMS[self.problem]),
      ("methods", self.method_names(), self._methods_of_problem()),
      ("model", [self.model_name()], MODELS[self.problem]),
    ):
      if not set(values) <= set(allowed):
        raise ValueError(
          f"{name} of {self.problem} must be among {', '.join(allowed)}; got {' '.join(values)}"
        )
    given = (self.inner_learning_rate, self.outer_learning_rate)
    if given.count(None) == 1:
      raise ValueError(
        f"inner_learning_rate and outer_learning_rate must be given together, got {given}"
      )
    return self

  def identity(self) -> dict[str, Any]:
    """With the seeds, which run side by side in one program."""
    return super().identity() | {"seeds": self.seeds, "first_seed": self.first_seed}

  def _methods_of_problem(self) -> list[str]:
    published = self.problem == "loss_tuning"
    return [name for name, method in METHODS.items() if published or not method.published]

  def method_names(self) -> tuple[str, ...]:
    """The methods to run."""
    return tuple(self._methods_of_problem()) if self.methods is None else self.methods

  def stream_names(self) -> tuple[str, ...]:
    """The streams to run."""
    return tuple(STREAMS[self.problem]) if self.streams is None else self.streams

  def model_name(self) -> str:
    """The model to train."""
    return self.model or MODELS[self.problem][0]

  def name(self) -> str:
    """The name of the table of learning rates."""
    return f"{self.problem}/{self.dataset}/{self.model_name()}"

  def variants(self) -> list[Variant]:
    """The methods with their windows, without those that a window of 1 makes equal to others."""
    variants = []
    for name in self.method_names():
      method = METHODS[name]
      windows = (method.window,) if method.window else self.windows
      variants += [Variant(name, k) for k in windows if not method.inner_per_window or k > 1]
    return variants

  def rates_of(self, variant: Variant) -> Rates:
    """The learning rates of a method: of the largest window that was tuned up to this one.

    Raises:
      ValueError: if none were chosen.
    """
    if METHODS[variant.method].published:
      return Rates(math.nan, math.nan, math.nan)
    if self.inner_learning_rate is not None and self.outer_learning_rate is not None:
      return Rates(self.inner_learning_rate, self.outer_learning_rate, self.damping)
    windows = self.rates_tables().get(self.name(), {}).get(variant.method)
    if not windows:
      raise ValueError(
        f"no learning rates were chosen for {variant.method} on {self.name()}: choose them with "
        "--tune, or give inner_learning_rate and outer_learning_rate"
      )
    sizes = sorted(map(int, windows))
    size = max((size for size in sizes if size <= variant.window), default=sizes[0])
    return Rates(*windows[str(size)])


class Data(NamedTuple):
  """What a run is on: all examples, the rows of an official test set, and the problem on them."""

  examples: Examples
  test: np.ndarray | None
  problem: Problem


def read(config: Config) -> Data:
  """Reads the examples and checks that the smallest class has enough of them."""
  if config.dataset == "digits":
    examples, test = data.digits(), None
  elif config.dataset == "newsgroups":
    examples, num_train = data.newsgroups(config.data_dir)
    test = np.arange(num_train, len(examples.labels))
  else:
    train = data.tfds_images("mnist", "train", config.data_dir)
    fresh = data.tfds_images("mnist", "test[:1000]", config.data_dir)  # as the published code
    test = len(train.labels) + np.arange(1000)
    examples = Examples(*map(np.concatenate, zip(train, fresh, strict=True)))
  if config.problem == "ridge":  # Rows of unit norm bound the curvature of the inner loss.
    norms = np.linalg.norm(examples.images, axis=1, keepdims=True)
    examples = examples._replace(images=examples.images / np.maximum(norms, 1e-6))
  elif config.dataset == "mnist":  # As the published code normalises it.
    examples = examples._replace(images=(examples.images - 0.1307) / 0.3081)
  found = Data(examples, test, make_problem(config, examples))
  pools_of(config, found, config.first_seed)
  return found


def pools_of(config: Config, data: Data, seed: int) -> Pools:
  """The rows of a seed. MNIST keeps its order, as in the published code."""
  shuffle = None if config.dataset == "mnist" else seed
  return streams.split_by_class(data.examples, *DATASETS[config.dataset], shuffle, data.test)


def make_problem(config: Config, examples: Examples) -> Problem:
  """The problem on these examples."""
  num_inputs, num_classes = examples.images.shape[1], int(examples.labels.max()) + 1
  if config.problem == "ridge":
    exact = num_inputs * num_classes <= 1000  # Else the true hypergradient would take hours.
    return problems.feature_ridge(num_inputs, num_classes, config.log_ridge, exact=exact)
  features = problems.make_features(config.model_name(), num_inputs, config.width or 64)
  if config.problem == "representation":
    return problems.representation(features, num_classes, ridge=0.01)
  return problems.loss_tuning(features, num_classes)
