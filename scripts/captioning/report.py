"""What runs of captioners show: tables and pictures."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from scripts.captioning import plots as caption_plots
from scripts.captioning.config import MODELS, Config
from scripts.captioning.noise import RESPONSES, WEIGHTINGS, CleaningRow, ReweightingRow
from scripts.captioning.run import Line, Outcome
from scripts.common import report
from scripts.common.cleaning import METHODS

RESULTS, METRICS, CURVES = "results.csv", "metrics.jsonl", "curves.png"
NOISE_METRICS = "noise.jsonl"  # Another file: a training run in the same folder can go on.
NOISE_TABLES = ("reweighting.csv", "cleaning.csv")

SHAPES_COLUMNS = {
  "exact_match": ("exact match", 4),
  "nll": ("NLL", 4),
  "standard_error": ("its s.e.", 4),
  "entropy": ("optimum", 4),
  "mentioned": ("attention", 3),
  "both_orders": ("both orders", 4),
  "beam_gap": ("beam gap", 3),
  "beam_sum": ("beam sum", 3),
  "ms_per_step": ("ms/step", 0),
}
FILES_COLUMNS = {
  "bleu_1": ("BLEU-1", 3),
  "bleu_4": ("BLEU-4", 3),
  "rouge_l": ("ROUGE-L", 3),
  "cider_d": ("CIDEr-D", 3),
  "meteor": ("METEOR", 3),
  "spice": ("SPICE", 3),
  "token_nll": ("NLL a token", 3),
  "ms_per_step": ("ms/step", 0),
}


def results_table(config: Config, rows: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
  """Columns and rows: means and standard deviations over seeds."""
  columns = SHAPES_COLUMNS if config.dataset == "shapes" else FILES_COLUMNS
  shown = {k: v for k, v in columns.items() if any(math.isfinite(row[k]) for row in rows)}
  runs: dict[tuple[str, str], list[Line]] = {}
  for row in rows:
    runs.setdefault((row["order"], row["model"]), []).append(row)
  table = []
  for (order, model), mine in runs.items():
    label = ", ".join(part for part in (order, MODELS[model].label) if part)
    numbers = [report.mean_and_spread((r[k] for r in mine), d) for k, (_, d) in shown.items()]
    table.append([label, str(len(mine)), *numbers])
  return ["captioner", "seeds", *(title for title, _ in shown.values())], table


def leaks(row: Line) -> bool:
  """Whether the loss is less than it can be: then the captioner sees what it is to predict."""
  return row["nll"] < row["entropy"] - 3 * row["standard_error"]


def print_and_draw(config: Config, outcome: Outcome, console: Console) -> None:
  """Prints the table, and writes the rows and pictures of what there is."""
  folder = config.output_dir
  if outcome.rows:
    rows = [_flat(row) for row in outcome.rows]
    kept_by = ("order", "model", "seed") if config.resume else ()
    report.write_csv(folder / RESULTS, rows, kept_by)
    title = f"{config.dataset}: test set; mean ± standard deviation over seeds"
    report.print_table(console, title, *results_table(config, outcome.rows))
    for reason in dict.fromkeys(row.get("skipped", "") for row in outcome.rows):
      if reason:
        console.print(reason)
    for row in outcome.rows:
      if config.dataset == "shapes" and leaks(row):
        console.print(f"Below the optimum by more than 3 standard errors: {row}", style="red")
  for (order, model), examples in outcome.examples.items():
    name = "_".join(part for part in ("attention", order, model) if part) + ".png"
    caption_plots.draw_attention(examples, config.settings().patch_size, folder / name)
  if outcome.lines:
    labels = {name: model.label for name, model in MODELS.items()}
    ylabel = "validation loss, nats a " + ("caption" if config.dataset == "shapes" else "token")
    settings = config.settings("either")
    caption_plots.draw_curves(
      outcome.lines, outcome.bounds, labels, folder / CURVES, ylabel, settings.canonical_steps
    )


def print_noise(
  config: Config,
  reweighting: Sequence[ReweightingRow],
  cleaning: Sequence[CleaningRow],
  console: Console,
) -> None:
  """Prints and writes the tables of reweighting and hyper-cleaning."""
  report_seeds = report.mean_and_spread
  if reweighting:
    report.write_csv(config.output_dir / NOISE_TABLES[0], [row._asdict() for row in reweighting])
    table = []
    for name, (label, _) in WEIGHTINGS.items():
      mine = [row for row in reweighting if row.weighting == name]
      if mine:
        table.append(
          [
            label,
            str(len(mine)),
            report_seeds(row.exact_match for row in mine),
            report_seeds(row.nll for row in mine),
            report_seeds((row.wrong_weight for row in mine), 2),
            report_seeds(row.auc for row in mine),
            report_seeds(row.loss_auc for row in mine),
          ]
        )
    columns = ["weighting", "seeds", "exact match", "NLL", "wrong weight", "AUC", "AUC of losses"]
    title = "Flipped colour words: clean test scenes; weight and detection of wrong captions"
    report.print_table(console, title, columns, table)
  if cleaning:
    report.write_csv(config.output_dir / NOISE_TABLES[1], [row._asdict() for row in cleaning])
    table = []
    for name in RESPONSES:
      mine = [row for row in cleaning if row.response == name]
      if mine:
        table.append(
          [
            METHODS[name].label,
            str(len(mine)),
            report_seeds(row.auc for row in mine),
            report_seeds(row.f1 for row in mine),
            report_seeds(row.loss_auc for row in mine),
            report_seeds(row.test_nll for row in mine),
            report_seeds((1e3 * row.seconds_per_step for row in mine), 0),
          ]
        )
    columns = ["response", "seeds", "AUC", "F1", "AUC of losses", "test NLL", "ms/step"]
    report.print_table(console, "Swapped captions: hyper-cleaning", columns, table)


def _flat(row: Line) -> dict[str, Any]:
  """The same with one number a column."""
  flat: dict[str, Any] = {}
  for name, value in row.items():
    if isinstance(value, tuple):
      flat |= {f"{name}_{i}": part for i, part in enumerate(value)}
    else:
      flat[name] = value
  return flat
