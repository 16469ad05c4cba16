"""Tables: spreads, differences in pairs, Markdown; and pages that quote them."""

import math

import pandas as pd
import pytest

from scripts.common import pages, table
from scripts.common.table import Column, Table

ROWS = pd.DataFrame(
  [
    {"method": "a", "seed": 0, "loss": 1.0, "ms": 0.001},
    {"method": "a", "seed": 1, "loss": 3.0, "ms": 0.002},
    {"method": "b", "seed": 0, "loss": 0.5, "ms": 0.004},
    {"method": "b", "seed": 1, "loss": 4.5, "ms": 0.004},
    {"method": "b", "seed": 2, "loss": 9.0, "ms": 0.004},
  ]
)
LABELS = {"a": "A", "b": "the B"}


def test_a_cell_has_the_mean_and_the_sample_standard_deviation_of_finite_values():
  assert Column("").cell([1.0, 3.0]) == "2.000 ± 1.414"
  assert Column("", digits=1, factor=1e3).cell([0.001, 0.003]) == "2.0 ± 1.4"
  assert Column("", digits=1, mean_only=True).cell([1.0, 3.0]) == "2.0"
  assert Column("", interval=True).cell([1.0, 3.0]) == "2.000 ± 12.706"  # t of one degree times 1.
  assert Column("", digits=1).cell([1.0, math.nan, None]) == "1.0"
  assert Column("").cell([math.nan]) == "-"


def test_spreads_are_over_the_runs_of_each_group_in_the_order_of_rows():
  columns = {"loss": Column("loss", 1), "ms": Column("ms/step", 0, 1e3, mean_only=True)}
  made = table.spread("Losses", ROWS, "method", LABELS, columns)
  assert made.columns == ["method", "seeds", "loss", "ms/step"]
  assert made.rows == [["A", "2", "2.0 ± 1.4", "2"], ["the B", "3", "4.7 ± 4.3", "4"]]
  assert made.markdown().splitlines() == [
    "| method | seeds | loss | ms/step |",
    "| --- | ---: | ---: | ---: |",
    "| A | 2 | 2.0 ± 1.4 | 2 |",
    "| the B | 3 | 4.7 ± 4.3 | 4 |",
  ]


def test_differences_are_between_runs_of_one_seed():
  made = table.paired("Gains", ROWS, "method", "a", LABELS, {"loss": Column("loss", 1)})
  assert made.columns == ["minus A", "seeds", "loss"]
  assert made.rows == [["the B", "2", "0.5 ± 1.4"]]  # -0.5 and 1.5; seed 2 has no partner.
  assert table.paired("", ROWS, "method", "c", {**LABELS, "c": "C"}, {}).rows == []


def test_columns_that_say_nothing_are_left_out():
  made = Table("", ["x", "y", "z"], [["a", "-", "1"], ["b", "-", "-"]]).without_dashes()
  assert (made.columns, made.rows) == (["x", "z"], [["a", "1"], ["b", "-"]])


def test_a_page_gets_the_tables_of_its_markers_and_nothing_else_changes(monkeypatch):
  monkeypatch.setattr(
    pages, "tables", lambda room, name: ([f"{room} 1\n", f"{name} 2\n"], "here\n")
  )
  page = "before\n<!-- results: toy digits 2 -->\nold\n<!-- end of results -->\nafter\n"
  new = pages.rebuilt(page)
  assert new == (
    "before\n<!-- results: toy digits 2 -->\n\ndigits 2\n\nhere\n\n<!-- end of results -->\nafter\n"
  )
  assert pages.rebuilt(new) == new
  assert pages.rebuilt(page.replace(" 2 -->", " -->")).count("toy 1") == 1


def test_every_page_has_the_tables_of_the_kept_results(capsys):
  assert pages.main(check=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_mean_of_one_run_has_no_spread(seeds):
  made = table.spread("", ROWS[:seeds], "method", LABELS, {"loss": Column("loss", 1)})
  assert ("±" in made.rows[0][2]) == (seeds > 1)
