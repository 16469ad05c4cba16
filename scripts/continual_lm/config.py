"""What continual language-model training can be told."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from scripts.common.config import FREE, Among, Count, Index, Positive, Several, Share
from scripts.common.devices import DistributedConfig
from scripts.continual_lm.data import CORRUPTIONS
from scripts.continual_lm.documents import DATASETS
from scripts.continual_lm.methods import METHODS, START, Rates


class Config(DistributedConfig):
  """Continued pre-training with reweighted losses, from one checkpoint."""

  smallest: ClassVar = {
    "seeds": 1, "methods": ("uniform", "ir_dro"), "batch_size": 8, "length": 32,
    "pretrain_steps": 20, "steps": 4, "eval_every": 2, "num_layers": 1, "width": 16,
    "validation_sequences": 8, "test_sequences": 16, "timing_rounds": 1,
  }  # fmt: skip

  dataset: Annotated[str, Among(DATASETS)] = "python"
  """Text that ships with Python, or data sets of tensorflow-datasets."""
  init: Annotated[str, Among(("scratch", "hf"))] = "scratch"
  """scratch: a small model is trained first; hf: weights of GPT-2, OPT or Pythia in model_dir."""
  model_dir: Path | None = None
  """A folder with config.json, *.safetensors and the tokenizer's files, for hf."""
  methods: Annotated[tuple[str, ...], Among(METHODS), FREE] = tuple(METHODS)
  """Which reweightings."""
  corruptions: Annotated[Several[Share], FREE] = (0.0, 0.2)
  """Shares of noise among the sequences of the continual phase, each in [0, 1). As methods and
  seeds, they may be others in a run that goes on."""
  corruption_kind: Annotated[str, Among(CORRUPTIONS)] = "shuffled"
  """The noise: the tokens of a sequence in random order, or random tokens."""
  batch_size: Count = 32
  """Sequences of a batch, over all devices. It decides how robust KL weights are."""
  length: Count | None = None
  """Tokens of a sequence, instead of 64 (512 for hf)."""
  pretrain_steps: Annotated[int, Field(ge=2)] = 500
  """Steps of the first phase, for scratch."""
  steps: Count = 60
  """Steps of the continual phase."""
  eval_every: Count = 20
  """Steps between evaluations, with a checkpoint after each."""
  pretrain_learning_rate: Positive = 3e-3
  """The highest of the first phase."""
  learning_rate: Positive | None = None
  """Of the continual phase, instead of 3e-4, where the first ends (2e-6 for hf, as published)."""
  num_layers: Count = 2
  """Layers of the model, for scratch."""
  width: Count = 64
  """Its width."""
  num_heads: Count = 4
  """Its heads."""
  validation_sequences: Count = 32
  """Sequences for curves, of each domain at most."""
  test_sequences: Count = 128
  """Sequences for the report, of each domain at most."""
  rates: Rates = Rates()
  """What the reweightings take."""
  timing_rounds: Annotated[Index, FREE] = 5
  """Rounds in which steps of all methods are timed in turns at the end; 0 for none."""
  output_dir: Annotated[Path, FREE] = Path("runs/continual_lm")
  """Where results and checkpoints go."""

  @model_validator(mode="after")
  def fields_together(self) -> Self:
    """Refuses what only fits with something else."""
    if (self.init == "hf") != (self.model_dir is not None):
      raise ValueError(
        f"model_dir should be given with init=hf and only then, got {self.model_dir}"
      )
    return self

  def sequence_length(self) -> int:
    """Tokens of a sequence."""
    return self.length or {"scratch": 64, "hf": 512}[self.init]

  def steps_of(self, method: str) -> int:
    """Steps of a method, or of the first phase: none for weights that were read."""
    first = {"scratch": self.pretrain_steps, "hf": 0}[self.init]
    return first if method == START else self.steps

  def continual_learning_rate(self) -> float:
    """The learning rate of the continual phase."""
    return self.learning_rate or {"scratch": 3e-4, "hf": 2e-6}[self.init]
