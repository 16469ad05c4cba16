"""What the online meta-learning experiments are of: arguments, sizes, streams, model."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

import jaxbo.tasks
from scripts.online_meta import data as meta_data
from scripts.online_meta import model as meta_model
from scripts.online_meta.data import Domains
from scripts.online_meta.methods import METHODS, Switches
from scripts.online_meta.model import Model, Pretraining

RATES_FILE = Path(__file__).with_name("rates.json")
CHOICES = {
  "dataset": tuple(meta_data.READERS),
  "query": ("same", "given", "next"),
  "switch_score": ("loss", "drop"),
  "shift_score": ("energy", "entropy", "max_softmax"),
  "shift_model": ("adapted", "meta", "initial"),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Online meta-learning without task boundaries: LEEDS, C-MAML and others on OSAKA's streams."""

  dataset: str = "omniglot"
  """omniglot (then MNIST and Fashion-MNIST, prepared by tensorflow-datasets), or glyphs."""
  methods: tuple[str, ...] = tuple(METHODS)
  """Which methods to run."""
  stay_probabilities: tuple[float, ...] = (0.9, 0.98)
  """The probability p that a task stays, one stream for each."""
  rounds: int = 200
  """Rounds of a stream; the published protocol has 10,000."""
  seeds: int = 3
  """How many seeds; each draws a stream, and the parameters of what was not trained before."""
  first_seed: int = 0
  """The first of them."""
  seeds_at_once: int = 1
  """Seeds side by side (vmap): faster on a GPU. Then meta-gradients are computed in all rounds."""
  num_ways: int = 10
  """Classes of a task."""
  num_shots: int = 5
  """Images of a class in a round."""
  domain_probabilities: tuple[float, ...] = (0.5, 0.25, 0.25)
  """Of the three domains."""
  domain_switch_probability: float | None = None
  """How often a task switch draws the domain anew (the rule of DynamicCML); always by default."""
  size: int = 16
  """Height and width of the images; 28 in the published protocol."""
  width: int = 16
  """Channels of Conv4; 64 in the published protocol."""
  images_per_class: int = 800
  """Digits and clothes of each class."""
  inner_steps: int = 3
  """Inner steps of a round, of all methods."""
  pretrain_tasks: int = 2
  """Tasks of a meta-step before the stream."""
  pretrain_epochs: int = 12
  """Epochs of 50 meta-steps before the stream, at most."""
  pretrain_patience: int = 4
  """Epochs without a better accuracy on validation classes after which that ends."""
  pretrain_inner_rate: float = 0.2
  """Learning rate of the inner steps in it."""
  pretrain_rate: float = 3e-3
  """Learning rate of Adam in it."""
  query: str = "same"
  """What judges the adapted model in a meta-update: same, the images that it was adapted to, so
  that all methods see the same; given, as many other ones; next, those of the next round (C-MAML
  always does that)."""
  first_order: bool = False
  """Drops the response in all methods."""
  bgd_samples: int = 2
  """Draws of BGD; 5 in the published code."""
  buffer_size: int = 101
  """Rounds that C-MAML's prolonged adaptation collects."""
  switch_score: str = "loss"
  """LEEDS: loss or drop."""
  shift_score: str = "energy"
  """LEEDS: energy, entropy or max_softmax."""
  shift_model: str = "adapted"
  """LEEDS: adapted, meta or initial."""
  no_switch_scale: float = 0.0
  """LEEDS: the scale of meta-updates in rounds without a switch."""
  in_distribution_scale: float | None = None
  """LEEDS: the scale after a switch in distribution, instead of the chosen one."""
  sweep: bool = True
  """Whether to run LEEDS with other thresholds too, on the first seed."""
  validation: bool = False
  """Plays streams of the validation images instead of those that are reported, to try choices."""
  tune: bool = False
  """Chooses rates on validation streams and writes them to rates_file; no report."""
  tune_rounds: int = 150
  """Rounds of these streams."""
  rates_file: Path = RATES_FILE
  """Where the chosen rates are."""
  resume: bool = False
  """Goes on with the runs that are not yet in output_dir; the other arguments must be the same."""
  data_dir: Path | None = None
  """Where tensorflow-datasets has its files, instead of TFDS_DATA_DIR or ~/tensorflow_datasets."""
  output_dir: Path = Path("runs/online_meta")
  """Where results go."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run."""
    for name, allowed in CHOICES.items():
      value = getattr(self, name)
      if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if not self.methods or not set(self.methods) <= set(METHODS):
      got = " ".join(self.methods) or "none"
      raise ValueError(f"methods must be among {', '.join(METHODS)}; got {got}")
    for name in ("methods", "stay_probabilities"):
      values = getattr(self, name)
      if len(set(values)) < len(values):
        raise ValueError(f"{name} must name each one once, got {' '.join(map(str, values))}")
    if not self.stay_probabilities:
      raise ValueError("stay_probabilities must have at least one number, got none")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      may_be_zero = field.name in (
        "first_seed", "no_switch_scale", "in_distribution_scale", "domain_switch_probability"
      )  # fmt: skip
      if number and not (math.isfinite(value) and (value >= 0 if may_be_zero else value > 0)):
        allowed = "non-negative" if may_be_zero else "positive"
        raise ValueError(f"{field.name} must be {allowed} and finite, got {value}")
    if not 16 <= self.size <= 28:
      raise ValueError(f"size must be in [16, 28], got {self.size}")
    if self.seeds % self.seeds_at_once:
      raise ValueError(
        f"seeds must be a multiple of seeds_at_once={self.seeds_at_once}, got {self.seeds}"
      )
    if self.rounds < 2:
      raise ValueError(f"rounds must be at least 2, got {self.rounds}")

  def identity(self) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it continues."""
    left_out = (
      "methods",
      "stay_probabilities",
      "sweep",
      "tune",
      "resume",
      "data_dir",
      "output_dir",
    )
    values = dataclasses.asdict(self) | {"rates_file": str(self.rates_file)}
    return {name: value for name, value in values.items() if name not in left_out}

  def name(self) -> str:
    """The name of the table of rates."""
    tasks = f"{self.num_ways}way{self.num_shots}shot"
    return f"{self.dataset}/{tasks}/{self.size}px/width{self.width}/steps{self.inner_steps}"

  def groups(self) -> list[np.ndarray]:
    """The seeds, by those that run side by side."""
    seeds = np.arange(self.first_seed, self.first_seed + self.seeds)
    return np.split(seeds, self.seeds // self.seeds_at_once)

  def model(self, adapt: str = "all") -> Model:
    """The classifier."""
    return meta_model.conv4(self.width, self.size, self.num_ways, adapt)

  def switches(self) -> Switches:
    """The choices that hold for a whole run."""
    mine = {name: getattr(self, name) for name in Switches._fields if hasattr(self, name)}
    return Switches(**mine, num_examples=self.num_ways * self.num_shots)

  def pretraining(self) -> Pretraining:
    """How to train before the stream."""
    return Pretraining(
      num_ways=self.num_ways,
      num_shots=self.num_shots,
      num_queries=self.num_shots,
      num_tasks=self.pretrain_tasks,
      inner_steps=self.inner_steps,
      inner_learning_rate=self.pretrain_inner_rate,
      learning_rate=self.pretrain_rate,
      steps_per_epoch=50,
      max_epochs=self.pretrain_epochs,
      patience=self.pretrain_patience,
    )

  def stream(self, domains: tuple[Any, ...], stay_probability: float) -> jaxbo.tasks.TaskStream:
    """The stream on arrays of images."""
    return jaxbo.tasks.osaka_stream(
      domains,
      num_ways=self.num_ways,
      num_shots=self.num_shots,
      num_queries=self.num_shots if self.query == "given" else 0,
      stay_probability=stay_probability,
      domain_probabilities=self.domain_probabilities,
      domain_switch_probability=self.domain_switch_probability,
    )


def read(config: Config) -> Domains:
  """The images.

  Raises:
    FileNotFoundError: if a data set is not there.
    ValueError: if tasks cannot be drawn from it.
  """
  domains = meta_data.READERS[config.dataset](config.data_dir, config.size, config.images_per_class)
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
