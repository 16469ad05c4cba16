"""The benchmarks of ESJ measure what they say; no test here asks how long anything takes."""

import functools
import json
import math
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jaxbo_models import LeNet5

from benchmarks import convolution, es_response, few_shot, hyper_representation, resnet12

pytestmark = pytest.mark.slow  # All together, not each.


def test_the_published_scaling_leaves_nothing_of_the_response():
  responses = {
    "exact (ITD)": (1.0, 1.0),
    "no response (first order)": (0.0, 0.0),
    "published scaling, Q = 1": (-1e-3, 1e-3),
    "Gaussian, Q = 20": (0.2, 1.8),
  }
  heads = [hyper_representation.HEADS[name] for name in responses]
  run_all = jax.jit(lambda seed: [hyper_representation.run(head, 2, seed) for head in heads])
  for (name, (low, high)), found in zip(responses.items(), run_all(0), strict=True):
    losses, norm, projected = found
    assert losses.shape == (2,), name
    assert losses[1] < 0.95 * losses[0] or "Gaussian" in name, name
    assert norm > 100, name
    assert low - 1e-5 <= projected <= high + 1e-5, name


def test_hyper_representation_prints_and_saves_a_row_for_each_head(tmp_path, capsys, monkeypatch):
  fixed = (jnp.linspace(5.0, 1.0, 100), jnp.float32(300.0), jnp.float32(1.0))
  monkeypatch.setattr(hyper_representation, "run", lambda options, steps, seed: fixed)
  monkeypatch.setattr(sys, "argv", ["x", "--seeds", "2", "--save", str(tmp_path / "out")])
  hyper_representation.main()
  text = (tmp_path / "out.md").read_text()
  assert text in capsys.readouterr().out
  for name in hyper_representation.HEADS:
    assert f"| {name} " in text
  data = json.loads((tmp_path / "out.json").read_text())
  np.testing.assert_allclose(data["exact (ITD)"]["losses"][1][-1], 1.0)


class Small(nn.Module):
  """In the place of a backbone, whose programs are large: one layer on all pixels."""

  features: int
  conv: str
  dtype: Any = None

  @nn.compact
  def __call__(self, images):
    return jnp.tanh(nn.Dense(self.features)(images.reshape(len(images), -1)))


def test_features_are_worth_more_than_parameters(monkeypatch):
  """At equal numbers of samples; and as many orthogonal directions as features are exact."""
  monkeypatch.setattr(es_response, "Conv4", Small)
  monkeypatch.setattr(
    es_response,
    "PLANS",
    [("parameters", 4, "gaussian"), ("features", 4, "gaussian"), ("features", 50, "orthogonal")],
  )
  plain, features, exact = es_response.feature_rows(num_keys=2, width=2, num_tasks=2)
  assert plain["squared_error"] > features["squared_error"]
  assert exact["cosine"] == pytest.approx(1.0, abs=1e-3)
  assert exact["squared_error"] < 1e-3


def test_a_row_of_resnet12_counts_what_a_step_does(monkeypatch):
  monkeypatch.setattr(resnet12, "ResNet12", functools.partial(Small, 2))
  setting = few_shot.Setting(num_ways=2, num_shots=1, num_queries=1, num_tasks=1, inner_steps=2)
  first_order, esj = (
    resnet12.measure_row(name, 1, setting) for name in ("first order", "ESJ on features, Q = 16")
  )
  # ESJ adds head runs, and the backward pass through the support features.
  assert 1.0 < esj["gflop"] / first_order["gflop"] < 3.0
  for row in (first_order, esj):
    assert row["seconds"] > 0
    assert math.isfinite(row["gflop"])
    assert row["temp. MiB"] > 0


def test_convolutions_are_timed_in_four_ways_that_do_the_same(tmp_path, monkeypatch):
  ends, time_together = [], convolution.measure.time_together

  def recorded(programs, *args):
    ends.append({name: program() for name, program in programs.items()})
    return time_together(programs, *args)

  monkeypatch.setattr(convolution.measure, "time_together", recorded)
  monkeypatch.setattr(convolution, "MODELS", {"small": (LeNet5, (2, 32, 32, 1))})
  monkeypatch.setattr(sys, "argv", ["x", "--rounds", "1", "--save", str(tmp_path / "out")])
  convolution.main()
  [row] = json.loads((tmp_path / "out.json").read_text())["rows"]
  assert all(row[name] > 0 for name in ends[0])
  for column in ("in scan", "no loop"):
    native, patches = (ends[0][f"{conv}, {column}"] for conv in ("native", "patches"))
    chex.assert_trees_all_close(native, patches, rtol=1e-3, atol=1e-5)
