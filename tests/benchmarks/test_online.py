"""The benchmark of online methods counts and weighs what it says."""

import json
import sys

import jax.numpy as jnp
import pytest

from benchmarks import online
from benchmarks.online import OAGD, OAGD_REPLAY, SOBOW, Cost

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("cg_steps", [1, 4])
def test_a_round_of_sobow_is_one_gradient_of_each_loss_and_the_products_of_the_response(cg_steps):
  """One product more than steps: the residual of the warm start. The window costs none."""
  for window in (1, 7):
    cost = online.count_cost(SOBOW, window=window, cg_steps=cg_steps)
    assert cost == Cost(1, 1, cg_steps + 1, 1)


def test_a_round_of_oagd_is_a_window_of_them():
  assert online.count_cost(OAGD, window=3, cg_steps=2) == Cost(1, 3, 3 * 3, 3)
  assert online.count_cost(OAGD_REPLAY, window=3, cg_steps=2) == Cost(3, 3, 3 * 3, 3)


def test_the_weight_of_the_windows():
  few, many = online.problems_to_weigh()
  batches = 2 * (64 * 784 * 4 + 64 * 4)
  flags = 4 + 5  # newest, and present
  assert online.state_bytes(few, 5) == {
    SOBOW: 5 * 20 * 4 + flags,
    "SOBOW, bfloat16": 5 * 20 * 2 + flags,
    OAGD: 5 * batches + flags,
  }
  assert online.state_bytes(many, 5)[SOBOW] == 5 * 217_408 * 4 + flags


def test_the_command_prints_and_saves(tmp_path, capsys, monkeypatch):
  path = tmp_path / "out"
  monkeypatch.setattr(online, "LARGE", online.SMALL)
  cost = Cost(1, 1, 6, 1)
  monkeypatch.setattr(online, "count_cost", lambda method: cost)
  arguments = ["online", "--save", str(path), "--rounds", "20", "--turns", "1"]
  monkeypatch.setattr(sys, "argv", arguments)
  online.main()
  assert "SOBOW is faster by" in capsys.readouterr().out
  data = json.loads(path.with_suffix(".json").read_text())
  assert data["cost"]["SOBOW"] == cost._asdict()
  speeds = data["rounds_per_second"]["p = 3, d = 5"]
  assert len(speeds) == 4
  assert all(speed > 0 for speed in speeds.values())
  assert jnp.isfinite(data["bytes"][online.problems_to_weigh()[0].name]["100"][OAGD])
  assert "| 100 " in path.with_suffix(".md").read_text()
