"""Pictures of captioning: images with one attention map a word, training curves, and scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scripts.captioning.config import MODELS
from scripts.captioning.scenes import ShapesCaptions
from scripts.common import plots, table
from scripts.common.plots import plt

NUM_EXAMPLES = 6  # Images of a picture of attention.
_WIDTH = 15  # Of such a picture, in inches.
# Colors that all eyes tell apart, and a marker each; grey is without attention.
STYLES = {
  "sequential": ("#0072B2", "o"),
  "static_word": ("#E69F00", "s"),
  "none_word": ("#D55E00", "D"),
  "no_attention": ("0.45", "X"),
  "att2in": ("#009E73", "^"),
  "up_down": ("#CC79A7", "v"),
}


class Captioned(NamedTuple):
  """An image with its caption, to be drawn.

  Attributes:
    image: ``[height, width, 3]``, uint8 or in [0, 1].
    words: of the caption.
    attention: where the captioner looked at each word, ``[words, cells]``; one cell for all of the
      image where it did not look.
    title: what stands above the image.
  """

  image: np.ndarray
  words: Sequence[str]
  attention: np.ndarray
  title: str


def draw_attention(examples: Sequence[Captioned], patch_size: int, path: Path) -> None:
  """The image, and then for each word where the captioner looked; a row an image if it fits.

  The picture is dark where it did not look; the brightest cell has the greatest weight, which
  stands below as a share.
  """
  number = 1 + max(len(example.words) for example in examples)
  height, width = examples[0].image.shape[:2]
  side = 1.15 * np.sqrt((width / height, height / width))  # All images have the same area.
  columns = min(number, max(2, int(_WIDTH // side[0])))
  lines = -(-number // columns)  # Of panels, for each image.
  fig, grid = plt.subplots(
    lines * len(examples),
    columns,
    figsize=(side[0] * columns, (side[1] + 0.45) * lines * len(examples)),
    layout="constrained",
    squeeze=False,
  )
  for axes in grid.ravel():
    axes.set_axis_off()
  for row, example in zip(grid.reshape(len(examples), -1), examples, strict=True):
    image = example.image / 255 if example.image.dtype == np.uint8 else example.image
    row[0].imshow(image, interpolation="nearest")
    row[0].set_title(example.title, fontsize="x-small", loc="left")
    for axes, word, weights in zip(row[1:], example.words, example.attention, strict=False):
      _draw_word(axes, image, word, weights, patch_size)
  plots.save(fig, path)


def _draw_word(
  axes: Axes, image: np.ndarray, word: str, weights: np.ndarray, patch_size: int
) -> None:
  """The image, lit where the captioner looked when it said a word."""
  height, width = (side // patch_size for side in image.shape[:2])
  if weights.size == 1:
    weights = np.full(height * width, 1 / (height * width))
  cells = weights.reshape(height, width)
  light = np.kron(cells / cells.max(), np.ones((patch_size, patch_size)))[..., None]
  # A little grey where it looked, so that black paper is seen to be lit.
  lit = (0.12 + 0.88 * light) * image + 0.25 * light * (1 - image)
  axes.imshow(np.clip(lit, 0, 1), interpolation="nearest")
  axes.set_title(word, fontsize="small")
  axes.text(
    0.5, -0.02, f"{cells.max():.2f}", transform=axes.transAxes, ha="center", va="top", fontsize=6
  )


def draw_curves(lines: pd.DataFrame, canonical_steps: int, path: Path) -> None:
  """Validation losses over steps: a panel for each kind of captions, a line for each captioner.

  Captioners for either order spend their first ``canonical_steps`` on captions in canonical order
  alone; their loss means nothing then.
  """
  orders = lines["order"].unique()
  fig, panels = plt.subplots(
    1, len(orders), figsize=(6.2 * len(orders), 4.4), layout="constrained", squeeze=False
  )
  models = [name for name in MODELS if name in set(lines["model"])]
  meant = lines[(lines["order"] != "either") | (lines["step"] > canonical_steps)]
  for axes, order in zip(panels[0], orders, strict=True):
    for model, mine in meant[meant["order"] == order].groupby("model", sort=False):
      runs = [run for _, run in mine.groupby("seed")]
      ended = [run for run in runs if len(run) == max(map(len, runs))]
      color = STYLES.get(model, (f"C{models.index(model)}",))[0]
      values = [run["validation_nll"] for run in ended]
      plots.mean_and_range(axes, ended[0]["step"], values, label=MODELS[model].label, color=color)
    if order == "either" and canonical_steps:
      axes.axvspan(0, canonical_steps, color="0.93", label="trained in canonical order")
    axes.set(xlabel="steps", ylabel=f"validation loss, nats a {'caption' if order else 'token'}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if order:
      entropies = ShapesCaptions(order=order).entropies("validation")
      names = ("entropy given the image", "entropy without it")
      for name, value, style in zip(names, entropies, ("--", ":"), strict=True):
        label = f"{name}: {value:.3f}"
        axes.axhline(value, color="0.3", linestyle=style, linewidth=1, label=label)
      axes.set_title(f"captions in {order} order", loc="left", fontsize="medium")
      axes.set_yscale("symlog", linthresh=0.1)
      axes.set_ylim(bottom=0 if order == "canonical" else 0.5)
    axes.legend(fontsize="small")
  plots.save(fig, path)


def draw_scores(rows: pd.DataFrame, path: Path) -> None:
  """What captioners of people's sentences gain by the image, and whether CIDEr-D shows it.

  On the left each captioner's gain in nats, a light marker for each seed and the mean with a 95 %
  interval; on the right CIDEr-D of each seed against how many different captions it says.
  """
  fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
  models = [model for model in MODELS if model in set(rows["model"])]
  for i, model in enumerate(models):
    color, marker = STYLES.get(model, (f"C{i}", "P"))
    mine, style = rows[rows["model"] == model], {"color": color, "marker": marker}
    gains = mine["image_gain"]
    left.plot(gains, [i] * len(mine), linestyle="", ms=5, alpha=0.35, **style)
    width = table.half_width(gains.tolist()) if len(mine) > 1 else 0.0
    left.errorbar([gains.mean()], [i], xerr=[width], capsize=4, ms=9, **style)
    label = MODELS[model].label
    right.plot(
      mine["distinct"], mine["cider_d"], linestyle="", ms=8, alpha=0.8, label=label, **style
    )
  left.set_yticks(
    range(len(models)), [MODELS[model].label.replace(", ", ",\n", 1) for model in models]
  )
  left.invert_yaxis()
  left.axvline(0, color="0.5", linewidth=1)
  left.set(xlabel="loss with another image - loss with its own, nats a token")
  right.set(xscale="log", xlabel="different captions of the test images", ylabel="CIDEr-D")
  right.set_xticks(ticks := [1, 2, 4, 8, 16, 32], [str(tick) for tick in ticks])
  right.minorticks_off()
  for axes in (left, right):
    axes.grid(alpha=0.3)
  plots.save(fig, path, legend_of=right, ncols=3)
