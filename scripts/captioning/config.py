"""What :mod:`scripts.captioning` can be told."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

DATASETS = ("shapes", "nlvr_captions", "coco_captions_open", "coco_captions", "json")
ORDERS = ("canonical", "either")


class Model(NamedTuple):
  """A captioner; see :class:`jaxbo_models.captioner.GuidedCaptioner`.

  Attributes:
    label: its name.
    guide: ``"sequential"``, ``"static"`` or ``"none"``.
    query: what attention asks with: ``"guide"``, ``"hidden"`` or ``"hidden_word"``.
    attention: whether there is any; without, all cells are averaged.
  """

  label: str
  guide: str
  query: str
  attention: bool = True


MODELS = {
  "sequential": Model("sequential guide, query: guide", "sequential", "guide"),
  "sequential_hidden": Model("sequential guide, query: hidden", "sequential", "hidden"),
  "sequential_word": Model("sequential guide, query: hidden, word", "sequential", "hidden_word"),
  "static_hidden": Model("static guide, query: hidden", "static", "hidden"),
  "static_word": Model("static guide, query: hidden, word", "static", "hidden_word"),
  "none_hidden": Model("no guide, query: hidden", "none", "hidden"),
  "none_word": Model("no guide, query: hidden, word", "none", "hidden_word"),
  "no_attention": Model("no guide, no attention", "none", "hidden_word", attention=False),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes and rates; the defaults are for shapes in canonical order.

  Attributes:
    image_size: height and width of images.
    patch_size: the side of a cell.
    embed_dim: the width of words.
    hidden_dim: units of the LSTMs.
    attention_dim: the width of keys.
    dropout: the probability to drop an entry.
    steps: of training.
    canonical_steps: of these, the first ones with captions of shapes in canonical order.
    batch_size: captions of a step.
    learning_rate: of Adam, after a warm-up; a cosine takes it down to zero.
    max_words: of a caption; longer ones are cut.
    min_count: how often a word must occur in training to get an id.
    eval_every: steps between evaluations on the validation set.
  """

  image_size: tuple[int, int] = (32, 32)
  patch_size: int = 8
  embed_dim: int = 32
  hidden_dim: int = 64
  attention_dim: int = 64
  dropout: float = 0.0
  steps: int = 2000
  canonical_steps: int = 0
  batch_size: int = 128
  learning_rate: float = 4e-3
  max_words: int = 8
  min_count: int = 1
  eval_every: int = 200


OF_EITHER_ORDER = {"steps": 4600, "canonical_steps": 1600}
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
SETTINGS = {
  "shapes": Settings(),
  "nlvr_captions": Settings(
    image_size=(50, 200),
    patch_size=10,
    embed_dim=32,
    hidden_dim=64,
    attention_dim=32,
    dropout=0.3,
    steps=400,
    batch_size=64,
    learning_rate=3e-3,
    max_words=20,
    min_count=2,
    eval_every=50,
  ),
  "coco_captions_open": _PHOTOGRAPHS,
  "coco_captions": dataclasses.replace(
    _PHOTOGRAPHS, embed_dim=512, hidden_dim=512, attention_dim=512, steps=50_000, min_count=6
  ),
  "json": dataclasses.replace(_PHOTOGRAPHS, min_count=2),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Trains captioners, scores them and shows where they look."""

  dataset: str = "shapes"
  """shapes (drawn on the spot), nlvr_captions, coco_captions_open or coco_captions (read by
  tensorflow-datasets), or json (your own)."""
  orders: tuple[str, ...] = ORDERS
  """Of captions of shapes: canonical (the image determines the caption), either (a coin turns it
  round)."""
  models: tuple[str, ...] | None = None
  """Which captioners; by default sequential, for nlvr_captions with the baselines none_word and
  no_attention."""
  ablation: bool = False
  """Runs all captioners on shapes, in either order, with three seeds."""
  noise: bool = False
  """Runs captioners as the loss of reweighting and of hyper-cleaning, on shapes with noise."""
  predict: tuple[Path, ...] = ()
  """Captions these image files by the checkpoint in output_dir, instead of training."""
  seeds: int = 1
  """How many seeds."""
  first_seed: int = 0
  """The first of them. Settings were chosen on seeds from 100 on and on validation sets."""
  beam_size: int = 5
  """Captions that beam search keeps, where sentences are people's."""
  test_examples: int = 2000
  """Images of shapes to test on; half of them for validation."""
  resume: bool = False
  """Goes on from the checkpoints in output_dir; the other arguments must be those of that run."""
  checkpoint_every: int = 200
  """Steps between checkpoints."""
  json_file: Path | None = None
  """The file of the data set json: {"images": [...], "captions": [[...], ...], "split": [...]}."""
  image_dir: Path | None = None
  """Where its images are; beside the file by default."""
  max_images: int | None = None
  """Reads only so many images of each set."""
  data_dir: Path | None = None
  """Where tensorflow-datasets has its files, instead of TFDS_DATA_DIR or ~/tensorflow_datasets."""
  output_dir: Path = Path("runs/captioning")
  """Where results and checkpoints go."""
  steps: int | None = None
  """Steps of training, instead of the data set's default (as for all below)."""
  canonical_steps: int | None = None
  """The first steps with captions of shapes in canonical order, where they have either."""
  batch_size: int | None = None
  """Captions of a step."""
  learning_rate: float | None = None
  """Learning rate of Adam."""
  hidden_dim: int | None = None
  """Units of the LSTMs."""
  embed_dim: int | None = None
  """Width of words."""
  attention_dim: int | None = None
  """Width of keys."""
  dropout: float | None = None
  """The probability to drop an entry."""
  eval_every: int | None = None
  """Steps between evaluations on the validation set."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run."""
    if self.dataset not in DATASETS:
      raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {self.dataset!r}")
    for name, allowed in (("orders", ORDERS), ("models", tuple(MODELS))):
      values = getattr(self, name)
      if values is not None and (
        not values or not set(values) <= set(allowed) or len(set(values)) < len(values)
      ):
        given = " ".join(values) or "none"
        raise ValueError(f"{name} must be different ones of {', '.join(allowed)}; got {given}")
    if (self.ablation or self.noise) and self.dataset != "shapes":
      raise ValueError(f"ablation and noise are for the dataset shapes, got {self.dataset}")
    ignored = [*(["resume"] if self.resume else []), *self._given()]
    if self.noise and ignored:
      raise ValueError(f"{ignored[0]} must not be given with noise, which has settings of its own")
    if self.dataset == "json" and self.json_file is None and not self.predict:
      raise ValueError("json_file must be given for the dataset json")
    for name in ("first_seed", "canonical_steps"):
      if (getattr(self, name) or 0) < 0:
        raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if (
        number and field.name not in ("first_seed", "dropout", "canonical_steps") and not value > 0
      ):
        raise ValueError(f"{field.name} must be positive, got {value}")
    if self.dropout is not None and not 0 <= self.dropout < 1:
      raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

  def settings(self, order: str = "") -> Settings:
    """The settings of the data set and order, with what was given instead."""
    of_order = OF_EITHER_ORDER if order == "either" else {}
    return dataclasses.replace(SETTINGS[self.dataset], **of_order | self._given())

  def _given(self) -> dict[str, Any]:
    """The settings that were given."""
    given = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(Settings)}
    return {name: value for name, value in given.items() if value is not None}

  def all_models(self) -> tuple[str, ...]:
    """The captioners to run."""
    if self.models is not None:
      return self.models
    if self.ablation:
      return tuple(name for name in MODELS if name != "no_attention")
    if self.dataset == "nlvr_captions":
      return "sequential", "none_word", "no_attention"
    return ("sequential",)

  def all_orders(self) -> tuple[str, ...]:
    """The orders of captions to run; for people's sentences there is none."""
    if self.dataset != "shapes":
      return ("",)
    return ("either",) if self.ablation else self.orders

  def all_seeds(self) -> range:
    """The seeds to run."""
    num = max(self.seeds, 3) if self.ablation else self.seeds
    return range(self.first_seed, self.first_seed + num)

  def identity(self) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it continues."""
    left_out = ("models", "orders", "seeds", "first_seed", "predict", "resume", "data_dir")
    left_out += ("output_dir", "checkpoint_every", "beam_size", "image_dir")
    values = dataclasses.asdict(self) | dataclasses.asdict(self.settings())
    if self.dataset == "shapes":  # Captions in either order have steps of their own.
      either = self.settings("either")
      values |= {f"{name} in either order": getattr(either, name) for name in OF_EITHER_ORDER}
    return {
      name: str(value) if isinstance(value, Path) else value
      for name, value in values.items()
      if name not in left_out
    }
