"""Adversarial training: methods against oracles, devices, resuming, tables, files."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

import jaxbo
from scripts.adversarial_training import __main__ as script
from scripts.adversarial_training import data as adv_data
from scripts.adversarial_training import pictures as adv_pictures
from scripts.adversarial_training import report as adv_report
from scripts.adversarial_training import train as adv_train
from scripts.adversarial_training.config import Config
from scripts.adversarial_training.evaluate import Evaluator
from scripts.adversarial_training.methods import GRIDS, METHODS, Method, Parts, Rates, Setting, lazy
from scripts.common import checkpoints
from scripts.common import devices as common_devices

pytestmark = pytest.mark.slow  # All together, not each.

RNG = np.random.default_rng(0)
NAMES = ("round", "square", "flat", "long")
EPSILON, NUM_STEPS = 0.1, 3


def make_images(number):
  """Four classes, each bright in a place of its own."""
  labels = np.arange(number, dtype=np.int32) % 4
  images = RNG.integers(0, 100, (number, 8, 8, 1))
  for label in range(4):
    images[labels == label, 2 * label : 2 * label + 2] += 120
  return adv_data.Images(images.astype(np.uint8), labels)


DATA = adv_data.split_up(make_images(320), make_images(80), NAMES, 4, 4)


def model(params, images):
  """A linear model with a bend, so that the gradient depends on the image."""
  return jnp.tanh(images.reshape(len(images), -1) @ params["w"])


PARAMS = {"w": jnp.asarray(RNG.normal(size=(64, 4)), jnp.float32) / 4}
BATCH = jnp.asarray(DATA.pool.images[:16], jnp.float32) / 255, jnp.asarray(DATA.pool.labels[:16])
SETTING = Setting(model, EPSILON, NUM_STEPS, Rates(step_size=0.5))
KEY = jax.random.key(1)


def mean_cross_entropy(params, images, weights):
  log_p = jax.nn.log_softmax(model(params, images))
  return -jnp.sum(weights * log_p[jnp.arange(len(images)), BATCH[1]])


@pytest.fixture(scope="module")
def gradients():
  """Weighted gradients of all methods, early and late in the training, in one program."""

  @jax.jit
  def all_of_them(params, batch):
    found = {}
    for name, method in METHODS.items():
      parts = method.make(SETTING)
      tx = jaxbo.reweight(parts.weighting)
      for progress in (0.0, 1.0):
        key = jax.random.clone(KEY)
        grads, extra = parts.gradients(params, batch, key, jnp.float32(progress))
        found[name, progress] = tx.update(grads, tx.init(params), params, **extra)[0]
    return found

  return all_of_them(PARAMS, BATCH)


def close(a, b):
  chex.assert_trees_all_close(a, b, rtol=2e-4, atol=1e-6)


def attacked(**options):
  attack = jaxbo.pgd(model, epsilon=EPSILON, step_size=EPSILON / 4, num_steps=NUM_STEPS, **options)
  return attack.run(PARAMS, BATCH, jax.random.clone(KEY))


gradient_of = jax.jit(jax.grad(mean_cross_entropy))
UNIFORM = np.full(16, 1 / 16, np.float32)


def test_plain_training_is_on_the_mean_cross_entropy_of_what_pgd_finds(gradients):
  expected = gradient_of(PARAMS, attacked()[0], UNIFORM)
  close(gradients["at", 0.0], expected)
  close(gradients["at", 1.0], expected)


def test_kl_weights_are_a_softmax_of_the_losses(gradients):
  images = attacked()[0]
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(model(PARAMS, images), BATCH[1])
  weights = jax.nn.softmax(losses / SETTING.rates.temperature)
  close(gradients["at_kl", 0.0], gradient_of(PARAMS, images, weights))


def test_friendly_training_stops_early_at_first_and_later_later(gradients):
  for progress, steps in ((0.0, 0), (1.0, 2)):
    images = attacked(stop_after=steps)[0]
    close(gradients["fat", progress], gradient_of(PARAMS, images, UNIFORM))
  assert np.abs(gradients["fat", 0.0]["w"] - gradients["at", 0.0]["w"]).max() > 1e-4


def test_gairat_and_mail_begin_uniform_and_then_weigh_by_steps_and_margins(gradients):
  images, info = attacked()
  plain = gradient_of(PARAMS, images, UNIFORM)
  p = np.asarray(jax.nn.softmax(model(PARAMS, images)), np.float64)
  of_label = p[np.arange(16), BATCH[1]]
  others = np.where(np.eye(4)[BATCH[1]] > 0, -1, p).max(axis=1)
  expected = {
    "gairat": 1 + np.tanh(-1 + 5 * (1 - 2 * np.asarray(info.num_correct) / NUM_STEPS)),
    "mail": 1 / (1 + np.exp(-10 * (others - of_label - 0.5))),
  }
  assert len(set(np.asarray(info.num_correct).tolist())) > 1
  for name, weights in expected.items():
    close(gradients[name, 0.0], plain)
    weights = (weights / weights.sum()).astype(np.float32)
    close(gradients[name, 1.0], gradient_of(PARAMS, images, weights))


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_trades_and_mart_look_at_clean_and_attacked_images(name, gradients):
  options = {"objective": "kl", "random_start": 1e-3} if name == "trades" else {}
  images = attacked(**options)[0]
  loss = {"trades": jaxbo.trades_loss, "mart": jaxbo.mart_loss}[name]
  beta = {"trades": 6.0, "mart": 5.0}[name]

  def mean(params):
    return jnp.mean(loss(model(params, BATCH[0]), model(params, images), BATCH[1], beta))

  close(gradients[name, 0.0], jax.jit(jax.grad(mean))(PARAMS))


def test_done_and_fast_bat_have_the_implicit_term_of_the_library(gradients):
  loss = lambda p, x, y: jaxbo.cross_entropy_loss(model(p, x), y)
  margin = lambda p, x, y: -jaxbo.margin_loss(model(p, x), y)
  rates, common = SETTING.rates, {"epsilon": EPSILON}
  of_done = {"barrier": rates.barrier, "num_steps": NUM_STEPS, "curvature": rates.curvature}

  @jax.jit
  def of_library(params, batch):
    by = {
      "done": jaxbo.done_grad(loss, margin, step_size=0.5, **of_done, **common),
      "done_adam": jaxbo.done_grad(
        loss, margin, step_size=0.25 * EPSILON, direction="adam", **of_done, **common
      ),
      "fast_bat": jaxbo.fast_bat_grad(
        loss, lambda *a: -loss(*a), step_size=rates.fast_bat_step_size, **common
      ),
    }
    gradients = {}
    for name, gradient in by.items():
      weighting = jaxbo.uniform() if name == "fast_bat" else jaxbo.kl(rates.temperature)
      tx = jaxbo.reweight(weighting)
      grads = gradient(params, batch, jax.random.clone(KEY))
      gradients[name] = tx.update(grads, tx.init(params), params)[0]
    return gradients

  for name, expected in of_library(PARAMS, BATCH).items():
    close(gradients[name, 1.0], expected)


def test_what_is_varied_are_rates_that_methods_have():
  names = {field.name for field in dataclasses.fields(Rates)}
  assert all(set(grid) <= names for grid in GRIDS.values())
  assert set(GRIDS) <= set(METHODS)


# -- Training.


def devices(number):
  mesh = jax.make_mesh(
    (number,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:number]
  )
  return common_devices.Devices(
    NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
  )


def trainer(folder, where, augment=False, rise=0.0, method=METHODS["done"]):
  """Four epochs of two batches; of DONE, whose weights have a memory."""
  program = adv_train.Program(method, SETTING, rise, optax.sgd(0.1), 8, augment, where)
  pool = adv_data.Images(*jax.device_put(tuple(DATA.pool), where.everywhere))
  params = jax.device_put(PARAMS, where.everywhere)
  return adv_train.Trainer(program, params, pool, np.arange(40), 16, (3, 1), folder, where)


def test_eight_devices_do_what_one_does():
  told, states = [], []
  for number in (1, 8):
    one = trainer(None, devices(number))
    told.append([loss for _, loss in one.fit(0, 2)])
    states.append(jax.device_get(one.state.params))
    assert one.state.num_done == 4
  chex.assert_trees_all_close(*told, rtol=1e-4)
  chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-6)
  assert 0 < told[0][0].ess < 1
  assert told[0][1].loss < told[0][0].loss
  [(_, easy)] = trainer(None, devices(1), rise=1.0).fit(0, 1)  # A quarter of epsilon at most.
  assert easy.loss < told[0][0].loss - 0.05


def test_steps_know_how_far_training_is_and_have_keys_of_their_own():
  def losses(values_of):
    def make(setting):
      def gradients(params, batch, key, progress):
        values = values_of(setting, key, progress) * jnp.ones(len(batch[1]))
        return lazy(lambda params, values: values + 0 * params["w"].sum(), params, values), {}

      return Parts(gradients, jaxbo.uniform())

    one = trainer(None, devices(1), rise=0.5, method=Method("probe", make))
    return [told.loss for _, told in one.fit(0, 4)]

  done = losses(lambda setting, key, progress: progress)
  np.testing.assert_allclose(done, np.array([1, 5, 9, 13]) / 16)
  radii = losses(lambda setting, key, progress: setting.epsilon / SETTING.epsilon)
  np.testing.assert_allclose(radii, [0.375, 0.875, 1, 1], rtol=1e-6)
  assert len({float(u) for u in losses(lambda s, key, p: jax.random.uniform(key))}) == 4


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
  where = devices(8)
  whole = trainer(tmp_path / "whole", where, augment=True)
  list(whole.fit(0, 3))
  half = trainer(tmp_path / "half", where, augment=True)
  list(half.fit(0, 1))
  half.close()
  again = trainer(tmp_path / "half", where, augment=True)
  assert again.restore() == 1
  assert again.seconds == half.seconds
  list(again.fit(1, 3))
  chex.assert_trees_all_equal(again.state, whole.state)
  for one in (whole, again):
    one.close()
  assert checkpoints.latest_step(tmp_path / "half") == 3


# -- What is said about runs.


def rows():
  """Two seeds; DONE gains 2 and 4 points of the tail, and loses 1 of clean accuracy."""
  row = lambda method, seed, clean, tail: {
    "set": "long_tailed",
    "method": method,
    "seed": seed,
    "clean": clean,
    "tail": tail,
    **dict.fromkeys(("pgd", "worst", "worst_class"), 50.0),
    "tail_loss": 2.0,
    "doubts": "gradients are zero" if (method, seed) == ("at", 1) else "",
    "seconds_per_epoch": 1.0,
  }
  return [row("at", 0, 80.0, 20.0), row("at", 1, 82.0, 30.0),
          row("done", 0, 79.0, 22.0), row("done", 1, 81.0, 34.0),
          row("done", 2, 10.0, 10.0)]  # fmt: skip


LABELS = {name: method.label for name, method in METHODS.items()}


def test_tables_have_means_and_spreads_and_gains_are_of_pairs():
  columns, table = adv_report.table(rows(), "long_tailed", LABELS)
  assert columns[:3] == ["method", "seeds", "clean"]
  same = ["50.0 ± 0.0"]
  means = ["81.0 ± 1.4", *2 * same, "25.0 ± 7.1", *same, "2.00 ± 0.00", "1.00 ± 0.00"]
  assert table[0] == ["AT", "2", *means]
  columns, table = adv_report.difference_table(rows(), "long_tailed", "at", LABELS)
  assert columns[0] == "minus AT"
  gains = ["-1.0 ± 0.0", "0.0 ± 0.0", "0.0 ± 0.0", "3.0 ± 1.4", "0.0 ± 0.0", "0.00 ± 0.00"]
  assert table == [["DONE, GD", *gains]]
  assert adv_report.doubts(rows(), LABELS) == ["long-tailed, AT, seed 1: gradients are zero"]
  assert adv_report.runs_of(rows(), "balanced") == {}


def test_the_loss_of_the_tail_is_the_mean_of_the_highest_tenth():
  model = lambda params, images: images.reshape(len(images), -1) @ params
  images = np.random.default_rng(0).uniform(size=(25, 1, 1, 2)).astype(np.float32)
  labels = np.arange(25) % 3
  params = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
  logits = images.reshape(25, 2) @ np.asarray(params)
  losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(25), labels]
  found = []
  for epsilon in (1e-6, 0.1):
    evaluator = Evaluator(model, Config(epsilon=epsilon, test_batch_size=10, test_steps=3))
    found.append(evaluator.tail_loss(params, images, labels))
  assert found[0] == pytest.approx(np.sort(losses)[-2:].mean(), rel=1e-4)  # Hardly an attack.
  assert found[1] > found[0] + 0.1


def test_the_attacks_of_the_report_are_those_that_are_asked_for(monkeypatch):
  asked = []
  for name in ("pgd", "apgd"):
    monkeypatch.setattr(jaxbo, name, lambda model, **options: asked.append(options))
  Evaluator(model, Config(epsilon=0.2, test_steps=7, worst_steps=5, num_targets=2))
  pgd, apgd, targeted = asked
  assert pgd == {"epsilon": 0.2, "step_size": 0.05, "num_steps": 7}
  assert apgd == {"epsilon": 0.2, "num_steps": 5}
  assert targeted == apgd | {"objective": "targeted_dlr", "num_targets": 2}


# -- Whole runs.

SMALL = {
  "sets": ("long_tailed",),
  "largest": 20,
  "ratio": 4.0,
  "epochs": 2,
  "batch_size": 8,
  "widths": (2, 3),
  "num_hidden": 4,
  "attack_steps": 2,
  "seeds": 1,
  "validation_per_class": 4,
  "test_per_class": 4,
  "test_steps": 2,
  "worst_steps": 2,
  "num_targets": 1,
  "test_batch_size": 16,
}


@pytest.fixture
def small(monkeypatch):
  """Small images on one device, which saves seconds."""
  monkeypatch.setattr(adv_data, "read", lambda *arguments: DATA)
  monkeypatch.setattr(common_devices, "all_devices", lambda: devices(1))


class LookedAt(NamedTuple):
  """Images and parameters of all evaluations, and the parameters of all pictures."""

  images: list
  params: list
  drawn: list


@pytest.fixture
def looked_at(monkeypatch):
  """Evaluates clean images alone and draws nothing."""
  seen = LookedAt([], [], [])

  def of_test(self, params, part, names):
    seen.images.append(part)
    seen.params.append(params)
    names = ["clean", "pgd", "worst", "tail", "worst_class", "tail_loss"]
    names += [f"robust/{name}" for name in NAMES]
    return dict.fromkeys(names, self.accuracy(params, part)) | {"doubts": ""}

  monkeypatch.setattr(Evaluator, "of_test", of_test)
  draw = lambda config, data, runner: seen.drawn.append(dict(runner.outcome.params))
  monkeypatch.setattr(adv_pictures, "draw", draw)
  return seen


def lines_of(folder):
  return [
    json.loads(line) | {"seconds": 0}
    for line in (folder / "metrics.jsonl").read_text().splitlines()
  ]


def rows_of(folder):
  found = csv.DictReader((folder / "results.csv").read_text().splitlines())
  return [row | {"seconds_per_epoch": 0} for row in found]


def test_a_run_prints_tables_and_draws(tmp_path, capsys, small):
  config = Config(output_dir=tmp_path, **SMALL | {"epochs": 1, "methods": ("at", "done")})
  assert script.main(config) == 0
  table = capsys.readouterr().out
  for word in (
    "long-tailed (20 to 5 images of a class)",
    "DONE, GD",
    "gain over AT",
    "worst class",
  ):
    assert word in table
  assert [(line["method"], line["epoch"]) for line in lines_of(tmp_path)] == [
    ("at", 1),
    ("done", 1),
  ]
  for name in (adv_pictures.PER_CLASS, adv_pictures.WEIGHTS, adv_pictures.EXAMPLES):
    with Image.open(tmp_path / name) as picture:
      assert picture.width > 100
  for row in rows_of(tmp_path):
    assert 0 <= float(row["worst"]) <= float(row["pgd"]) <= float(row["clean"]) <= 100
    classes = sorted(float(row[f"robust/{name}"]) for name in NAMES)
    assert float(row["worst"]) == pytest.approx(np.mean(classes))  # As many images of each.
    assert float(row["worst_class"]) == classes[0]
    assert float(row["tail_loss"]) > 0
    assert float(row["tail"]) == pytest.approx(np.mean(classes[:2]))  # 30 % of four


def test_an_interrupted_run_says_what_there_is_and_goes_on_bit_for_bit(
  tmp_path, capsys, small, looked_at, monkeypatch
):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  config = Config(output_dir=whole, **SMALL | {"methods": ("at_kl",), "seeds": 2})
  assert script.main(config) == 0
  assert looked_at.drawn[0]["long_tailed", "at_kl"] is looked_at.params[0]  # The first seed's.
  write, left = script.report.MetricsLog.write, [4]

  def until_it_breaks(self, **values):
    left[0] -= 1
    if left[0] == 0:
      raise KeyboardInterrupt
    write(self, **values)

  monkeypatch.setattr(script.report.MetricsLog, "write", until_it_breaks)
  config = dataclasses.replace(config, output_dir=broken)
  assert script.main(config) == 130
  assert "Interrupted; --resume goes on" in capsys.readouterr().out
  assert [(line["seed"], line["epoch"]) for line in lines_of(broken)] == [(0, 1), (0, 2), (1, 1)]
  assert script.main(dataclasses.replace(config, resume=True)) == 0
  assert lines_of(broken) == lines_of(whole)
  assert rows_of(broken) == rows_of(whole)
  assert script.main(dataclasses.replace(config, resume=True, seeds=1)) == 0
  assert sorted(row["seed"] for row in rows_of(broken)) == ["0", "1"]  # Nothing is lost.
  assert len({line["train_loss"] for line in lines_of(whole)}) == 4
  assert all(part is DATA.test for part in looked_at.images)

  for wrong, message in (
    ({}, "has checkpoints of an earlier run"),
    ({"resume": True, "epsilon": 0.2}, "epsilon must be None to resume, got 0.2"),
  ):
    assert script.main(dataclasses.replace(config, **wrong)) == 2
    assert message in capsys.readouterr().err


def test_rates_are_varied_one_at_a_time_on_validation_images(
  tmp_path, capsys, small, looked_at, monkeypatch
):
  monkeypatch.setitem(GRIDS, "at_kl", {"temperature": (1.0, 3.0)})
  config = Config(output_dir=tmp_path, **SMALL | {"methods": ("at_kl",)})
  assert script.main(dataclasses.replace(config, tune=True)) == 0
  table = capsys.readouterr().out
  assert "AT + KL weights, as given" in table
  assert "AT + KL weights, temperature 1" in table
  assert [part is DATA.validation for part in looked_at.images] == [True, True]
  found = list(csv.DictReader((tmp_path / "tune.csv").read_text().splitlines()))
  assert [row["changed"] for row in found] == ["as given", "temperature 1"]
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"dataset": "imagenet"}, "dataset must be one of mnist, fashion_mnist, cifar10, cifar10_sub"),
    ({"methods": ("magic",)}, "methods must be among at, trades, "),
    ({"methods": ("at", "at")}, "methods must name each one once, got at at"),
    ({"sets": ()}, "sets must be among balanced, long_tailed, step; got none"),
    ({"epsilon": -0.1}, "epsilon must be positive, got -0.1"),
    ({"epsilon": 1.5}, "epsilon must be at most 1, the range of pixels; got 1.5"),
    ({"epsilon_rise": 1.5}, "epsilon_rise must be at most 1, got 1.5"),
    ({"attack_steps": 0}, "attack_steps must be positive, got 0"),
    ({"worst_steps": 0}, "worst_steps must be positive, got 0"),
    ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
    ({"first_seed": -1}, "first_seed must be at least 0, got -1"),
    ({"ratio": 0.5}, "ratio must be in [1, 20], got 0.5"),
    ({"ratio": 30.0}, "ratio must be in [1, 20], got 30.0"),
    ({"largest": 1000}, "largest must leave enough images of every class"),
    ({"batch_size": 12}, "batch_size must be a multiple of the number of devices, 8, got 12"),
    ({"batch_size": 80}, "batch_size must be at most 44, the images for training; got 80"),
    ({"rates": Rates(temperature=0.0)}, "temperature must be positive, got 0.0"),
    ({"rates": Rates(trades_beta=-1.0)}, "trades_beta must be at least 0, got -1.0"),
    ({"rates": Rates(mail_begin=2.0)}, "mail_begin must be in [0, 1], got 2.0"),
    ({"rates": Rates(fat_steps=(0.5, 0.2))}, "fat_steps must be two shares that do not fall"),
    ({"rates": Rates(temperature=np.inf)}, "temperature must be finite, got inf"),
    ({"rates": Rates(gairat_shift=np.nan)}, "gairat_shift must be finite, got nan"),
    ({"rates": Rates(mail_slope=-1.0)}, "mail_slope must be at least 0, got -1.0"),
    ({"rates": Rates(fast_bat_curvature=0.0)}, "fast_bat_curvature must be positive, got 0.0"),
    ({"widths": (0, 3)}, "widths must be positive, got (0, 3)"),
    ({"rates": Rates(compositional_rate=0.0)}, "compositional_rate must be in (0, 1], got 0.0"),
    ({"resume": True}, "resume needs an earlier run in output_dir"),
    ({"resume": True, "tune": True}, "resume must not be given with tune"),
    ({"output_dir": Path("/dev/null/x")}, "output_dir must be a folder to write to"),
    ({"output_dir": Path("/dev/null/x"), "tune": True}, "output_dir must be a folder to write to"),
  ],
)
def test_bad_input_says_what_is_allowed(tmp_path, capsys, small, wrong, message):
  both = {"sets": ("balanced", "long_tailed"), "methods": ("at", "done")}
  config = Config(**(SMALL | both | {"output_dir": tmp_path / "out"} | wrong))
  assert script.main(config) == 2
  assert message in capsys.readouterr().err


def test_labels_beyond_the_classes_and_missing_images_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="no mnist in"):
    script.read(Config(dataset="mnist", data_dir=tmp_path))
  with pytest.raises(ValueError, match="validation_per_class must leave enough images"):
    adv_data.split_up(make_images(30), make_images(30), NAMES, 11, 4)
