"""Continual language-model training: steps against oracles, devices, processes, resuming, files."""

import csv
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxbo_models import transformer
from PIL import Image

import jaxbo
from scripts.common import checkpoints
from scripts.common import devices as common_devices
from scripts.continual_lm import __main__ as script
from scripts.continual_lm import data as lm_data
from scripts.continual_lm import documents as lm_documents
from scripts.continual_lm import methods as lm_methods
from scripts.continual_lm import plots as lm_plots
from scripts.continual_lm import report as lm_report
from scripts.continual_lm import run as lm_run
from scripts.continual_lm import train as lm_train
from scripts.continual_lm.config import Config
from scripts.continual_lm.methods import METHODS, Rates
from tests.scripts.continual_lm import small_lm

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
pytestmark = pytest.mark.slow  # All together, not each.

RNG = np.random.default_rng(0)
BATCH, LENGTH, DOMAINS = 16, 5, 3
SEQUENCES = lm_data.Sequences(
  RNG.integers(7, size=(40, LENGTH), dtype=np.int32),
  RNG.integers(DOMAINS, size=40, dtype=np.int32),
  RNG.uniform(size=40) < 0.3,
)


def loss_fn(params, batch):
  """Squared errors of a linear model of the tokens."""
  return (batch["tokens"] @ params["w"] - 3.0) ** 2


PARAMS = {"w": jnp.linspace(-0.5, 0.5, LENGTH)}


def devices(number):
  mesh = jax.make_mesh(
    (number,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:number]
  )
  return common_devices.Devices(
    NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
  )


def program(weighting, where, rate=0.1):
  params = jax.device_put(PARAMS, where.everywhere)
  return lm_train.Program(loss_fn, weighting, rate, where), params


def trainer(folder, weighting, where):
  made, params = program(weighting, where)
  return lm_train.Trainer(made, params, SEQUENCES, BATCH, (3, 1), folder, where)


def test_a_step_goes_along_the_gradient_of_the_weighted_losses(monkeypatch):
  """Weights and gradient in float64 NumPy; two steps, the second at other parameters."""
  make = lambda weighting, rate: optax.chain(jaxbo.reweight(weighting), optax.sgd(rate))
  monkeypatch.setattr(lm_methods, "make_optimizer", make)
  where = devices(8)
  one, params = program(METHODS["ir_dro"].weighting(Rates(temperature=2.0), DOMAINS), where, 0.01)
  state, w = one.init(params), np.asarray(PARAMS["w"], np.float64)
  for step in range(2):
    rows = lm_data.rows_of_batch(40, BATCH, (3, 1), step)
    x = SEQUENCES.tokens[rows].astype(np.float64)
    losses = (x @ w - 3) ** 2
    weights = np.exp((losses - losses.max()) / 2)
    weights /= weights.sum()
    w = w - 0.01 * (2 * weights * (x @ w - 3)) @ x
    batch = lm_train.batch_of(SEQUENCES, rows, where)
    state, shown = one.compile(state, batch)(state, batch)
    np.testing.assert_allclose(shown.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(shown.weights, BATCH * weights, rtol=1e-3)
    share = 1 / (weights**2).sum() / BATCH
    np.testing.assert_allclose(shown.effective_sample_size, share, rtol=1e-3)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-4)
  np.testing.assert_array_equal(params["w"], PARAMS["w"])  # not taken over


@pytest.mark.parametrize("name", ["ir_dro_compositional", "group_dro"])
def test_eight_devices_do_what_one_does(name, tmp_path):
  """Methods with a state: losses, weights and parameters after three steps."""
  windows, params = [], []
  for number in (1, 8):
    weighting = METHODS[name].weighting(Rates(), DOMAINS)
    one = trainer(tmp_path / str(number), weighting, devices(number))
    windows += list(one.fit(0, 3, 5))
    if number == 1:  # Weights are those before each update, and groups are domains.
      weigh, state = jax.jit(weighting.weigh), weighting.init()
      for step, rows in enumerate(windows[0].rows):
        losses, shown = windows[0].shown.losses[step], windows[0].shown.weights[step]
        weights, state, _ = weigh(losses, state, groups=SEQUENCES.domain[rows])
        np.testing.assert_allclose(shown, BATCH * weights, rtol=1e-4)
    params.append(jax.device_get(one.state.params))
    one.close()
  chex.assert_trees_all_close(windows[0].shown, windows[1].shown, rtol=1e-4)
  np.testing.assert_array_equal(windows[0].rows, windows[1].rows)
  chex.assert_trees_all_close(*params, rtol=1e-5)


def test_windows_end_at_evaluations_and_at_the_end_and_count_all_steps(tmp_path, monkeypatch):
  clock = types.SimpleNamespace(perf_counter=itertools.count().__next__)
  monkeypatch.setattr(lm_train, "time", clock)
  one = trainer(tmp_path, jaxbo.uniform(), devices(1))
  steps, windows = [], []
  for window in one.fit(0, 5, 2, steps.append):
    windows.append(window)
    one.checkpoints._manager.wait_until_finished()
    assert checkpoints.latest_step(tmp_path) < window.done  # What is done with it comes first.
  one.close()
  assert [window.seconds for window in windows] == [1, 2, 3]
  assert [window.done for window in windows] == [2, 4, 5]
  assert [len(window.rows) for window in windows] == [2, 2, 1]
  assert steps == list(range(5))
  rows = np.concatenate([window.rows for window in windows])
  for step in range(5):
    assert rows[step].tolist() == lm_data.rows_of_batch(40, BATCH, (3, 1), step).tolist()
  assert checkpoints.latest_step(tmp_path) == 5
  assert checkpoints.latest_step(tmp_path / "nowhere") == 0


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
  weighting = METHODS["ir_dro_compositional"].weighting(Rates(), DOMAINS)
  whole = trainer(tmp_path / "whole", weighting, devices(8))
  list(whole.fit(0, 6, 3))
  half = trainer(tmp_path / "half", weighting, devices(8))
  list(half.fit(0, 3, 3))
  half.close()
  again = trainer(tmp_path / "half", weighting, devices(8))
  assert again.restore() == 3
  assert again.seconds == half.seconds
  list(again.fit(3, 6, 3))
  chex.assert_trees_all_equal(again.state, whole.state)
  for one in (whole, again):
    one.close()


def test_evaluation_is_of_every_sequence_once_and_leaves_out_what_fills_the_last_batch():
  evaluate = lm_train.make_evaluate(loss_fn, BATCH, devices(8))
  losses = evaluate(PARAMS, SEQUENCES)  # 40 are two and a half batches
  np.testing.assert_allclose(losses, loss_fn(PARAMS, {"tokens": SEQUENCES.tokens}), rtol=1e-5)


def test_every_method_weighs_as_the_library_does():
  """Band, temperature and level are those of the rates."""
  losses, groups = jnp.asarray(RNG.uniform(1, 4, 16), jnp.float32), jnp.arange(16) % DOMAINS
  rates = Rates(0.7, 0.3, 0.25, 0.6, 0.5, 0.9)
  expected = {
    "uniform": jaxbo.uniform(),
    "ir_dro": jaxbo.kl(0.7),
    "ir_dro_compositional": jaxbo.compositional(jaxbo.kl(0.7), 0.3),
    "mid_rank_0": jaxbo.mid_rank(0.25, 0),
    "mid_rank_1": jaxbo.mid_rank(0.25, 1),
    "mid_rank_3": jaxbo.mid_rank(0.25, 3),
    "lin_upper": jaxbo.lin_upper(0.6),
    "quadratic": jaxbo.quadratic(0.6),
    "extremes": jaxbo.extremes(0.6),
    "cvar": jaxbo.cvar(0.5),
    "group_dro": jaxbo.group(DOMAINS, 0.9),
  }
  assert expected.keys() == METHODS.keys()

  def weigh(weighting):
    _, state, _ = weighting.weigh(losses, weighting.init(), groups=groups)
    return weighting.weigh(losses + 1, state, groups=groups)[0]

  @jax.jit
  def both():
    return {n: (weigh(METHODS[n].weighting(rates, DOMAINS)), weigh(w)) for n, w in expected.items()}

  for mine, theirs in both().values():
    np.testing.assert_array_equal(mine, theirs)


def test_the_optimizer_is_adamw_with_decay_on_clipped_gradients():
  """In float64 NumPy; the gradient of the first step alone is clipped."""
  tx = lm_methods.make_optimizer(jaxbo.uniform(), 0.1)
  w = np.array([2.0, -1.0])
  params = {"w": jnp.asarray(w, jnp.float32)}
  state, update = tx.init(params), jax.jit(tx.update)
  first = second = np.zeros(2)
  for step, gradient in enumerate(([3.0, 4.0], [0.3, -0.1]), 1):
    each = {"w": jnp.asarray([gradient, gradient], jnp.float32)}
    updates, state = update(each, state, params, losses=jnp.ones(2))
    params = optax.apply_updates(params, updates)
    gradient = np.array(gradient) / max(1, np.hypot(*gradient))
    first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
    adam = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
    w = w - 0.1 * (adam + 0.1 * w)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_learning_rates_warm_up_and_then_fall_or_stay():
  first = lm_methods.pretraining_schedule(1.0, 100)
  np.testing.assert_allclose([first(0), first(5), first(100)], [0.2, 1.0, 0.1], rtol=1e-6)
  second = lm_methods.continual_schedule(1.0, 40)
  np.testing.assert_allclose([second(0), second(4), second(39)], [0.25, 1.0, 1.0], rtol=1e-6)
  scratch, hf = Config(), Config(init="hf")
  assert (scratch.sequence_length(), scratch.continual_learning_rate()) == (64, 3e-4)
  assert (hf.sequence_length(), hf.continual_learning_rate()) == (512, 2e-6)


# -- What is said about runs.


def window(weights, rows):
  weights = np.asarray(weights, np.float64)
  losses, share = np.arange(weights.size).reshape(weights.shape), np.linspace(0, 1, len(weights))
  shown = lm_train.Shown(losses, weights, share)
  return lm_train.Window(len(weights), 1.0, shown, np.asarray(rows))


def test_weights_are_told_by_domain_and_noise():
  sequences = lm_data.Sequences(
    np.zeros((4, 1), np.int32),
    np.array([0, 0, 1, 1], np.int32),
    np.array([False, True, False, True]),
  )
  told = lm_report.of_window(window([[1, 3], [0, 4]], [[0, 1], [2, 1]]), sequences, ["a", "b", "c"])
  assert told["train_loss"] == 1.5
  assert told["ess"] == 0.5
  assert told["weight_clean"] == 0.5
  assert told["weight_noise"] == 3.5
  assert told["weight/a"] == pytest.approx(8 / 3)
  assert told["weight/b"] == 0
  assert np.isnan(told["weight/c"])


def test_held_out_losses_count_by_the_mixture():
  """One domain of a quarter with the losses 1 and 2, one of three quarters with 5."""
  sequences = lm_data.Sequences(
    np.zeros((3, 1), np.int32), np.array([0, 0, 1], np.int32), np.zeros(3, bool)
  )
  held_out = lm_data.HeldOut(sequences, np.array([0.125, 0.125, 0.75]))
  told = lm_report.of_held_out(np.array([1.0, 2.0, 5.0]), held_out, ["a", "b"])
  assert told["loss"] == 0.25 * 1.5 + 0.75 * 5
  assert (told["worst"], told["worst_domain"]) == (5, "b")
  assert (told["loss/a"], told["loss/b"]) == (1.5, 5)
  assert (told["median"], told["q90"], told["q99"]) == (5, 5, 5)


def test_a_run_is_the_mean_over_its_steps():
  line = {"step": 4, "seconds": 1.0, "ess": 0.5, "weight_noise": None, "weight/a": 1.0, "loss": 7.0}
  last = line | {"step": 5, "seconds": 2.0, "ess": 1.0, "weight/a": 2.0}
  told = lm_report.of_run([line, last], 5, 100)
  assert told["ess"] == pytest.approx(0.6)
  assert told["weight/a"] == pytest.approx(1.2)
  assert np.isnan(told["weight_noise"])
  assert told["tokens_per_second"] == 250
  assert "loss" not in told


def test_what_weights_look_at_depends_on_the_batch_size_unless_they_are_compositional():
  losses = RNG.uniform(0, 4, 500).astype(np.float32)
  tilted = np.exp(losses) @ losses / np.exp(losses).sum()
  looks = functools.partial(lm_report.weighted_losses, losses=losses, num_batches=4000)
  spread = losses.std() / np.sqrt(4000)
  one, many = looks(jaxbo.kl(1.0), sizes=[1, 256])
  assert abs(one - losses.mean()) < 4 * spread
  assert abs(many - tilted) < 0.02
  [one] = looks(jaxbo.compositional(jaxbo.kl(1.0), 0.05), sizes=[1])
  # The weights' relative second moment is 2, so the standard error is about 1.5 of the plain one.
  assert abs(one - tilted) < 0.05 + 6 * spread


def rows():
  """Two seeds; the method is better by 1 and by 3."""
  numbers = lambda loss: dict.fromkeys(("loss", "worst", "median", "q90", "q99", "loss/a"), loss)
  run = {"corruption": 0.2, "ess": 0.5, "weight_noise": 0.25, "tokens_per_second": 10.0}
  return [
    {"corruption": 0.0, "method": "checkpoint", "seed": 0, **numbers(9.0)},
    {**run, "method": "uniform", "seed": 0, **numbers(5.0)},
    {**run, "method": "uniform", "seed": 1, **numbers(8.0)},
    {**run, "method": "ir_dro", "seed": 0, **numbers(4.0)},
    {**run, "method": "ir_dro", "seed": 1, **numbers(5.0)},
    {**run, "method": "ir_dro", "seed": 2, **numbers(1.0)},  # uniform has no such seed yet
  ]


def test_differences_are_between_runs_of_one_seed():
  assert lm_report.differences(rows(), 0.2, "ir_dro", "loss") == [-1, -3]
  assert lm_report.differences(rows(), 0.2, "checkpoint", "loss") == [4]
  assert lm_report.differences(rows(), 0.0, "ir_dro", "loss") == []


def test_tables_have_means_and_spreads():
  columns, table = lm_report.loss_table(rows(), 0.2, ["a"])
  assert columns == ["method", "seeds", "loss", "worst domain", "a"]
  assert table[1] == ["uniform", "2", "6.500 ± 2.121", "6.500 ± 2.121", "6.500 ± 2.121"]
  columns, table = lm_report.comparison_table(rows(), 0.2, {})
  assert dict(zip(columns, table[2], strict=True)) == {
    "minus uniform": "IR-DRO",
    **dict.fromkeys(("loss", "worst domain", "median", "q90", "q99"), "-2.000 ± 1.414"),
    "ESS": "0.50 ± 0.00",
    "noise weight": "0.25 ± 0.00",
    "tokens/s": "10",
    "time": "-",
  }
  assert table[0][0] == "checkpoint (no training on)"
  assert table[0][6:] == ["-", "-", "-", "-"]


def lines():
  """Curves of IR-DRO; that of seed 2 was stopped, and one of seed 1 has no finite loss."""
  line = {"corruption": 0.2, "method": "ir_dro"}
  found = [
    (0, 2, 4.0, 0.5),
    (0, 4, 3.0, 0.7),
    (1, 2, 6.0, 0.7),
    (1, 4, None, 0.9),
    (2, 2, 9.0, 0.1),
  ]
  names = ("seed", "step", "validation_loss", "ess")
  return [line | dict(zip(names, values, strict=True)) for values in found]


def test_pictures_show_differences_weights_and_curves_of_finished_runs(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(lm_plots.plots, "save", lambda fig, path: figures.append(fig))
  told = [row | {"weight/a": 2.0} for row in rows()]
  told_lines = [*lines(), lines()[0] | {"method": "uniform"}]
  lm_plots.draw_overview(told, told_lines, ["a"], "random", tmp_path)
  looked_at = {"ir_dro": ([1, 2], [3.0, 4.0]), "": ([1, 2], [5.0, 5.0])}
  lm_plots.draw_curves(lines(), {0: 5.0, 1: 7.0, 2: 8.0}, looked_at, "random", tmp_path)
  differences, weights, ess = figures[0].axes
  assert differences.get_title("left") == "20% of the sequences of random tokens: test loss"
  for container, shift in zip(differences.containers, (-0.12, 0.12), strict=True):
    assert container[0].get_xydata().tolist() == [[-2, 1 + shift]]
  assert [text.get_text() for text in weights.texts] == ["2.00", "0.25"] * 2
  ir_dro = {line.get_label(): line for line in ess.lines}["IR-DRO"]
  np.testing.assert_allclose(ir_dro.get_xydata(), [[2, 0.6], [4, 0.8]])
  curves, sizes = figures[1].axes
  np.testing.assert_allclose(curves.lines[0].get_xydata(), [[0, 6], [2, 5], [4, np.nan]])
  assert [line.get_ydata().tolist() for line in sizes.lines] == [[3, 4], [5, 5]]


def test_what_is_looked_at_is_compared_with_uniform_weights_and_with_all_at_once(monkeypatch):
  monkeypatch.setattr(lm_report, "weighted_losses", lambda *_: [])
  losses = np.array([1.0, 3.0])
  looked_at = script.looked_at(Config(rates=Rates(temperature=2.0)), losses)
  assert looked_at["uniform"][1] == [2, 2]
  of_all = (1 + 3 * np.e) / (1 + np.e)
  assert looked_at[""][1] == pytest.approx([of_all, of_all])


def test_only_what_was_asked_for_is_told(tmp_path, capsys):
  config = Config(output_dir=tmp_path, methods=("ir_dro",), corruptions=(0.2,), first_seed=1)
  seeds = [row["seed"] for row in rows() if script.of_this_run(config, row)]
  assert seeds == [1, 2]
  assert not any(script.of_this_run(Config(corruptions=(0.0,)), row) for row in rows())
  data = lm_data.LanguageData(("a",), *[None] * 3)
  outcome = script.Outcome([], rows()[:1])  # Stopped before the first method was done.
  script.print_and_draw(config, data, outcome, script.report.console())
  assert "metrics.jsonl and results.csv are in" in capsys.readouterr().out
  assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_a_run_that_goes_on_keeps_lines_up_to_its_checkpoint(tmp_path):
  config = Config(output_dir=tmp_path)
  (lm_run.checkpoint_folder(config, 0.2, "ir_dro", 0) / "2").mkdir(parents=True)
  assert lm_run.lines_to_keep(config, lines()) == lines()[:1]


def test_a_run_is_the_same_if_all_that_matters_is():
  may_differ = {
    "methods": ("cvar",), "corruptions": (0.5,), "seeds": 9, "first_seed": 9, "timing_rounds": 9,
    "resume": True, "data_dir": Path("x"), "output_dir": Path("x"), "distributed": True,
    "coordinator_address": "x", "num_processes": 9, "process_id": 9,
  }  # fmt: skip
  identity = Config().identity()
  assert Config(**may_differ).identity() == identity
  assert identity.keys() | may_differ == Config.__dataclass_fields__.keys()
  assert Config(rates=Rates(level=0.5)).identity() != identity


# -- Whole runs.

SMALL = {
  "batch_size": 8,
  "length": 16,
  "width": 8,
  "num_heads": 2,
  "num_layers": 1,
  "pretrain_steps": 4,
  "steps": 4,
  "eval_every": 2,
  "seeds": 1,
  "validation_sequences": 2,
  "test_sequences": 2,
  "timing_rounds": 0,
}


@pytest.fixture
def small(monkeypatch):
  """Two small domains on one device, which saves seconds."""
  monkeypatch.setitem(lm_documents.DATASETS, "python", small_lm.corpus)
  monkeypatch.setattr(common_devices, "all_devices", lambda: devices(1))


def lines_of(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows_of(folder):
  return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def test_a_run_writes_its_files_and_a_resumed_one_repeats_nothing(tmp_path, capsys, small):
  more = {"methods": ("uniform",), "corruptions": (0.0, 0.5), "timing_rounds": 1, "eval_every": 4}
  config = Config(output_dir=tmp_path, **SMALL | more)
  assert script.main(config) == 0
  table = capsys.readouterr().out
  for word in ("checkpoint (no training on)", "50% of the sequences with shuffled", "digits"):
    assert word in table
  of_line = lambda line: (line["corruption"], line["method"], line["step"])
  runs = [(0.0, "pretraining"), (0.0, "uniform"), (0.5, "uniform")]
  assert [of_line(line) for line in lines_of(tmp_path)] == [(*run, 4) for run in runs]
  found = rows_of(tmp_path)
  assert [(float(row["corruption"]), row["method"]) for row in found] == [
    (0.0, "checkpoint"),
    *runs[1:],
  ]
  losses = [float(row["loss"]) for row in found]
  assert len(set(losses)) == 3  # Every run has gone somewhere else.
  assert all(0 < loss < 8 for loss in losses)
  assert float(found[2]["weight_noise"]) == pytest.approx(1)  # uniform weights
  for name in script.PICTURES:
    with Image.open(tmp_path / name) as picture:
      assert picture.width > 100
  metrics = (tmp_path / "metrics.jsonl").read_text()
  assert script.main(dataclasses.replace(config, resume=True)) == 0
  assert (tmp_path / "metrics.jsonl").read_text() == metrics
  assert rows_of(tmp_path) == found
  less = dataclasses.replace(config, resume=True, corruptions=(0.5,))
  assert script.main(less) == 0
  without_time = lambda rows: sorted(
    tuple(v for k, v in row.items() if "second" not in k) for row in rows
  )
  assert without_time(rows_of(tmp_path)) == without_time(found)  # Nothing is lost.

  for wrong, message in (
    ({}, "has checkpoints of an earlier run"),
    ({"resume": True, "width": 4}, "width must be 8 to resume, got 4"),
  ):
    assert script.main(dataclasses.replace(config, **wrong)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_weights_from_a_folder_are_trained_on_as_they_are(family, tmp_path, small):
  """The checkpoint has the loss of the model that was read; OPT has another end of a text."""
  end = "</s>" if family == "opt" else "<|endoftext|>"
  folder = shutil.copytree(GOLDEN / family, tmp_path / "model")
  letters = [end, *"abcdefghijklmnopqrstuvwxyz0123456789Ġ"]  # Ġ is a space.
  (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  hf = {"init": "hf", "model_dir": folder, "methods": ("uniform",), "corruptions": (0.0,)}
  config = Config(output_dir=tmp_path / "out", **SMALL | hf | {"steps": 1})
  language, data = script.read(config)
  assert data.train.tokens[0].tolist() == [
    letters.index(letter.replace(" ", "Ġ")) for letter in small_lm.WORDS[:16]
  ]
  assert language.tokenizer.end_of_text == 0
  model, params = transformer.from_safetensors(folder)
  tokens = jnp.asarray(data.test.sequences.tokens)
  if family == "opt":
    losses = jax.jit(transformer.sequence_losses(model))(params, {"tokens": tokens})
    assert script.main(config) == 0
    checkpoint, uniform = rows_of(tmp_path / "out")
    assert float(checkpoint["loss"]) == pytest.approx(float(data.test.weights @ losses), rel=1e-5)
    assert 0 < abs(float(uniform["loss"]) - float(checkpoint["loss"])) < 1e-2  # A step of 2e-6.
    assert [line["method"] for line in lines_of(tmp_path / "out")] == ["uniform"]
  with pytest.raises(ValueError, match="length must be at most 16, that of the model; got 17"):
    script.read(dataclasses.replace(config, length=17))
  more = letters + [f"{i}#" for i in range(13)]
  (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(more)}))
  with pytest.raises(ValueError, match="must have at most the model's 50 tokens, got 51 in"):
    script.read(config)


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"dataset": "c4"}, "dataset must be one of python, text_domains, tiny_shakespeare; got 'c4'"),
    ({"init": "zeros"}, "init must be one of scratch, hf; got 'zeros'"),
    ({"init": "hf"}, "model_dir must be given with init=hf and only then, got None"),
    ({"methods": ("magic",)}, "methods must be among uniform, ir_dro, "),
    ({"methods": ("uniform", "uniform")}, "methods must name each one once"),
    ({"corruptions": (1.0,)}, "corruptions must be in [0, 1), got (1.0,)"),
    ({"corruptions": ()}, "corruptions must name each one once, got"),
    ({"corruption_kind": "typos"}, "corruption_kind must be one of shuffled, random; got 'typos'"),
    ({"steps": 0}, "steps must be positive, got 0"),
    ({"learning_rate": -1.0}, "learning_rate must be positive and finite, got -1.0"),
    ({"learning_rate": np.nan}, "learning_rate must be positive and finite, got nan"),
    ({"pretrain_steps": 1}, "pretrain_steps must be at least 2, got 1"),
    ({"first_seed": -1}, "first_seed must be at least 0, got -1"),
    ({"rates": Rates(temperature=-1.0)}, "temperature must be positive"),
    ({"batch_size": 12}, "batch_size must be a multiple of the number of devices, 8, got 12"),
    ({"batch_size": 800_000}, "batch_size must be at most"),
    ({"length": 100_000}, "length must leave a sequence of every domain"),
    ({"width": 9}, "width must be a multiple of num_heads"),
    ({"process_id": 0}, "coordinator_address, num_processes and process_id must be given together"),
    ({"coordinator_address": "x:1"}, "num_processes and process_id must be given together"),
    (
      {"coordinator_address": "x:1", "num_processes": 2, "process_id": 2},
      "process_id must be at least 0 and below num_processes = 2, got 2",
    ),
    ({"resume": True}, "resume needs an earlier run in output_dir"),
    ({"dataset": "text_domains", "data_dir": Path("/nowhere")}, "no text_domains in /nowhere"),
    ({"output_dir": Path("/dev/null/x")}, "output_dir must be a folder to write to"),
  ],
)
def test_bad_input_says_what_is_allowed(tmp_path, capsys, small, wrong, message):
  assert script.main(Config(**(SMALL | {"output_dir": tmp_path / "out"} | wrong))) == 2
  assert message in capsys.readouterr().err


def command(output_dir, *more):
  """24 steps of IR-DRO with a moving average, in one process or a part of it."""
  arguments = SMALL | {
    "steps": 24,
    "eval_every": 4,
    "methods": "ir_dro_compositional",
    "corruptions": "0.2",
  }
  arguments["output_dir"] = output_dir
  flags = [part for k, v in arguments.items() for part in (f"--{k.replace('_', '-')}", str(v))]
  return [sys.executable, "-m", "tests.scripts.continual_lm.small_lm", *flags, *more]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """One device a process, whatever the tests around have."""
  return os.environ | {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),  # Compiled once, for all.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode")),  # So is Python's.
    "PYTHONDONTWRITEBYTECODE": "",
  }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
  """The folder of a run that nothing has stopped."""
  folder = tmp_path_factory.mktemp("whole")
  subprocess.run(command(folder), check=True, env=environment, capture_output=True)
  return folder


RUN = "ir_dro_compositional_seed0_noise0.2"


def final_state(folder):
  with ocp.CheckpointManager(folder / "checkpoints" / RUN) as manager:
    assert manager.latest_step() == 24
    # The devices of two processes are not here.
    args = ocp.args.StandardRestore(
      fallback_sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    return jax.device_get(manager.restore(24, args=args)["state"])


def without_time(folder):
  return [line | {"seconds": 0} for line in lines_of(folder)]


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole, environment):
  metrics = tmp_path / "metrics.jsonl"
  process = subprocess.Popen(command(tmp_path), env=environment, stdout=-3, stderr=-3)
  while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  assert process.wait(timeout=300) == -signal.SIGKILL
  assert len(lines_of(tmp_path)) < 7  # It was stopped before the end.
  subprocess.run(command(tmp_path, "--resume"), check=True, env=environment, capture_output=True)
  chex.assert_trees_all_equal(final_state(tmp_path), final_state(whole))
  assert all((line["ess"] < 1) == (line["method"] != "pretraining") for line in lines_of(whole))
  assert without_time(tmp_path) == without_time(whole)


def test_two_processes_do_what_one_does(tmp_path, whole, environment):
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    address = f"localhost:{listener.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      command(
        tmp_path, "--coordinator-address", address, "--num-processes", "2", "--process-id", str(i)
      ),
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert ["The report." in output for output in outputs] == [True, False]
  chex.assert_trees_all_close(
    final_state(tmp_path)["params"], final_state(whole)["params"], atol=1e-3
  )
  for mine, theirs in zip(lines_of(tmp_path), lines_of(whole), strict=True):
    for name in ("train_loss", "validation_loss", "ess", "weight_clean"):
      assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name
