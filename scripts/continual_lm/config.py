"""What continual language-model training can be told."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from scripts.common.config import FREE, GROWS, Among, Count, Index, Positive, Several, Share
from scripts.common.devices import DistributedConfig
from scripts.common.tuning import TunedConfig
from scripts.continual_lm import instructions
from scripts.continual_lm.data import CORRUPTIONS
from scripts.continual_lm.documents import DATASETS
from scripts.continual_lm.instructions import SETS, TEMPLATES
from scripts.continual_lm.methods import HAVE_TEMPERATURE, METHODS, START, Chosen, Rates
from scripts.continual_lm.user_files import INSTRUCTION_FILES, TEXT_FILES

TASKS = ("pretrain", "instruct")
ARCHITECTURES = ("llama", "gpt2")


class AmongOrFile(Among):
  """A name of those that there are, or a file of a user; or several of them."""

  def __init__(self, names: Iterable[str], endings: tuple[str, ...]):
    super().__init__(names)
    AfterValidator.__init__(self, functools.partial(_among_or_file, self.names, endings))


def _among_or_file(names: str, endings: tuple[str, ...], value: Any) -> Any:
  chosen = (value,) if isinstance(value, str) else value
  unknown = [one for one in chosen if one not in names.split(", ") and not one.endswith(endings)]
  if unknown:
    raise ValueError(
      f"should be among {names}, or a {' or '.join(endings)}; got {' '.join(unknown)}"
    )
  return value


class Config(DistributedConfig, TunedConfig):
  """Continued pre-training or instruction tuning with reweighted losses, from one checkpoint."""

  smallest: ClassVar = {
    "seeds": 1, "methods": ("uniform", "ir_dro"), "batch_size": 8, "length": 32,
    "pretrain_steps": 20, "steps": 4, "eval_every": 2, "num_layers": 1, "width": 16,
    "validation_sequences": 8, "test_sequences": 16, "timing_rounds": 1,
  }  # fmt: skip
  smallest_of_instruct: ClassVar = {"batch_size": 4, "length": 128}

  task: Annotated[str, Among(TASKS)] = "pretrain"
  """pretrain: goes on with the text of the first phase; instruct: learns responses to prompts."""
  dataset: Annotated[str, AmongOrFile(DATASETS, endings=TEXT_FILES)] = "python"
  """The text of the first phase, and of both for pretrain: what ships with Python, a data set of
  tensorflow-datasets, or a file: .txt, whose passages are documents, or .jsonl with text."""
  instructions: Annotated[Several[str], AmongOrFile(SETS, endings=INSTRUCTION_FILES)] = (
    "docstrings",
  )
  """What is learned by instruct; of several sets each is a domain. docstrings are made of the
  standard library. A .jsonl has prompt and response, or messages."""
  template: Annotated[str, Among(TEMPLATES)] = "plain"
  """How a prompt is written: as it is, with a line break, or with a line for each role."""
  init: Annotated[str, Among(("scratch", "hf"))] = "scratch"
  """scratch: a small model is trained first; hf: weights of a model of the Hugging Face hub."""
  model_dir: Path | None = None
  """A folder with config.json, *.safetensors and the tokenizer's files, for hf."""
  pretrained: Path | None = None
  """The folder "pretrained" that a run with scratch wrote, to go on from: no first phase."""
  tokenizer: Annotated[int, Field(gt=256)] | Path | None = None
  """For scratch: how many tokens of a byte-pair encoding are learned from the text of the first
  phase, or a folder with the files of one, such as GPT-2's; else bytes."""
  dtype: Annotated[str, Among(("float32", "bfloat16"))] = "float32"
  """What the model computes in; parameters and losses are float32."""
  methods: Annotated[tuple[str, ...], Among(METHODS), FREE] = tuple(METHODS)
  """Which reweightings; group_dro is left out where there is one domain."""
  corruptions: Annotated[Several[Share], FREE] = (0.0, 0.2)
  """Shares of noise among the sequences of the continual phase, each in [0, 1). As methods and
  seeds, they may be others in a run that goes on."""
  corruption_kind: Annotated[str, Among(CORRUPTIONS)] = "shuffled"
  """The noise: the tokens of a sequence, or of a response, in random order, or random tokens; for
  instruct also responses of others of the noisy examples."""
  seeds: Count = 5
  """How many seeds."""
  batch_size: Count | None = None
  """Sequences of a batch, over all devices, instead of 32 (8 rows of several examples each for
  instruct). It decides how robust KL weights are."""
  length: Count | None = None
  """Tokens of a sequence, instead of 64 (256 for instruct, 512 for hf)."""
  pretrain_steps: Annotated[int, Field(ge=2)] = 1000
  """Steps of the first phase, for scratch; there is one, for all seeds."""
  steps: Annotated[Count | None, GROWS] = None
  """Steps of the continual phase, instead of 60 (30 for instruct); a run that goes on may have
  more."""
  eval_every: Count = 20
  """Steps between evaluations, with a checkpoint after each."""
  pretrain_learning_rate: Positive = 2e-3
  """The highest of the first phase."""
  learning_rate: Positive | None = None
  """Of the continual phase, for all methods, with the temperature in rates; instead of those that
  --tune has chosen, or else of 3e-4, where the first phase ends (2e-6 for hf, as published)."""
  architecture: Annotated[str, Among(ARCHITECTURES)] = "llama"
  """Of the model, for scratch. That of Llama learns bytes faster than GPT-2's."""
  num_layers: Count = 3
  """Layers of the model, for scratch."""
  width: Count = 256
  """Its width."""
  num_heads: Count = 4
  """Its heads."""
  validation_sequences: Count = 32
  """Sequences for curves and for choices, of each domain at most."""
  test_sequences: Count = 128
  """Sequences for the report, of each domain at most."""
  rates: Rates = Rates()
  """What the reweightings take."""
  timing_rounds: Annotated[Index, FREE] = 5
  """Rounds in which steps of all methods are timed in turns at the end; 0 for none."""
  output_dir: Annotated[Path, FREE] = Path("runs/continual_lm")
  """Where results and checkpoints go."""

  @model_validator(mode="before")
  @classmethod
  def _smoke(cls, given: Any) -> Any:
    of_task = cls.smallest_of_instruct if given.get("task") == "instruct" else {}
    return {**cls.smallest, **of_task, **given} if given.get("smoke") else given

  @model_validator(mode="after")
  def fields_together(self) -> Self:
    """Refuses what only fits with something else."""
    if (self.init == "hf") != (self.model_dir is not None):
      raise ValueError(
        f"model_dir should be given with init=hf and only then, got {self.model_dir}"
      )
    if self.init == "hf" and self.pretrained is not None:
      raise ValueError(f"pretrained should be given with init=scratch only; got {self.pretrained}")
    if self.init == "hf" and self.tokenizer is not None:
      raise ValueError(
        f"tokenizer should be given with init=scratch only: hf has its own; got {self.tokenizer}"
      )
    if self.corruption_kind == "swapped" and self.task != "instruct":
      raise ValueError("corruption_kind should be swapped with task=instruct only: of responses")
    if self.tune and self.learning_rate is not None:
      raise ValueError("tune chooses the learning rate: learning_rate should not be given with it")
    return self

  def in_full(self) -> dict[str, Any]:
    """What depends on the task and on the model."""
    return {
      "settings.batch_size": self.rows_of_batch(),
      "settings.length": self.sequence_length(),
      "settings.learning_rate": self.continual_learning_rate(),
    }

  def data_name(self) -> str:
    """What the continual phase is on."""
    if self.task == "instruct":
      return "+".join(map(instructions.label, self.instructions))
    return self.dataset if self.dataset in DATASETS else Path(self.dataset).stem

  def name(self) -> str:
    """The name of the table of rates: the task, its data, and the model."""
    if self.model_dir is not None:
      return f"{self.task}/{self.data_name()}/{self.model_dir.name}"
    model = f"{self.architecture}-{self.num_layers}x{self.width}-{self.tokens()}"
    return f"{self.task}/{self.data_name()}/{model}"

  def tokens(self) -> str:
    """What kind of tokens a small model has."""
    if isinstance(self.tokenizer, Path):
      return self.tokenizer.name
    return "bytes" if self.tokenizer is None else f"bpe{self.tokenizer}"

  def sequence_length(self) -> int:
    """Tokens of a sequence."""
    small = {"pretrain": 64, "instruct": 256}[self.task]
    return self.length or {"scratch": small, "hf": 512}[self.init]

  def rows_of_batch(self) -> int:
    """Sequences of a batch."""
    return self.batch_size or {"pretrain": 32, "instruct": 8}[self.task]

  def steps_of(self, method: str) -> int:
    """Steps of a method, or of the first phase: none for weights that were read."""
    if method == START:
      return self.pretrain_steps if self.init == "scratch" and self.pretrained is None else 0
    return self.steps or {"pretrain": 60, "instruct": 30}[self.task]

  def lengths(self) -> dict[str, Any]:
    """The steps that a resumed run may have more of."""
    return {"steps": self.steps_of("")}

  def continual_learning_rate(self) -> float:
    """The learning rate of the continual phase where none was chosen."""
    return self.learning_rate or {"scratch": 3e-4, "hf": 2e-6}[self.init]

  def chosen(self, method: str, corruption: float) -> Chosen:
    """What a method is trained with at a share of noise."""
    temperature = self.rates.temperature if method in HAVE_TEMPERATURE else None
    found = self.rates_tables().get(self.name(), {}).get(method, {}).get(f"{corruption:g}")
    if found is None or self.learning_rate is not None:
      return Chosen(self.continual_learning_rate(), temperature, False)
    return Chosen(found["learning_rate"], found["temperature"], True)
