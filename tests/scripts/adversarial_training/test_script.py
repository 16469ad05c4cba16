"""Adversarial training: methods against oracles, devices, tables, whole runs."""

import contextlib
import functools
import io
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from PIL import Image

import jaxbo
from scripts.adversarial_training import __main__ as script
from scripts.adversarial_training import data as adv_data
from scripts.adversarial_training import plots, tuning
from scripts.adversarial_training.config import Config
from scripts.adversarial_training.evaluate import TEMPERATURES, Evaluator
from scripts.adversarial_training.methods import METHODS, Method, Parts, Rates, Setting, lazy
from scripts.adversarial_training.train import State, make_program
from scripts.common.study import Results
from tests.scripts.adversarial_training import small
from tests.scripts.adversarial_training.small import NAMES
from tests.scripts.common.processes import check_two_do_what_one_does, some_devices
from tests.scripts.common.stopped import programs_kept, stopped_after

pytestmark = pytest.mark.slow  # All together, not each.

DATA = small.make_data()
RNG = np.random.default_rng(0)
EPSILON, NUM_STEPS = 0.1, 3
BOX = jaxbo.adversarial.Box(EPSILON)


def model(params, images):
  """A linear model with a bend, so that the gradient depends on the image."""
  return jnp.tanh(images.reshape(len(images), -1) @ params["w"])


PARAMS = {"w": jnp.asarray(RNG.normal(size=(64, 4)), jnp.float32) / 4}
BATCH = adv_data.as_floats(DATA.pool.images[:16]), jnp.asarray(DATA.pool.labels[:16])
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
  attack = jaxbo.adversarial.pgd(model, BOX, step_size=EPSILON / 4, num_steps=NUM_STEPS, **options)
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


def test_trades_and_mart_look_at_clean_and_attacked_images(gradients):
  of_trades = attacked(objective="kl", random_start=1e-3)[0]
  for name, images, loss, beta in (
    ("trades", of_trades, jaxbo.adversarial.trades_loss, 6.0),
    ("mart", attacked()[0], jaxbo.adversarial.mart_loss, 5.0),
  ):

    def mean(params, images=images, loss=loss, beta=beta):
      return jnp.mean(loss(model(params, BATCH[0]), model(params, images), BATCH[1], beta))

    close(gradients[name, 0.0], jax.jit(jax.grad(mean))(PARAMS))


def test_done_and_fast_bat_have_the_implicit_term_of_the_library(gradients):
  loss = lambda p, x, y: jaxbo.adversarial.cross_entropy_loss(model(p, x), y)
  margin = lambda p, x, y: -jaxbo.adversarial.margin_loss(model(p, x), y)
  rates = SETTING.rates
  done = functools.partial(
    jaxbo.adversarial.done_grad, loss, margin, BOX, barrier=rates.barrier,
    num_steps=NUM_STEPS, curvature=rates.curvature,
  )  # fmt: skip
  step_size = rates.fast_bat_step_size
  negative = lambda *arguments: -loss(*arguments)
  fast_bat = jaxbo.adversarial.fast_bat_grad(loss, negative, BOX, step_size=step_size)
  by = {
    "done": (done(step_size=0.5), jaxbo.dro.kl(rates.temperature)),
    "done_adam": (
      done(step_size=0.25 * EPSILON, direction="adam"),
      jaxbo.dro.kl(rates.temperature),
    ),
    "fast_bat": (fast_bat, jaxbo.dro.uniform()),
  }
  for name, (gradient, weighting) in by.items():
    tx = jaxbo.reweight(weighting)
    of_library = jax.jit(
      lambda params, batch, gradient=gradient, tx=tx: tx.update(
        gradient(params, batch, jax.random.clone(KEY)), tx.init(params), params
      )[0]
    )
    close(gradients[name, 1.0], of_library(PARAMS, BATCH))


def test_methods_have_a_rate_with_four_values_or_none():
  for name, (_, _, rate, values) in METHODS.items():
    if rate is None:
      assert name in ("at", "fat")
      assert values == ()
    else:
      assert len(values) == 4
      assert getattr(Rates(), rate) in values


# -- Training.


class Plain(Config):
  """Without Adam, whose first steps are signs."""

  def optimizer(self, num_steps):
    return optax.sgd(0.1)


def train(number, num_epochs, method=METHODS["done"], **settings):
  """Some of four epochs of two batches, on so many devices; DONE's weights have a memory."""
  where = some_devices(number)
  config = Plain(**{"epsilon_rise": 0.0, **settings})
  tx, program = make_program(method, SETTING, config, 8, where)
  state = State(jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS))
  stream = jax.random.key_data(jax.random.key(7))
  state, pool, stream = jax.device_put((state, DATA.pool, stream), where.everywhere)
  told = []
  for epoch in range(num_epochs):
    order = adv_data.order_of_epoch(np.arange(40), 16, (3, 1), epoch).astype(np.int32)
    order = jax.device_put(order, where.everywhere)
    once = program.compile(state, order, pool, stream)
    state, of_epoch = once(state, jnp.int32(epoch), order, pool, stream)
    told.append(of_epoch)
  return jax.device_get((state.params, told))


def test_eight_devices_do_what_one_does():
  of_one, of_eight = (train(number, 2) for number in (1, 8))
  chex.assert_trees_all_close(of_one, of_eight, rtol=1e-4, atol=1e-6)
  first, second = of_one[1]
  assert 0 < first.ess < 1
  assert first.clipped == 0
  assert second.loss < first.loss
  _, [easy] = train(1, 1, epsilon_rise=1.0)  # A quarter of epsilon at most.
  assert easy.loss < first.loss - 0.05
  _, [moved] = train(1, 1, dataset="cifar10")  # Images in colour are moved and mirrored.
  assert moved.loss != first.loss


def test_images_outside_of_the_range_are_told(monkeypatch):
  monkeypatch.setattr(adv_data, "as_floats", lambda images: images.astype(jnp.float32))  # To 255.
  _, [told] = train(1, 1)
  assert told.clipped == 1


def test_steps_know_how_far_training_is_and_have_keys_of_their_own():
  def losses(values_of):
    def make(setting):
      def gradients(params, batch, key, progress):
        values = values_of(setting, key, progress) * jnp.ones(len(batch[1]))
        return lazy(lambda params, values: values + 0 * params["w"].sum(), params, values), {}

      return Parts(gradients, jaxbo.dro.uniform())

    return [told.loss for told in train(1, 4, Method("probe", make), epsilon_rise=0.5)[1]]

  done = losses(lambda setting, key, progress: progress)
  np.testing.assert_allclose(done, np.array([1, 5, 9, 13]) / 16)
  radii = losses(lambda setting, key, progress: setting.epsilon / SETTING.epsilon)
  np.testing.assert_allclose(radii, [0.375, 0.875, 1, 1], rtol=1e-6)
  assert len({float(u) for u in losses(lambda s, key, p: jax.random.uniform(key))}) == 4


# -- What is said about runs.


def row(method, seed, clean, tail):
  same = dict.fromkeys(["pgd", "worst", "worst_class", *(f"robust/{name}" for name in NAMES)], 50.0)
  same |= {"tail_loss_calibrated": 1.5, "softmax_temperature": 1.25}
  doubts = "gradients are zero" if (method, seed) == ("at", 1) else ""
  return {"set": "long_tailed", "method": method, "seed": seed, "clean": clean, "tail": tail,
          **same, "tail_loss": 2.0, "doubts": doubts, "seconds_per_epoch": 1.0}  # fmt: skip


def test_tables_have_means_and_spreads_and_gains_are_of_pairs():
  rows = [row("at", 0, 80.0, 20.0), row("at", 1, 82.0, 30.0), row("done", 0, 79.0, 22.0),
          row("done", 1, 81.0, 34.0), row("done", 2, 10.0, 10.0)]  # fmt: skip
  study, results = script.AdversarialTraining(), Results(Config(), [], rows, {})
  means, gains = study.tables(results)
  assert means.title == "mnist, long-tailed (1200 to 60 images of a class), epsilon 0.1, 10 epochs"
  assert means.columns[:3] == ["method", "seeds", "clean"]
  same = ["50.0 ± 0.0"]
  expected = [
    "81.0 ± 1.4",
    *2 * same,
    "25.0 ± 7.1",
    *same,
    "2.00 ± 0.00",
    "1.50 ± 0.00",
    "1.25 ± 0.00",
    "1.00 ± 0.00",
  ]
  assert means.rows[0] == ["AT", "2", *expected]
  assert gains.columns[0] == "minus AT"
  expected = [
    "-1.0 ± 0.0",
    "0.0 ± 0.0",
    "0.0 ± 0.0",
    "3.0 ± 12.7",  # Student's t of one degree of freedom.
    "0.0 ± 0.0",
    "0.00 ± 0.00",
    "0.00 ± 0.00",
  ]
  assert gains.rows == [["DONE, GD", "2", *expected]]
  [doubt] = study.remarks(results)
  assert "Doubtful: long-tailed, AT, seed 1: gradients are zero" in doubt


def test_the_loss_of_the_tail_is_the_mean_of_the_highest_tenth_also_at_the_best_temperature():
  model = lambda params, images: images.reshape(len(images), -1) @ params
  rng = np.random.default_rng(0)
  parts = [
    adv_data.Images(rng.integers(0, 256, (n, 1, 1, 2)).astype(np.uint8), np.arange(n) % 3)
    for n in (25, 40)
  ]
  params = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])

  def losses(part, temperature):
    logits = part.images.reshape(-1, 2) / 255 @ np.asarray(params) / temperature
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), part.labels]

  tail = lambda temperature: np.sort(losses(parts[0], temperature))[-2:].mean()
  found = []
  for epsilon in (1e-6, 0.1):
    config = Config(epsilon=epsilon, test_batch_size=10, test_steps=3)
    evaluator = Evaluator(model, config, some_devices(1))
    found.append(evaluator.of_losses(params, *parts))
  hardly = found[0]  # Hardly an attack.
  assert hardly["tail_loss"] == pytest.approx(tail(1.0), rel=1e-4)
  best = min(TEMPERATURES, key=lambda temperature: losses(parts[1], temperature).mean())
  assert hardly["softmax_temperature"] == best > 1
  assert hardly["tail_loss_calibrated"] == pytest.approx(tail(best), rel=1e-4)
  assert found[1]["tail_loss"] > hardly["tail_loss"] + 0.1


def test_the_attacks_of_the_report_are_those_that_are_asked_for(monkeypatch):
  asked = []
  for name in ("pgd", "autoattack"):

    def make(model, box, name=name, **options):
      asked.append({"box": box} | options)
      attack = jaxbo.adversarial.Attack(None, box)
      return attack if name == "pgd" else {}

    monkeypatch.setattr(jaxbo.adversarial, name, make)
  config = Config(epsilon=0.2, test_steps=7, worst_steps=5, num_targets=2, num_queries=9)
  Evaluator(model, config, some_devices(1))
  pgd, others = asked
  box = jaxbo.adversarial.Box(0.2)
  assert pgd == {"box": box, "step_size": 0.05, "num_steps": 7}
  assert others == {"box": box, "num_steps": 5, "num_targets": 2, "num_queries": 9}


# -- Whole runs.


def table_of(folder):
  return pd.read_csv(folder / "results.csv", keep_default_na=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run with all that is measured and drawn, and what it has printed."""
  options = small.SETTINGS | {"methods": ("at", "done")}
  config = Config(output_dir=tmp_path_factory.mktemp("whole"), **options)
  with pytest.MonkeyPatch.context() as patch:
    small.patch(patch.setattr, cheap=False)
    with contextlib.redirect_stdout(io.StringIO()) as output:
      assert script.run(config) == 0
  return config, output.getvalue()


def test_two_processes_do_what_one_does_and_go_on_where_they_were_stopped(whole, tmp_path):
  check_two_do_what_one_does(small, whole[0].but(methods=("done",)), tmp_path)


def test_a_run_prints_tables_and_draws(whole):
  tmp_path, table = whole[0].output_dir, whole[1]
  for words in ("long-tailed (20 to 5 images of a class)", "gain over AT", "worst class"):
    assert words in table
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  runs = [("at", 1), ("at", 2), ("done", 1), ("done", 2)]
  assert [(line["method"], line["epoch"]) for line in lines] == runs
  assert all(line["clipped"] == 0 for line in lines)
  pictures = [tmp_path / name for name in (plots.GAINS, plots.WEIGHTS, plots.EXAMPLES)]
  for path in pictures:
    with Image.open(path) as picture:
      assert picture.width > 100
  assert len({path.read_bytes() for path in pictures}) == 3
  for of_run in table_of(tmp_path).to_dict("records"):
    assert 0 <= of_run["worst"] <= of_run["pgd"] <= of_run["clean"] <= 100
    classes = sorted(of_run[f"robust/{name}"] for name in NAMES)
    assert of_run["worst"] == pytest.approx(np.mean(classes))  # As many images of each.
    assert of_run["worst_class"] == classes[0]
    assert of_run["tail_loss"] > 0
    assert of_run["tail_loss_calibrated"] > 0
    assert of_run["tail"] == pytest.approx(np.mean(classes[:2]))  # 30 % of four


@programs_kept()
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  seen = small.patch(monkeypatch.setattr)
  with stopped_after(4):  # The last line.
    script.run(small.config(broken))
  assert len((broken / "metrics.jsonl").read_text().splitlines()) == 4
  assert script.run(small.config(whole)) == 0
  assert script.run(small.config(broken).but(resume=True)) == 0
  assert all(part is DATA.test for part in seen)
  files = [path.read_text().splitlines() for path in sorted(tmp_path.glob("*/metrics.jsonl"))]
  of_broken, of_whole = ([json.loads(line) | {"seconds": 0} for line in lines] for lines in files)
  assert of_broken == of_whole
  assert len({line["train_loss"] for line in of_whole}) == 4
  tables = [table_of(path).drop(columns="seconds_per_epoch") for path in (broken, whole)]
  pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_rates_are_chosen_on_validation_images_and_reported_with(tmp_path, monkeypatch):
  seen = small.patch(monkeypatch.setattr)
  method = METHODS["at_kl"]._replace(values=(1.0, 3.0))
  monkeypatch.setitem(METHODS, "at_kl", method)
  monkeypatch.setattr(tuning, "SEEDS", (100,))
  config = small.config(tmp_path / "tune").but(methods=("at", "at_kl"), tune=True)
  assert script.run(config) == 0
  assert [part is DATA.validation for part in seen] == [True, True]
  rows = table_of(tmp_path / "tune")
  assert rows[["method", "rate", "value"]].values.tolist() == [
    ["at_kl", "temperature", 1.0], ["at_kl", "temperature", 3.0]
  ]  # fmt: skip
  best = rows["value"][rows["tail"].idxmax()]
  file = tmp_path / "tune" / "rates.json"
  tables = json.loads(file.read_text())
  assert tables == {"mnist": {"long_tailed": {"at_kl": {"temperature": best}}}}
  found = Config(rates_file=file)
  assert found.chosen("long_tailed", "at_kl").temperature == best
  assert found.chosen("balanced", "at_kl") == found.chosen("long_tailed", "at") == Rates()


def test_bad_input_says_what_is_allowed(tmp_path, capsys, monkeypatch):
  small.patch(monkeypatch.setattr)
  config = small.config(tmp_path / "out").but(sets=("balanced", "long_tailed"))
  for wrong, message in (
    ({"largest": 1000}, "largest must leave enough images of every class"),
    ({"batch_size": 12}, "batch_size must be a multiple of the number of devices, 8, got 12"),
    ({"batch_size": 80}, "batch_size must be at most 44, the images for training; got 80"),
  ):
    assert script.run(config.but(**wrong)) == 2
    assert message in capsys.readouterr().err
  with pytest.raises(ValueError, match=r"ratio must be in \[1, 20\], got 30.0"):
    Config(largest=20, ratio=30.0)
  with pytest.raises(ValueError, match="fat_steps must be two shares that do not fall"):
    Rates(fat_steps=(0.5, 0.2))
