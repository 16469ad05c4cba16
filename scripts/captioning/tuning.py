"""The learning rate of each captioner, chosen by its losses on images for validation."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import pandas as pd

from scripts.captioning import data
from scripts.captioning.config import MODELS, Config
from scripts.captioning.files import Files
from scripts.captioning.shapes import Shapes
from scripts.captioning.train import Captioner, State, Training
from scripts.common import devices, tuning
from scripts.common.study import Results, Run
from scripts.common.table import Table
from scripts.common.task import Cell, Row, Spent
from scripts.common.tuning import Choice

# Of the data set's learning rate, each with its seeds, which no report has. After the first seed,
# small rates were at least 0.25 nats behind for every captioner of sentences.
FACTORS = {0.3: (100,), 1.0: (100,), 3.0: (100, 101, 102), 10.0: (100, 101, 102)}
Source = Shapes | Files


class Trial(Training):
  """A candidate; nothing is seen of the test set."""

  def result(self, state: State, spent: Spent) -> Row:
    """What it is chosen by."""
    return {"validation_nll": self._source.validation(self._captioner.ask, state.params)}


class Tuning(tuning.Tuning[Config]):
  """The choice of rates."""

  config = Config

  def prepare(self, config: Config) -> dict[str, Source]:
    """The images and captions of each order."""
    sources = dict[str, Source]()
    for order in config.all_orders():
      settings = config.settings(order)
      if config.dataset == "shapes":
        sources[order] = Shapes(order, settings, config.test_examples)
      else:
        images = data.read(config, settings.image_size)
        sources[order] = Files(images, settings, config.beam_size, devices.all_devices())
    return sources

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every captioner with every rate."""
    for order, source in run.data.items():
      settings = run.config.settings(order)
      for model in run.config.all_models():
        for factor, seeds in FACTORS.items():
          rate = float(f"{factor * settings.learning_rate:.3g}")
          with_rate = dataclasses.replace(settings, learning_rate=rate)
          make = functools.partial(self.captioner, run, model, order, source, with_rate)
          for seed in seeds:
            key = {"order": order, "model": model, "learning_rate": rate, "seed": seed}
            label = f"{MODELS[model].label}, learning rate {rate:g}, seed {seed}"
            task = lambda make=make, seed=seed: Trial(make(), seed)
            yield Cell(key, task, settings.steps, label, settings.eval_every, settings.eval_every)

  def captioner(self, run, model, order, source, settings) -> Captioner:
    """One for all seeds."""
    make = lambda: Captioner(model, source, settings, devices.all_devices())
    return run.shared((order, model, settings.learning_rate), make)

  def choices(self, rows: pd.DataFrame) -> Iterable[Choice]:
    """For each captioner the rate with the least mean loss; one that is not finite is infinite."""
    names = ["order", "model", "learning_rate"]
    rows = rows.fillna({"order": "", "validation_nll": math.inf})
    means = rows.groupby(names, sort=False)["validation_nll"].mean().reset_index()
    best = means.groupby(names[:2], sort=False)["validation_nll"].idxmin()
    for row in means.loc[best].to_dict("records"):
      label = ", ".join(part for part in (row["order"], MODELS[row["model"]].label) if part)
      found = {"learning_rate": row["learning_rate"]}
      yield Choice(label, (row["order"] or "-", row["model"]), found, row["validation_nll"])

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """What was chosen."""
    lines = [
      [one.label, f"{one.rates['learning_rate']:g}", f"{one.score:.4f}"]
      for one in self.choices(results.rows)
    ]
    columns = ("captioner", "learning rate", "validation NLL")
    yield Table(f"Rates for {results.config.name()}", columns, lines)
