"""What the experiment is told, and the two parts of its data: one to tune on, one to report on."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import model_validator

from scripts.common import cleaning
from scripts.common.config import FREE, Among, Count, Index, Positive, Share
from scripts.common.tuning import TunedConfig
from scripts.multiple_minima.methods import BASELINES, COMPARED, DATASETS, METHODS
from scripts.multiple_minima.toys import TOYS

TUNED_ON = {"digits": 800, "mnist": 10_500}  # How many examples; the report is of the others.


class Config(TunedConfig):
  """Where the inner problem has many minima: all bilevel methods side by side."""

  smallest: ClassVar = {"methods": ("pdbo", "itd"), "toys": ("T1",), "seeds": 1, "budget": 60}

  dataset: Annotated[str, Among(DATASETS)] = "digits"
  """Of hyper-cleaning: digits are in scikit-learn's wheel, mnist is by tensorflow-datasets."""
  methods: Annotated[tuple[str, ...], Among(COMPARED), FREE] = COMPARED
  """Which methods to run; hyper-cleaning has its baselines too."""
  toys: Annotated[tuple[str, ...], Among(TOYS, least=0), FREE] = tuple(TOYS)
  """Which toys to run; none if nothing follows."""
  slacks: tuple[Positive, ...] = ()
  """Runs PDBO with each of these on hyper-cleaning, instead of all methods."""
  seeds: Index = 5
  """Seeds of hyper-cleaning: split, wrong labels and initial model; 0 leaves it out."""
  budget: Count = 1500
  """Gradients of the inner loss for each method."""
  corruption: Share = 0.5
  """The share of wrong training labels, in [0, 1)."""
  output_dir: Annotated[Path, FREE] = Path("runs/multiple_minima")
  """Where results go."""

  @model_validator(mode="after")
  def _something_to_run(self) -> Self:
    if not self.seeds and (self.tune or not self.toys):
      raise ValueError("seeds must be positive to tune, or without toys: nothing would be run")
    return self

  def name(self) -> str:
    """The name of the table of chosen settings."""
    return self.dataset

  def chosen(self) -> dict[str, dict[str, Any]]:
    """The settings chosen for each method on this data set."""
    return self.rates_tables().get(self.name(), {})

  def variants(self) -> dict[str, tuple[str, dict[str, Any]]]:
    """The rows of hyper-cleaning: each a method and its settings.

    Raises:
      ValueError: if none were chosen.
    """
    chosen, names = self.chosen(), ("pdbo",) if self.slacks else (*BASELINES, *self.methods)
    if missing := [name for name in names if METHODS[name].grid and name not in chosen]:
      raise ValueError(f"no settings were chosen for {', '.join(missing)}: choose them with --tune")
    if self.slacks:
      of = lambda slack: ("pdbo", chosen["pdbo"] | {"slack": slack})
      return {f"slack {slack:g}": of(slack) for slack in self.slacks}
    return {name: (name, chosen.get(name, {})) for name in names}


def read(config: Config) -> cleaning.Read | None:
  """The examples that are tuned on, or all others and the official test set if there is one.

  The two parts were drawn once, whatever the seed: nothing that a report is of, a training example
  as little as one of the test, has a say in the choice of settings.
  """
  if not config.seeds:
    return None
  examples, test = cleaning.read(config.dataset, config.data_dir)
  order = np.random.default_rng(0).permutation(len(examples.labels))
  tuned_on, others = np.split(order, [TUNED_ON[config.dataset]])
  if config.tune:
    return examples.take(tuned_on), None
  return examples.take(others), test
