"""The arguments, sizes, streams, model and rates of the online meta-learning experiments."""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

import jaxbo.tasks
from scripts.common.config import FREE, Among, Count, NonNegative, Positive, Several
from scripts.online_meta import data
from scripts.online_meta.data import Domains
from scripts.online_meta.methods import METHODS, Choices, Rates
from scripts.online_meta.model import Model, conv4, stripes


class Config(Choices):
  """Online meta-learning without task boundaries: LEEDS, C-MAML and others on OSAKA's streams."""

  smallest: ClassVar = {
    "dataset": "glyphs", "methods": ("fine_tuning", "leeds"), "stay_probabilities": (0.7,),
    "seeds": 1, "rounds": 10, "tune_rounds": 10, "num_ways": 3, "num_shots": 2,
    "network": "stripes", "images_per_class": 6, "pretrain_epochs": 1,
  }  # fmt: skip

  dataset: Annotated[str, Among(data.READERS)] = "omniglot"
  """Omniglot (then MNIST and Fashion-MNIST, prepared by tensorflow-datasets), or glyphs drawn on
  the spot."""
  methods: Annotated[tuple[str, ...], Among(METHODS), FREE] = tuple(METHODS)
  """Which methods to run."""
  stay_probabilities: Several[float] = (0.9, 0.98)
  """The probabilities p that a task stays; each gives one stream. Thresholds are calibrated on
  streams with all of them."""
  rounds: Annotated[int, Field(ge=2)] = 200
  """Rounds of a stream; the published protocol has 10,000."""
  seeds: Count = 3
  """How many seeds; each pre-trains a model and draws a stream."""
  seeds_at_once: Count = 1
  """How many seeds run side by side (vmap). More is faster on a GPU, but every round then computes
  meta-gradients."""
  domain_probabilities: tuple[float, ...] = (0.5, 0.25, 0.25)
  """The probabilities of the three domains."""
  domain_switch_probability: NonNegative | None = None
  """The probability that a task switch draws the domain anew (the rule of DynamicCML); by default
  every switch does."""
  size: Annotated[int, Field(ge=16, le=28)] = 16
  """Height and width of the images; 28 in the published protocol."""
  network: Annotated[str, Among(("conv4", "stripes"))] = "conv4"
  """The network to train. Stripes is a toy model that compiles fast; its accuracy means little."""
  width: Count = 16
  """Channels of Conv4; 64 in the published protocol."""
  images_per_class: Count = 800
  """Images of each class of MNIST and of Fashion-MNIST."""
  pretrain_tasks: Count = 2
  """Pre-training: tasks in a meta-step."""
  pretrain_epochs: Count = 12
  """Pre-training: the largest number of epochs, of 50 meta-steps each."""
  pretrain_patience: Count = 4
  """Pre-training: stops after so many epochs without a better accuracy on validation classes."""
  pretrain_inner_rate: Positive = 0.2
  """Pre-training: the learning rate of the inner steps."""
  pretrain_rate: Positive = 3e-3
  """Pre-training: the learning rate of Adam."""
  in_distribution_scale: NonNegative | None = None
  """LEEDS: the scale after a switch in distribution, instead of the one that --tune chose."""
  sweep: Annotated[bool, FREE] = True
  """Whether to run LEEDS with other thresholds too, on the first seed."""
  validation: bool = False
  """Plays streams of validation images instead of test images, to try choices."""
  tune_rounds: Count = 150
  """Rounds of the validation streams on which rates are chosen."""
  output_dir: Annotated[Path, FREE] = Path("runs/online_meta")
  """Where results go."""

  @model_validator(mode="after")
  def _together(self) -> Self:
    if self.seeds % self.seeds_at_once:
      raise ValueError(
        f"seeds must be a multiple of seeds_at_once={self.seeds_at_once}, got {self.seeds}"
      )
    return self

  def name(self) -> str:
    """The name of the table of rates."""
    tasks = f"{self.num_ways}way{self.num_shots}shot"
    return f"{self.dataset}/{tasks}/{self.size}px/width{self.width}/steps{self.inner_steps}"

  def groups(self) -> list[np.ndarray]:
    """The seeds, by those that run side by side."""
    return np.split(np.array(self.all_seeds()), self.seeds // self.seeds_at_once)

  def model(self, begins: str = "maml") -> Model:
    """The classifier of methods that begin so; after ANIL they adapt the head."""
    adapt = "head" if begins == "anil" else "all"
    if self.network == "conv4":
      return conv4(self.width, self.size, self.num_ways, adapt)
    return stripes(self.size, self.num_ways, adapt)

  def stream(
    self, domains: tuple[Any, ...], stay_probability: float, in_distribution: bool = False
  ) -> jaxbo.tasks.Stream:
    """The stream on arrays of images; ``in_distribution`` keeps it in the first domain."""
    return jaxbo.tasks.osaka_stream(
      domains,
      num_ways=self.num_ways,
      num_shots=self.num_shots,
      num_queries=self.num_shots if self.query == "given" else 0,
      stay_probability=stay_probability,
      domain_probabilities=(1.0, 0.0, 0.0) if in_distribution else self.domain_probabilities,
      domain_switch_probability=self.domain_switch_probability,
    )

  def rates_of(self, method: str) -> Rates:
    """The rates of a method; thresholds are NaN where each run calibrates its own.

    Raises:
      ValueError: if none were chosen, or one is NaN.
    """
    name, tables = self.name(), self.rates_tables()
    if self.smoke and name not in tables:  # Its numbers say nothing.
      name = min(tables, default=name)
    table = tables.get(name, {})
    if (source := method.removesuffix("_told")) not in table:
      raise ValueError(f"no rates were chosen for {source} on {name}: choose them with --tune")
    rates = Rates(**{field: float(value) for field, value in table[source].items()})
    found_later = METHODS[method].calibrates or not math.isnan(rates.level)
    needed = () if found_later else METHODS[method].thresholds
    for field in [*table[source], *needed]:
      if math.isnan(getattr(rates, field)):
        raise ValueError(f"{method}: {field} must be a number or an infinity, got nan")
    if source == "leeds" and self.in_distribution_scale is not None:
      rates = rates._replace(in_scale=self.in_distribution_scale)
    return rates


def read(config: Config) -> Domains:
  """The images.

  Raises:
    FileNotFoundError: if a data set is not there.
    ValueError: if tasks cannot be drawn from it.
  """
  domains = data.READERS[config.dataset](config.data_dir, config.size, config.images_per_class)
  for probability in config.stay_probabilities:
    for arrays in (domains.validation, domains.test):
      config.stream(arrays, probability)
  for classes in (domains.train, domains.early):
    enough = int(np.sum(classes.counts >= 2 * config.num_shots))
    if enough < config.num_ways:
      raise ValueError(
        f"num_ways must be at most {enough}, the characters with {2 * config.num_shots} drawings, "
        f"got {config.num_ways}"
      )
  return domains
