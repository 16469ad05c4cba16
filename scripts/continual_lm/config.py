"""What continual language-model training is of: its arguments, and what must hold for them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax

from scripts.continual_lm.data import CORRUPTIONS
from scripts.continual_lm.documents import DATASETS
from scripts.continual_lm.methods import METHODS, Rates

INITS = ("scratch", "hf")


@dataclasses.dataclass(frozen=True)
class Config:
  """Continual pre-training: light training on by reweighted losses, from one checkpoint."""

  dataset: str = "python"
  """python (text that ships with Python), or text_domains or tiny_shakespeare (TFDS)."""
  init: str = "scratch"
  """scratch: a small model is trained first; hf: weights of GPT-2, OPT or Pythia in model_dir."""
  model_dir: Path | None = None
  """A folder with config.json, *.safetensors and the tokenizer's files, for hf."""
  methods: tuple[str, ...] = tuple(METHODS)
  """Which reweightings."""
  corruptions: tuple[float, ...] = (0.0, 0.2)
  """Shares of noise among the sequences of the continual phase, each in [0, 1)."""
  corruption_kind: str = "shuffled"
  """shuffled (the tokens of a sequence, in random order) or random (tokens)."""
  seeds: int = 3
  """How many seeds; each draws initial parameters, noise and batches, the same for all methods."""
  first_seed: int = 0
  """The first of them."""
  batch_size: int = 32
  """Sequences of a batch, over all devices. It decides how robust KL weights are."""
  length: int | None = None
  """Tokens of a sequence, instead of 64 (512 for hf)."""
  pretrain_steps: int = 500
  """Steps of the first phase, for scratch."""
  steps: int = 60
  """Steps of the continual phase."""
  eval_every: int = 20
  """Steps between evaluations, with a checkpoint after each."""
  pretrain_learning_rate: float = 3e-3
  """The highest of the first phase."""
  learning_rate: float | None = None
  """Of the continual phase, instead of 3e-4, where the first ends (2e-6 for hf, as published)."""
  num_layers: int = 2
  """Layers of the model, for scratch."""
  width: int = 64
  """Its width."""
  num_heads: int = 4
  """Its heads."""
  validation_sequences: int = 32
  """Sequences for curves, of each domain at most."""
  test_sequences: int = 128
  """Sequences for the report, of each domain at most."""
  rates: Rates = dataclasses.field(default_factory=Rates)
  """What the reweightings take."""
  timing_rounds: int = 5
  """Rounds in which steps of all methods are timed in turns at the end; 0 for none."""
  resume: bool = False
  """Goes on from the checkpoints in output_dir; methods, corruptions and seeds may be others."""
  data_dir: Path | None = None
  """Where tensorflow-datasets has its files, instead of TFDS_DATA_DIR or ~/tensorflow_datasets."""
  output_dir: Path = Path("runs/continual_lm")
  """Where results and checkpoints go; all processes must see it."""
  distributed: bool = False
  """Whether this is one of several processes that find each other (Slurm, TPU pods, ...)."""
  coordinator_address: str | None = None
  """Host and port of process 0, with the next two, where processes cannot find each other."""
  num_processes: int | None = None
  """How many processes there are."""
  process_id: int | None = None
  """Which of them this is."""

  def check_processes(self) -> None:
    """Raises ``ValueError`` if processes cannot meet by what is said about them."""
    address, number, process = self.coordinator_address, self.num_processes, self.process_id
    if address is None and number is None and process is None:
      return
    if address is None or number is None or process is None:
      raise ValueError("coordinator_address, num_processes and process_id must be given together")
    if not 0 <= process < number:
      raise ValueError(
        f"process_id must be at least 0 and below num_processes = {number}, got {process}"
      )

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run; it counts devices, so processes have met."""
    for name, allowed in (
      ("dataset", DATASETS),
      ("init", INITS),
      ("corruption_kind", CORRUPTIONS),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
    if not self.methods or not set(self.methods) <= set(METHODS):
      got = " ".join(self.methods) or "none"
      raise ValueError(f"methods must be among {', '.join(METHODS)}; got {got}")
    for name in ("methods", "corruptions"):
      values = getattr(self, name)
      if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must name each one once, got {' '.join(map(str, values))}")
    if not all(0 <= share < 1 for share in self.corruptions):
      raise ValueError(f"corruptions must be in [0, 1), got {self.corruptions}")
    if (self.init == "hf") != (self.model_dir is not None):
      raise ValueError(f"model_dir must be given with init=hf and only then, got {self.model_dir}")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      may_be_zero = field.name in ("first_seed", "timing_rounds", "process_id")
      if number and not (0 < value < math.inf or (value == 0 and may_be_zero)):  # NaN neither.
        finite = " and finite" if isinstance(value, float) else ""
        allowed = "at least 0" if may_be_zero else f"positive{finite}"
        raise ValueError(f"{field.name} must be {allowed}, got {value}")
    for method in self.methods:
      METHODS[method].weighting(self.rates, 1)
    if self.pretrain_steps < 2:
      raise ValueError(f"pretrain_steps must be at least 2, got {self.pretrain_steps}")
    if self.batch_size % jax.device_count():
      raise ValueError(
        f"batch_size must be a multiple of the number of devices, {jax.device_count()}, got "
        f"{self.batch_size}"
      )

  def sequence_length(self) -> int:
    """Tokens of a sequence."""
    return self.length or {"scratch": 64, "hf": 512}[self.init]

  def continual_learning_rate(self) -> float:
    """The learning rate of the continual phase."""
    return self.learning_rate or {"scratch": 3e-4, "hf": 2e-6}[self.init]

  def all_seeds(self) -> range:
    """The seeds."""
    return range(self.first_seed, self.first_seed + self.seeds)

  def identity(self) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it continues, as JSON has it."""
    left_out = (
      "methods", "corruptions", "seeds", "first_seed", "timing_rounds", "resume", "data_dir",
      "output_dir", "distributed", "coordinator_address", "num_processes", "process_id",
    )  # fmt: skip
    values = dataclasses.asdict(self)
    kept = {name: value for name, value in values.items() if name not in left_out}
    return json.loads(json.dumps(kept, default=str))
