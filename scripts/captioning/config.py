"""The arguments and settings of :mod:`scripts.captioning`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import tyro
from pydantic import model_validator

import jaxbo
from scripts.common import cleaning
from scripts.common.config import FREE, GROWS, Among, Count, Index, Positive, Share
from scripts.common.devices import DistributedConfig
from scripts.common.tuning import TunedConfig

DATASETS = ("shapes", "nlvr_captions", "coco_captions_open", "coco_captions", "json")
ORDERS = ("canonical", "either")


class Model(NamedTuple):
  """A captioner, as :class:`jaxbo_models.captioner.GuidedCaptioner` has it.

  Without attention all cells are averaged.
  """

  label: str
  guide: str
  query: str
  attention: bool = True
  options: Mapping[str, Any] = {}  # Further attributes.


MODELS = {
  "sequential": Model("sequential guide, query: guide", "sequential", "guide"),
  "sequential_hidden": Model("sequential guide, query: hidden", "sequential", "hidden"),
  "sequential_word": Model("sequential guide, query: hidden, word", "sequential", "hidden_word"),
  "static_hidden": Model("static guide, query: hidden", "static", "hidden"),
  "static_word": Model("static guide, query: hidden, word", "static", "hidden_word"),
  "none_hidden": Model("no guide, query: hidden", "none", "hidden"),
  "none_word": Model("no guide, query: hidden, word", "none", "hidden_word"),
  "no_attention": Model("no guide, no attention", "none", "hidden_word", attention=False),
  "att2in": Model(
    "Att2in", "none", "hidden", options={"candidate": "maxout", "context_gates": "candidate"}
  ),
  "up_down": Model("Up-Down", "sequential", "guide", options={"decoder_word": False}),
}
PUBLISHED = ("att2in", "up_down")
SENTENCES = ("sequential", "static_word", "none_word", "no_attention", *PUBLISHED)
WEIGHTINGS = {
  "uniform": ("uniform", jaxbo.dro.uniform),
  "ir_dro": ("IR-DRO, temperature 4", lambda: jaxbo.dro.kl(4.0)),
  "tilted": ("TERM, tilt -1/4 (prefers small losses)", lambda: jaxbo.dro.tilted(-0.25)),
  "mid_rank": ("MidRanking, band 3", lambda: jaxbo.dro.mid_rank(0.125, 3)),
  "quadratic": ("Quadratic", lambda: jaxbo.dro.quadratic(0.4)),
}
RESPONSES = ("first_order", "itd", "esj", "aid")


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes and rates, as :class:`Config` has them; the defaults are for canonical order."""

  image_size: tuple[int, int] = (32, 32)  # Height and width.
  patch_size: int = 8  # The side of a cell.
  embed_dim: int = 32
  hidden_dim: int = 64
  attention_dim: int = 64
  dropout: float = 0.0
  steps: int = 2000
  canonical_steps: int = 0
  batch_size: int = 128
  learning_rate: float = 4e-3
  max_words: int = 8  # Of a caption; longer ones are cut.
  min_count: int = 1  # How often a word must occur in training to get an id.
  eval_every: int = 200


_DRAWINGS = Settings(
  image_size=(50, 200),
  patch_size=10,
  attention_dim=32,
  dropout=0.3,
  steps=400,
  batch_size=64,
  learning_rate=3e-3,
  max_words=20,
  min_count=2,
  eval_every=50,
)
_PHOTOGRAPHS = Settings(
  image_size=(96, 96),
  patch_size=16,
  embed_dim=128,
  hidden_dim=256,
  attention_dim=128,
  dropout=0.3,
  steps=300,
  batch_size=32,
  learning_rate=1e-3,
  max_words=16,
  eval_every=50,
)
_MANY_PHOTOGRAPHS = dataclasses.replace(
  _PHOTOGRAPHS, embed_dim=512, hidden_dim=512, attention_dim=512, steps=50_000, min_count=6
)
_REWEIGHTING = Settings(attention_dim=32, batch_size=64)
SETTINGS = {
  "canonical": Settings(),
  "either": Settings(steps=4600, canonical_steps=1600),
  "nlvr_captions": _DRAWINGS,
  "coco_captions_open": _PHOTOGRAPHS,
  "coco_captions": _MANY_PHOTOGRAPHS,
  "json": dataclasses.replace(_PHOTOGRAPHS, min_count=2),
  "reweighting": _REWEIGHTING,
  "before_cleaning": dataclasses.replace(_REWEIGHTING, steps=300),
}
CLEANING = cleaning.Settings(
  num_train=256,
  num_val=1024,
  inner_steps=4,
  inner_learning_rate=5e-3,
  outer_steps=100,
  num_samples=32,
  smoothing=1.0,
  momentum=0.0,
  linear_steps=5,
  damping=10.0,
)


class Config(DistributedConfig, TunedConfig):
  """Trains captioners, scores them and shows where they look."""

  smallest: ClassVar = {
    "orders": ("canonical",), "steps": 30, "test_examples": 100, "outer_steps": 2, "num_val": 64,
  }  # fmt: skip

  dataset: Annotated[str, Among(DATASETS)] = "shapes"
  """The data set. Shapes are drawn on the spot; tensorflow-datasets reads nlvr_captions,
  coco_captions_open and coco_captions; json reads your own data."""
  orders: Annotated[tuple[str, ...], Among(ORDERS), FREE] = ORDERS
  """The order of objects in captions of shapes: canonical (the image determines the caption) or
  either (a coin decides which object comes first)."""
  methods: Annotated[
    tuple[str, ...] | None,
    Among((*MODELS, *WEIGHTINGS, *RESPONSES)),
    FREE,
    tyro.conf.arg(aliases=("--models",)),
  ] = None
  """Which captioners to run; by default sequential, and for nlvr_captions also five baselines. With
  --noise: which weightings (uniform and those after it) and responses (first_order and those after
  it) to run; by default all."""
  ablation: bool = False
  """Runs all captioners on shapes, in either order, with three seeds."""
  noise: bool = False
  """Uses captioners as the loss of reweighting and of hyper-cleaning, on shapes with noise. The run
  is in output_dir/noise."""
  predict: Annotated[tuple[Path, ...], FREE] = ()
  """Captions these image files by the checkpoint in output_dir, instead of training."""
  seeds: Count = 1
  """How many seeds. The settings were chosen on validation sets, with seeds from 100 on."""
  beam_size: Annotated[Count, FREE] = 5
  """The number of captions that beam search keeps, for data sets with people's sentences."""
  test_examples: Count = 2000
  """Images of shapes to test on; half of them for validation."""
  checkpoint_every: Annotated[Count, FREE] = 200
  """Steps between checkpoints."""
  json_file: Path | None = None
  """The file of the data set json: {"images": [...], "captions": [[...], ...], "split": [...]}."""
  image_dir: Annotated[Path | None, FREE] = None
  """The folder of the images of json_file; by default that of the file."""
  max_images: Count | None = None
  """The largest number of images to read from each set."""
  output_dir: Annotated[Path, FREE] = Path("runs/captioning")
  """Where results and checkpoints go."""
  steps: Annotated[Count | None, GROWS] = None
  """Training steps, instead of the data set's default (as for all arguments below); a resumed run
  may have more."""
  canonical_steps: Index | None = None
  """With the order either: how many of the first steps use captions in canonical order."""
  batch_size: Count | None = None
  """Captions in a step."""
  learning_rate: Positive | None = None
  """Learning rate of Adam after a warm-up, for all captioners; else those that --tune has chosen,
  or the data set's default. A cosine takes it down to zero."""
  hidden_dim: Count | None = None
  """Units of the LSTMs."""
  embed_dim: Count | None = None
  """Width of the word embeddings."""
  attention_dim: Count | None = None
  """Width of the attention keys."""
  dropout: Share | None = None
  """The probability of dropping an entry."""
  eval_every: Count | None = None
  """Steps between evaluations on the validation set."""
  outer_steps: Count | None = None
  """Outer steps of hyper-cleaning, with --noise."""
  num_train: Count | None = None
  """Captions with a learned weight, in hyper-cleaning."""
  num_val: Count | None = None
  """Clean captions, in hyper-cleaning."""
  num_samples: Count | None = None
  """Directions of ESJ, in hyper-cleaning."""

  @model_validator(mode="after")
  def _together(self) -> Self:
    if (self.ablation or self.noise) and self.dataset != "shapes":
      raise ValueError(f"ablation and noise are for the dataset shapes, got {self.dataset}")
    if self.dataset == "json" and self.json_file is None and not self.predict:
      raise ValueError("json_file must be given for the dataset json")
    if self.tune and (self.ablation or self.noise or self.predict or self.learning_rate):
      raise ValueError(
        "tune chooses the learning rate of captioners: ablation, noise, predict and learning_rate "
        "should not be given with it"
      )
    if self.predict and self.is_one_of_several():
      raise ValueError("predict is for one process, got it with distributed or coordinator_address")
    there = (*WEIGHTINGS, *RESPONSES) if self.noise else tuple(MODELS)
    if self.methods and not set(self.methods) <= set(there):
      mode = "with" if self.noise else "without"
      given = " ".join(self.methods)
      raise ValueError(f"methods {mode} noise should be among {', '.join(there)}; got {given}")
    return self

  def settings(self, of: str) -> Settings:
    """The settings of an order of shapes, or of another data set, with what was given instead."""
    return self.override(SETTINGS[of or self.dataset])

  def name(self) -> str:
    """The name of the table of rates."""
    return self.dataset

  def settings_of(self, order: str, model: str) -> Settings:
    """The settings of a captioner, with the learning rate that was chosen for it."""
    chosen = self.rates_tables().get(self.name(), {}).get(order or "-", {}).get(model)
    if chosen is None or self.learning_rate is not None:
      return self.settings(order)
    return dataclasses.replace(self.settings(order), **chosen)

  def in_full(self) -> dict[str, Any]:
    """The settings of all orders of shapes, and of noise; or of another data set."""
    if self.dataset != "shapes":
      return self.settings_in_full(settings=self.settings(""))
    of = ("canonical", "either", "reweighting", "before_cleaning")
    every = {name: self.settings(name) for name in of}
    return self.settings_in_full(**every, cleaning=self.override(CLEANING))

  def lengths(self) -> dict[str, Any]:
    """The steps that a resumed run may have more of."""
    of = "reweighting" if self.noise else "either" if self.dataset == "shapes" else self.dataset
    return {"steps": self.settings(of).steps}

  def all_models(self) -> tuple[str, ...]:
    """The captioners to run."""
    if self.methods or self.smoke:
      return self.methods or ("none_word",)
    if self.ablation:
      return tuple(name for name in MODELS if name not in ("no_attention", *PUBLISHED))
    return SENTENCES if self.dataset == "nlvr_captions" else ("sequential",)

  def all_orders(self) -> tuple[str, ...]:
    """The orders of captions to run; for people's sentences there is none."""
    if self.dataset != "shapes":
      return ("",)
    return ("either",) if self.ablation else self.orders

  def all_seeds(self) -> range:
    """The seeds to run."""
    num = max(self.seeds, 3) if self.ablation else self.seeds
    return range(self.first_seed, self.first_seed + num)

  def chosen(self, names: Any) -> list[str]:
    """Of weightings or responses, those to run."""
    wanted = self.methods or (("first_order",) if self.smoke else names)
    return [name for name in names if name in wanted]
