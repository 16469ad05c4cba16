"""Adversarial training: rates are chosen by their mean over the seeds for tuning."""

from scripts.adversarial_training.config import Config
from scripts.adversarial_training.tuning import SEEDS, Tuning
from scripts.common.study import Results

TAILS = {  # By training set and value, one a seed.
  ("balanced", 1.0): (80.0, 70.0), ("balanced", 3.0): (76.0, 75.0),
  ("long_tailed", 1.0): (50.0, 52.0), ("long_tailed", 3.0): (51.0, 40.0),
}  # fmt: skip


def test_the_highest_mean_is_chosen_for_each_set_and_the_table_has_what_was_tried():
  rows = [
    {"set": kind, "method": "at_kl", "rate": "temperature", "value": value, "seed": seed,
     "tail": tail, "worst": 0.0}
    for (kind, value), tails in TAILS.items()
    for seed, tail in zip(SEEDS, tails, strict=True)
  ]  # fmt: skip
  study, results = Tuning(), Results(Config(), [], rows, {})
  found = [(one.entry, one.rates, one.score) for one in study.choices(results.rows)]
  assert found == [
    (("balanced", "at_kl"), {"temperature": 3.0}, 75.5),
    (("long_tailed", "at_kl"), {"temperature": 1.0}, 51.0),
  ]
  [table] = study.tables(results)
  assert table.title == "Rates for mnist, by seed 100 and 101"
  assert table.rows == [
    ["balanced, AT + KL weights", "temperature", "3", "1: 75.0, 3: 75.5"],
    ["long-tailed, AT + KL weights", "temperature", "1", "1: 51.0, 3: 45.5"],
  ]
