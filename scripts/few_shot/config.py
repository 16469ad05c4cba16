"""The arguments and settings of :mod:`scripts.few_shot`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from jaxbo_models import ResNet12
from pydantic import Field

from scripts.common.config import FREE, GROWS, Among, Count, Index, Positive
from scripts.common.devices import DistributedConfig
from scripts.few_shot.problem import LABELS
from scripts.few_shot.setting import Settings

DATASETS = {
  "glyphs": Settings(),
  "omniglot": Settings(),
  "caltech101_fewshot": Settings(num_rotations=1, ridge=0.5, inner_steps=30),
}
# Its kernels start at 0.02, so the radius is smaller.
RESNET12 = {"num_tasks": 2, "outer_learning_rate": 1e-3, "smoothing_plain": 1e-3}
PIXELS = {"glyphs": 28, "omniglot": 28, "caltech101_fewshot": 84}


class Config(DistributedConfig):
  """Few-shot meta-learning: nine methods on one backbone, side by side."""

  smallest: ClassVar = {"methods": ("first_order",), "steps": 4, "width": 4, "eval_episodes": 20}

  dataset: Annotated[str, Among(DATASETS)] = "glyphs"
  """Glyphs are drawn on the spot, the others are read by tensorflow-datasets."""
  methods: Annotated[tuple[str, ...], Among(LABELS), FREE] = tuple(LABELS)
  """Which methods to run."""
  steps: Annotated[Count, GROWS] = 300
  """Meta-steps of each method; a run that goes on may have more."""
  seeds: Count = 1
  """How many seeds, of initial parameters and training episodes; evaluation episodes are always the
  same."""
  first_seed: Annotated[Index, tyro.conf.arg(aliases=["--seed"])] = 0
  """The first of them."""
  backbone: Annotated[str, Among(("auto", "conv4", "resnet12"))] = "auto"
  """Auto takes resnet12 for images in colour."""
  image_size: Annotated[int | None, Field(ge=16)] = None
  """Height and width in pixels, at least 16, instead of 28, or 84 for Caltech-101."""
  width: Count = 64
  """Channels of conv4."""
  bfloat16: bool = False
  """Whether the backbone computes in bfloat16; its parameters are float32 all the same."""
  eval_every: Count = 50
  """Meta-steps between evaluations on validation classes."""
  eval_episodes: Count = 600
  """Test episodes; a third of them for validation."""
  checkpoint_every: Annotated[Count, FREE] = 50
  """Meta-steps between checkpoints."""
  output_dir: Annotated[Path, FREE] = Path("runs/few_shot")
  """Where results and checkpoints go."""
  num_ways: Count | None = None
  """Classes of an episode, instead of the data set's default (as for all below)."""
  num_shots: Count | None = None
  """Support images of a class."""
  num_queries: Count | None = None
  """Query images of a class."""
  num_tasks: Count | None = None
  """Tasks of a meta-step."""
  inner_steps: Count | None = None
  """Steps on the head."""
  num_samples: Count | None = None
  """Directions of ESJ on features, for each task."""
  response_scale: Positive | None = None
  """Factor of the response of the shrunk ESJ; by default num_samples over the features of a support
  set, which has the least error."""
  outer_learning_rate: Positive | None = None
  """Learning rate of Adam at the start."""

  def is_resnet(self) -> bool:
    """Whether the backbone is ResNet-12."""
    in_colour = self.dataset == "caltech101_fewshot"
    return self.backbone == "resnet12" or (self.backbone == "auto" and in_colour)

  def pixels(self) -> int:
    """The height and width of images."""
    return self.image_size or PIXELS[self.dataset]

  def num_features(self) -> int:
    """How many features the backbone gives of an image."""
    return ResNet12.widths[-1] if self.is_resnet() else self.width * (self.pixels() // 16) ** 2

  def settings(self) -> Settings:
    """The settings of data set and backbone, with what was given instead."""
    changes = RESNET12 if self.is_resnet() else {}
    mine = self.override(dataclasses.replace(DATASETS[self.dataset], **changes))
    if self.response_scale is not None:
      return mine
    support_set = mine.num_ways * mine.num_shots * self.num_features()
    return dataclasses.replace(mine, response_scale=min(1.0, mine.num_samples / support_set))

  def in_full(self) -> dict[str, Any]:
    """The settings."""
    return self.settings_in_full(settings=self.settings())
