"""The benchmark of language models counts what the model computes, and reports it."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import transformer

from benchmarks import language_model, measure
from benchmarks.hypergradient import Step
from benchmarks.language_model import PLAIN, REWEIGHTED, Config

pytestmark = pytest.mark.slow

WIDE = {"vocab_size": 512, "max_length": 64, "num_layers": 3, "width": 128, "num_heads": 4}


@pytest.fixture(scope="module")
def steps():
  return language_model.make_steps(Config(batch=4, length=32), 32)


@pytest.mark.parametrize("family", [transformer.gpt2, transformer.opt, transformer.pythia])
def test_the_formula_counts_the_products_of_the_model(family):
  config = family(**WIDE)
  model, tokens = transformer.Transformer(config), jnp.zeros((4, 64), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  loss_fn = transformer.sequence_losses(model)
  gradient = jax.grad(lambda params, tokens: jnp.mean(loss_fn(params, {"tokens": tokens})))
  counted = measure.count_flops(gradient, params, tokens) / tokens.size
  formula = language_model.flops_per_token(config, params, 64)
  assert formula < counted < 1.25 * formula  # Softmax, normalization and the like are small.
  longer = language_model.flops_per_token(config, params, 128) - formula
  assert longer == 12 * 3 * 128 * 64


def test_gpt2_takes_six_operations_a_parameter_and_those_of_attention():
  model = transformer.Transformer(transformer.gpt2())
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  expected = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
  assert language_model.flops_per_token(transformer.gpt2(), params, 1024) == expected


def test_both_programs_train_on_the_same_losses_and_differ_in_their_weights(steps):
  plain, reweighted = (steps[name]() for name in (PLAIN, REWEIGHTED))
  assert plain[2] == pytest.approx(math.log(257), rel=0.02)
  assert reweighted[2] == pytest.approx(float(plain[2]), rel=1e-3)
  differs = jax.tree.map(lambda a, b: np.any(np.not_equal(a, b)), plain[0], reweighted[0])
  assert all(jax.tree.leaves(differs))
  flops = {n: measure.count_flops(s.fn, *s.args, while_steps=0) for n, s in steps.items()}
  assert flops[REWEIGHTED] >= flops[PLAIN] > 0


def test_the_options_of_a_sweep_change_what_a_step_costs_and_not_what_it_does(steps):
  """In float32, where nothing is rounded in another place."""
  variants = Config(batch=4, length=32, dtype="float32", sweep=True).variants()
  assert len(variants) == 5
  first, last = (
    language_model.make_steps(variants[n], 32)[REWEIGHTED]
    for n in ("as given", "products kept, the rest computed again")
  )
  (params, _, loss), (expected_params, _, expected_loss) = last(), first()
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), params, expected_params)
  assert "f32[4,32,257]" in str(jax.make_jaxpr(first.fn)(*first.args))
  assert "f32[4,32,257]" not in str(jax.make_jaxpr(last.fn)(*last.args))


def test_the_command_prints_and_saves(tmp_path, capsys, monkeypatch, steps):
  fixed = lambda programs, *args: {name: measure.Timing(0.5, 1.0, 0.0) for name in programs}
  monkeypatch.setattr(measure, "time_together", fixed)
  monkeypatch.setattr(measure, "temporary_bytes", lambda compiled: 2**20)
  idle = {name: Step(jax.jit(lambda *args: 0), step.args) for name, step in steps.items()}
  monkeypatch.setattr(language_model, "make_steps", lambda *args: idle)
  config = Config(batch=4, length=32, peak=1e-3, save=tmp_path / "out")
  language_model.main(config)
  text = (tmp_path / "out.md").read_text()
  assert text in capsys.readouterr().out
  data = json.loads((tmp_path / "out.json").read_text())
  assert [row["step"] for row in data["rows"]] == [PLAIN, REWEIGHTED]
  per_token = language_model.flops_per_token(config.model(), steps[PLAIN].args[0], 32)
  for row in data["rows"]:
    assert row["tokens/s"] == 4 * 32 / 0.5
    assert row["MFU"] == pytest.approx(256 * per_token / 1e9)
  language_model.main(dataclasses.replace(config, peak=None, save=None))
  assert "peak - Tflop/s" in capsys.readouterr().out  # a CPU is in no table


@pytest.mark.parametrize(
  "kind, peak",
  [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("TPU v5 lite", 197e12)],
)
def test_peaks_are_found_by_the_name_of_the_device(kind, peak, monkeypatch):
  device = type("Device", (), {"device_kind": kind})
  monkeypatch.setattr(jax, "devices", lambda: [device])
  assert language_model.peak_flops(None) == peak
  assert language_model.peak_flops(2.0) == 2e12


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch": 0}, "batch must be positive, got 0"),
    ({"peak": -1.0}, "peak must be positive, got -1.0"),
    ({"length": 65}, r"length must be in \[2, 64\], got 65"),
  ],
)
def test_what_cannot_run_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    Config(**changes).check()
