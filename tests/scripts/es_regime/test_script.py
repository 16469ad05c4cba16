"""The experiment from end to end, small: rows, tables, the picture, resuming, refusals."""

import json

import numpy as np
import pytest
from PIL import Image

from scripts.common import folder, study
from scripts.common.study import Results
from scripts.es_regime import methods
from scripts.es_regime.__main__ import EsRegime, Tuning
from scripts.es_regime.config import Cellmate, Config
from tests.scripts.common.stopped import programs_kept, stopped_after

METHODS = ("alike", "oracle", "itd", "esj", "random")


def config(path, **more):
  given = {
    "methods": METHODS, "runs": ("smooth", "svm"), "sources": (4,), "seeds": 1, "budget": 32,
    "inner_steps": 50,
  }  # fmt: skip
  return Config(output_dir=path, **given | more)


def without_times(path):
  lines, rows, _ = folder.read(path)
  for entry in (*lines, *rows):
    for name in ("seconds", "cpu_seconds"):
      entry.pop(name, None)
  return lines, rows


@pytest.mark.slow
def test_a_run_reports_the_incumbent_and_a_stopped_one_goes_on_bit_for_bit(tmp_path, capsys):
  whole, stopped, programs = tmp_path / "whole", tmp_path / "stopped", {}
  with programs_kept(programs):
    assert study.run(EsRegime(), config(whole)) == 0
    with stopped_after(14):  # In the middle of a search.
      study.run(EsRegime(), config(stopped))
    assert study.run(EsRegime(), config(stopped, resume=True)) == 0
  assert str(without_times(stopped)) == str(without_times(whole))
  lines, rows = without_times(whole)
  methods_of = lambda run: [row["method"] for row in rows if row["run"] == run]
  assert methods_of("smooth") == list(METHODS)
  assert methods_of("svm") == ["alike", "oracle", "esj", "random"]
  of = {(row["run"], row["method"]): row for row in rows}
  for run in ("smooth", "svm"):
    alike, oracle = of[run, "alike"], of[run, "oracle"]
    assert oracle["test_accuracy"] > alike["test_accuracy"] + 0.2
    for method in ("esj", "random"):
      mine = of[run, method]
      assert mine["outer_loss"] < alike["outer_loss"]
      found = [e["outer_loss"] for e in lines if (e["run"], e["method"]) == (run, method)]
      assert found == sorted(found, reverse=True)  # The best so far.
      assert found[-1] == mine["outer_loss"]
  assert of["smooth", "itd"]["temporary_bytes"] > 5 * of["smooth", "esj"]["temporary_bytes"]
  assert of["smooth", "itd"]["steps"] == 32 // methods.METHODS["itd"].cost(4)
  assert of["svm", "esj"]["steps"] == 32 // 5
  assert "by the number of sources" in " ".join(capsys.readouterr().out.split())
  with Image.open(whole / "es_regime.png") as picture:
    assert picture.width > 300


@pytest.mark.slow
def test_tuning_takes_the_rate_of_the_least_outer_loss(tmp_path):
  given = {"methods": ("alike", "random"), "runs": ("svm",), "budget": 4, "tune": True}
  assert study.run(Tuning(), config(tmp_path, **given)) == 0
  rows = folder.read(tmp_path)[1]
  assert [row["tried"] for row in rows] == list(methods.BOX)
  assert {row["seed"] for row in rows}.isdisjoint(Config().all_seeds())
  best = min(rows, key=lambda row: row["outer_loss"])["tried"]
  assert json.loads((tmp_path / "rates.json").read_text()) == {"digits": {"svm": {"random": best}}}


def test_tables_have_pairs_and_no_bytes_where_none_are_known():
  row = lambda method, sources, accuracy, size: {
    "run": "svm", "sources": sources, "method": method, "seed": 0, "steps": 2, "cpu_seconds": 1.5,
    "test_accuracy": accuracy, "temporary_bytes": size,
  }  # fmt: skip
  rows = [row("esj", 4, 0.5, -1), row("esj", 64, 0.75, -1)]
  rows += [row("tpe", 4, 0.625, -1), row("tpe", 64, 0.5, -1)]
  accuracy, minus, costs = EsRegime().tables(Results(Config(), [], rows, {}))
  assert accuracy.rows[0] == ["ESJ", "1", "0.500", "0.750"]
  assert minus.rows == [["TPE (Optuna)", "1", "0.125", "-0.250"]]
  assert costs.columns == ["method", "seeds", "4", "64"]


def test_every_method_spends_the_budget_and_has_a_rate():
  told = Config()
  cells = told.cells(told.all_seeds())
  assert len({cell.seed for cell in cells}) == 5
  for cell in cells:
    if cell.method not in ("alike", "oracle"):
      method = methods.METHODS[cell.method]
      assert told.rate_of(cell) in methods.METHODS[method.rate_of or cell.method].grid
      searches = cell.method in methods.SEARCHES
      runs = cell.parallel() if searches else method.cost(cell.sources)
      assert told.budget / 2 < cell.steps(told.budget) * runs <= told.budget
  assert ("quantised", "itd") not in {(cell.run, cell.method) for cell in cells}


@pytest.mark.parametrize(
  "given, words",
  [({"sources": (4, 5)}, "divisors of 192"), ({"sources": (1,)}, "divisors of 192")],
)
def test_sources_that_do_not_divide_are_refused(given, words):
  with pytest.raises(ValueError, match=words):
    Config(**given)


def test_what_lacks_optuna_or_a_rate_is_refused_before_it_runs(tmp_path, monkeypatch, capsys):
  def no_optuna(name):
    raise ImportError(name)

  monkeypatch.setattr(methods.importlib, "import_module", no_optuna)
  assert study.run(EsRegime(), config(tmp_path / "a", methods=("tpe",))) == 2
  assert "uv run --group bench" in capsys.readouterr().err
  (tmp_path / "rates.json").write_text("{}")
  told = config(tmp_path / "a", methods=("esj",), rates_file=tmp_path / "rates.json")
  assert study.run(EsRegime(), told) == 2
  assert "no rate was chosen for esj on smooth" in capsys.readouterr().err


def test_what_is_not_finite_is_never_the_incumbent():
  first = methods.Incumbent(np.zeros(2), np.float32(1.0))
  for loss, x in ((np.nan, 0), (2.0, 0), (0.5, 1)):
    assert np.all(first.or_better(np.ones(2), np.float32(loss)).x == x)
  assert Cellmate("svm", 4, "esj", 0).steps(3) == 1  # At least one.
