"""The benchmark of online meta-learning times the same rounds twice, and weighs what it says."""

import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import online_meta

pytestmark = pytest.mark.slow


def test_the_loop_plays_the_rounds_of_the_scan():
  programs = online_meta.make_programs("meta_ogd", online_meta.perceptron(2), 5)
  found = [programs[kind]() for kind in ("scan", "Python loop")]
  for a, b in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert np.any(found[0][0].head["b"] != 0)


def test_the_weight_of_what_is_kept():
  model = online_meta.perceptron(2)
  numbers = 2 * 256 + 2 * 10 + 10
  floats = lambda name: online_meta.kept(name, model)["beside it"] // 4
  assert online_meta.kept("maml", model)["meta-model"] == 4 * numbers
  assert floats("maml") == pytest.approx(2 * numbers, abs=12)  # The pair (x, y), and flags.
  assert floats("meta_ogd") == pytest.approx(4 * numbers, abs=12)  # And Adam's moments.
  images = 50 * 256 // 4 + 50
  assert floats("c_maml") == pytest.approx(4 * numbers + images, abs=16)
  assert floats("c_maml_pap") == pytest.approx(4 * numbers + 101 * images, abs=16)
  assert floats("leeds") == floats("leeds_told") + 2  # Two thresholds, and no data.


def test_the_command_prints_and_saves(tmp_path, capsys, monkeypatch):
  path, names = tmp_path / "out", ("maml", "anil")
  monkeypatch.setattr(online_meta, "LABELS", {name: online_meta.LABELS[name] for name in names})
  monkeypatch.setattr(online_meta, "SMALL", names[:1])
  monkeypatch.setattr(online_meta, "conv4", lambda *_, **__: online_meta.perceptron(2))
  speeds = lambda names, *sizes: {name: {"scan": 8.0, "Python loop": 4.0} for name in names}
  monkeypatch.setattr(online_meta, "rounds_per_second", speeds)
  arguments = ["online_meta", "--save", str(path), "--rounds", "2", "--turns", "1"]
  monkeypatch.setattr(sys, "argv", arguments)
  online_meta.main()
  assert "perceptron, 20 rounds" in capsys.readouterr().out
  data = json.loads(path.with_suffix(".json").read_text())
  assert set(data["Conv4"]) == set(names)
  assert data["Conv4"]["maml"]["scan"] == 8
  text = path.with_suffix(".md").read_text()
  assert "| ANIL " in text
  assert " 2.00 |" in text
