"""The benchmark of captioning compares programs that do the same, counts and reports it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import captioner

from benchmarks import captioning, measure
from benchmarks.captioning import LOOP, SCAN, Config, Preset

pytestmark = pytest.mark.slow

SIZES = Preset(captioner.GuidedCaptioner(9, 4, 6, 5), 4, 7, batch=2, length=2)


@functools.cache
def programs():
  return captioning.make_programs(SIZES, beam=3, max_length=3)


def test_both_programs_take_the_same_step_of_training():
  loop, scan = (jax.device_get(programs()["training"][name].run()) for name in (LOOP, SCAN))
  assert loop[2] == pytest.approx(float(scan[2]), rel=1e-5)
  changed = []
  for old, new in zip(jax.tree.leaves(loop[0]), jax.tree.leaves(scan[0]), strict=True):
    np.testing.assert_allclose(old, new, atol=1e-4)
    changed.append(np.abs(old - new).max())
  start = jax.device_get(programs()["training"][SCAN].run.args[0])
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start, scan[0])
  assert max(jax.tree.leaves(moved)) == pytest.approx(5e-4, rel=0.01)  # Adam's first step


def test_both_programs_find_the_same_captions_none_of_which_ends():
  (tokens, sums), found = (programs()["beam 3"][name].run() for name in (LOOP, SCAN))
  np.testing.assert_array_equal(tokens, found[0])
  np.testing.assert_allclose(sums, found[1], rtol=1e-4)
  assert (tokens != captioning.EOS).all()


def test_the_formula_counts_the_products_of_the_model():
  sizes = Preset(captioner.GuidedCaptioner(200, 32, 64, 48), 16, 96, batch=3, length=8)
  model = sizes.model
  features, tokens = jnp.zeros((3, 16, 96)), jnp.zeros((3, 9), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), features, tokens)["params"]
  losses = captioner.caption_losses(model)
  mean = lambda params, batch: jnp.mean(losses(params, batch))
  batch = {"features": features, "tokens": tokens}
  forward = measure.count_flops(mean, params, batch) / 3
  formula = captioning.product_flops(sizes, 8, training=False)
  assert formula < forward < 1.1 * formula
  both = measure.count_flops(jax.value_and_grad(mean), params, batch) / 3
  formula = captioning.product_flops(sizes, 8, training=True)
  assert formula < both < 1.1 * formula


def test_the_command_prints_and_saves(tmp_path, capsys, monkeypatch):
  fixed = lambda programs, *args: {name: measure.Timing(0.5, 1.0, 0.0) for name in programs}
  monkeypatch.setattr(measure, "time_together", fixed)
  made = programs()
  monkeypatch.setattr(captioning, "make_programs", lambda *args: made)
  config = Config(batch=2, peak=1e-3, save=tmp_path / "out")
  captioning.main(config)
  text = (tmp_path / "out.md").read_text()
  assert text in capsys.readouterr().out
  rows = json.loads((tmp_path / "out.json").read_text())["rows"]
  assert [row["task"] for row in rows] == ["training"] * 2 + ["beam 3"] * 2
  assert [row["program"] for row in rows] == [LOOP, SCAN] * 2
  flops = captioning.product_flops(config.sizes(), 8, training=True)
  for row in rows[:2]:
    assert (row["steps/s"], row["captions/s"]) == (2, 4)
    assert row["MFU"] == pytest.approx(2 * flops / 0.5 / 1e9)
  flops = captioning.product_flops(config.sizes(), 5 * 8, training=False)
  assert rows[3]["MFU"] == pytest.approx(2 * flops / 0.5 / 1e9)
  captioning.main(dataclasses.replace(config, peak=None, save=None))
  assert "peak - Tflop/s" in capsys.readouterr().out  # a CPU is in no table


def test_published_sizes_are_those_of_the_specification():
  config = Config(preset="published", dtype="float32", unroll=2, remat=True)
  sizes = config.sizes()
  assert (sizes.model.unroll, sizes.model.remat, sizes.model.dtype) == (2, True, jnp.float32)
  assert (sizes.num_cells, sizes.feature_dim, sizes.batch) == (196, 2048, 50)
  assert Config(batch=7).sizes().batch == 7


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch": 0}, "batch must be positive, got 0"),
    ({"beam": 0}, "beam must be positive, got 0"),
    ({"peak": -1.0}, "peak must be positive, got -1.0"),
  ],
)
def test_what_cannot_run_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    Config(**changes).check()
