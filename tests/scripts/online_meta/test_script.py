"""Online meta-learning, the script: data, pre-training, choice of rates, traces, files, errors."""

import contextlib
import functools
import io
import json
import math
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from PIL import Image

import jaxbo
from scripts.common import folder
from scripts.common.fewshot_data import FewShotData, ImageClasses
from scripts.online_meta import __main__ as script
from scripts.online_meta import data as meta_data
from scripts.online_meta import methods as meta_methods
from scripts.online_meta import model as meta_model
from scripts.online_meta import plots, pretraining, report, runs, sweep, tuning
from scripts.online_meta.config import Config
from scripts.online_meta.methods import METHODS, Rates
from scripts.online_meta.report import Trace
from scripts.online_meta.runs import Streams
from tests.scripts.common.stopped import programs_kept, stopped_after

pytestmark = pytest.mark.slow  # All together, not each.

ROUNDS = 12


def config(path, **options):
  small = {
    "dataset": "glyphs", "methods": ("leeds", "maml"), "stay_probabilities": (0.7,),
    "rounds": ROUNDS, "seeds": 2, "num_ways": 3, "num_shots": 2, "images_per_class": 6,
    "inner_steps": 1, "pretrain_epochs": 1, "sweep": False, "rates_file": path / "rates.json",
    "output_dir": path / "out", "tune_rounds": 10, "network": "stripes",
  }  # fmt: skip
  return Config(**(small | options))


@pytest.fixture(scope="module", autouse=True)
def _small():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pretraining, "EPOCH_STEPS", 2)
    patch.setattr(pretraining, "EVAL_TASKS", 3)
    patch.setitem(meta_data.READERS, "glyphs", lambda _, *sizes: glyphs(*sizes))
    yield


@functools.cache
def glyphs(size, per_class):
  return meta_data.glyphs(size, per_class)


def write_rates(config, *thresholds):
  numbers = dict(zip(Rates._fields, (0.5, 0.01, 0.5, 2.0, *thresholds), strict=False))
  config.rates_file.write_text(json.dumps({config.name(): dict.fromkeys(METHODS, numbers)}))


def a_run(config, domains=None):
  """A run that keeps nothing."""
  made = {}

  def keep(name, make):
    if name not in made:
      made[name] = make()
    return made[name]

  return types.SimpleNamespace(
    config=config, data=domains or glyphs(16, 6), shared=keep, note=keep, made=made
  )


# -- Data and model.


def test_the_domains_share_no_character_and_have_one_form():
  domains = glyphs(16, 6)
  parts = (domains.train.images, domains.early.images, domains.validation[0], domains.test[0])
  drawings = [image.tobytes() for images in parts for image in images[:, 0]]
  assert len(set(drawings)) == len(drawings)
  for arrays in (domains.validation, domains.test):
    assert {array.shape[2:] for array in arrays} == {(16, 16, 1)}
    assert {array.dtype for array in arrays} == {np.dtype(np.uint8)}
  negatives = domains.test[1]
  assert negatives.mean() > 128 > domains.test[0].mean()


def test_images_by_label_are_the_first_of_each(monkeypatch):
  """Of a source in the order 0, 1, ..., 9, 0, 0, 1, ... whose pixels say their place."""
  images = lambda i: {"image": np.full((28, 28, 1), i, np.uint8), "label": i % 11 % 10}

  class Source:
    def __len__(self):
      return 220

    def __getitems__(self, rows):
      return [images(i) for i in rows]

  monkeypatch.setattr(meta_data, "tfds_source", lambda *args: Source())
  found = meta_data.by_label("mnist", "train", None, 16, 3)
  assert found.shape == (10, 3, 16, 16, 1)
  np.testing.assert_array_equal(
    found[1:, :, 0, 0, 0], np.arange(1, 10)[:, None] + 11 * np.arange(3)[None]
  )
  np.testing.assert_array_equal(found[0, :, 0, 0, 0], [0, 10, 11])
  with pytest.raises(ValueError, match="images_per_class must be at most 20, what mnist has in te"):
    meta_data.by_label("mnist", "test", None, 16, 21)


def test_no_image_is_in_a_validation_stream_and_in_a_reported_one(monkeypatch):
  """Nor in pre-training, which the first half of the validation characters stops."""
  monkeypatch.setattr(meta_data, "by_label", lambda name, split, *sizes: f"{name}/{split}")
  parts = [np.arange(4) + 10 * i for i in range(3)]
  characters = FewShotData(*(ImageClasses(part, part, part) for part in parts))
  monkeypatch.setattr(meta_data.fewshot_data, "omniglot", lambda *args, **options: characters)
  domains = meta_data.omniglot_mnist_fashion(None, 16, 5)
  assert domains.train is characters.train
  assert [leaf.tolist() for leaf in domains.early] == [[10, 11]] * 3
  assert domains.validation[0].tolist() == [12, 13]
  assert domains.validation[1:] == ("mnist/test", "fashion_mnist/test")
  assert domains.test == (characters.test.images, "mnist/train", "fashion_mnist/train")


def test_conv4_adapts_all_or_the_head():
  key, batch = jax.random.key(0), (jnp.ones((4, 16, 16, 1), jnp.uint8), jnp.arange(4) % 2)
  both, head = (meta_model.conv4(2, 16, 2, adapt) for adapt in ("all", "head"))
  x = jax.tree.map(np.asarray, jax.jit(both.init)(key))
  shift = lambda tree: jax.tree.map(lambda leaf: leaf + np.float32(0.1), tree)
  whole, of_head = jax.jit(both.loss), jax.jit(head.loss)
  zeros = jax.tree.map(np.zeros_like, x)
  moved = shift(jax.tree.map(np.asarray, both.start(x)))
  expected = whole(optax.tree.add(x, moved), zeros, batch)
  np.testing.assert_allclose(whole(x, moved, batch)[1], expected[1], rtol=1e-5)
  only_head = x._replace(head=shift(x.head))
  np.testing.assert_allclose(
    of_head(x, shift(head.start(x)), batch)[1], whole(only_head, zeros, batch)[1], rtol=1e-6
  )
  assert jax.tree.structure(head.start(x)) == jax.tree.structure(x.head)
  np.testing.assert_allclose(whole(x, zeros, batch)[0], np.log(2), rtol=1e-6)


def test_pre_training_stops_early_and_keeps_the_best(tmp_path):
  mine, domains = config(tmp_path, pretrain_epochs=6, pretrain_patience=2), glyphs(16, 6)
  every = pretraining.Pretraining(mine, mine.model(), domains.train, domains.early)
  task, untrained = every.of(3), every.of(3).state.x
  other = every.of(4)
  assert np.any(other.state.x.backbone != untrained.backbone)
  assert other.key != task.key
  values = iter([0.2, 0.5, 0.4, 0.3, 0.9])
  task.judge = lambda x: next(values)
  states, told = [task.state], []
  for t in range(6):
    state, value = task.step(states[-1], t)
    states.append(state)
    told.append(value)
  assert told == [0.2, 0.5, 0.4, 0.3, None, None]
  assert [line["accuracy"] for line in task.evaluate(state, told)] == told[:4]
  for last, best, second in zip(
    *map(jax.tree.leaves, (state.x, state.best, states[2].x)), strict=True
  ):
    np.testing.assert_array_equal(best, second)
    assert np.any(best != last)
  assert np.any(states[1].x.backbone != untrained.backbone)


def test_pre_training_and_its_end_are_decided_by_the_queries(tmp_path, monkeypatch):
  """Black images have no loss here, and labels that are no classes are never predicted."""

  def blind(*args, **options):
    episode = jaxbo.tasks.sample_episode(*args, **options)
    return episode._replace(
      query_images=jnp.zeros_like(episode.query_images),
      query_labels=jnp.full_like(episode.query_labels, -1),
    )

  monkeypatch.setattr(pretraining, "sample_episode", blind)
  mine, domains = config(tmp_path), glyphs(16, 6)
  model = mine.model()

  def loss(x, y, batch):
    value, logits = model.loss(x, y, batch)
    return jnp.where(jnp.any(batch[0]), value, 0.0), logits

  blinded = model._replace(loss=loss)
  task = pretraining.Pretraining(mine, blinded, domains.train, domains.early).of(0)
  untrained = jax.tree.map(np.asarray, task.state.x)
  state, accuracy = task.step(task.state, 0)
  assert accuracy == 0.0
  jax.tree.map(np.testing.assert_array_equal, state.best, untrained)


# -- Traces and numbers.


def trace(**fields):
  base = {name: np.zeros((1, 6), np.float32) for name in ("before", "after", "loss")}
  base |= {name: np.zeros((1, 6), np.float32) for name in ("switch_score", "shift_score")}
  base |= {name: np.zeros((1, 6), bool) for name in ("switch", "shift", "meta_updated")}
  base |= {"domain": np.zeros((1, 6), np.int32), "task_switch": np.zeros((1, 6), bool)}
  return Trace(**(base | {name: np.asarray([value]) for name, value in fields.items()}))


def test_a_row_of_results_counted_by_hand():
  mine = trace(
    before=np.float32([0.1, 0.5, 0.1, 0.7, 0.3, 0.9]),
    after=np.float32([0.5, 0.5, 0.5, 0.7, 0.9, 0.9]),
    loss=np.float32([2, 1, 3, 1, 2, 1]),
    domain=np.int32([0, 0, 1, 1, 0, 0]),
    task_switch=np.array([1, 0, 1, 0, 1, 0], bool),
    switch=np.array([1, 0, 1, 1, 0, 0], bool),
    shift=np.array([0, 0, 1, 1, 0, 0], bool),
    meta_updated=np.array([1, 0, 1, 1, 0, 0], bool),
  )
  best = np.float32([0.5, 0.5, 1, 1, 1, 1])
  row_of = lambda method, trace: report.numbers(method, trace.of(0), best)
  row = row_of("leeds", mine)
  np.testing.assert_allclose(row["accuracy"], 2.6 / 6, rtol=1e-6)
  np.testing.assert_allclose(row["accuracy_domain_0"], 1.8 / 4, rtol=1e-6)
  np.testing.assert_allclose((row["accuracy_domain_1"], row["accuracy_out"]), 0.4, rtol=1e-6)
  assert math.isnan(row["accuracy_domain_2"])
  assert row["regret"] == pytest.approx(((3 - 1) + (4 - 2) + (3 - 2)) / 3)
  assert (row["num_switches"], row["switch_precision"], row["switch_recall"]) == (2, 0.5, 0.5)
  assert (row["num_shifts"], row["shift_precision"], row["shift_recall"]) == (1, 0.5, 1.0)
  assert row["meta_updates"] == 3
  np.testing.assert_allclose((row["accuracy_after"], row["accuracy_after_domain_1"]), (4 / 6, 0.6))
  silent = row_of("maml", mine)
  assert math.isnan(silent["switch_recall"])
  # A shift that is flagged when its task is over is missed; the third domain is out, too.
  late = row_of("leeds", mine._replace(shift=np.arange(6)[None] == 4))
  assert late["shift_recall"] == 0
  three = row_of("leeds", mine._replace(domain=np.int32([[0, 0, 1, 1, 2, 2]])))
  np.testing.assert_allclose(
    (three["accuracy_out"], three["accuracy_domain_2"]), (0.5, 0.6), rtol=1e-6
  )
  rows = pd.DataFrame([{"method": "leeds", **row}, {"method": "maml", **silent}])
  assert script.detection_table("", rows).rows == [
    ["LEEDS, 2 switches", "1", "0.50", "0.50", "0.00", "1.0"],
    ["LEEDS, 1 shifts", "1", "0.50", "1.00", "0.00", "1.0"],
  ]
  assert script.detection_table("", rows[1:]).rows == []


def test_the_best_fixed_models_are_trained_on_all_rounds_of_their_task(tmp_path):
  """On a quadratic: long training finds the mean of the task's points."""

  def loss(x, y, batch):
    miss = x + y - batch.mean(axis=0)
    return 0.5 * jnp.sum(miss**2), miss

  model = meta_model.Model(lambda key: jnp.zeros(2), loss, jnp.zeros_like)
  stream = jaxbo.tasks.moving_gaussian_stream(2, 5, stay_probability=0.8, domain_step=0.0)
  keys = runs.keys_of([3])
  find = jax.jit(lambda xs: runs.best_losses(model, xs, stream, keys, 30, passes=100, rate=0.05))
  found = np.asarray(find(jnp.full((1, 2), -6.0)))[0]
  state, points, switches = stream.init(keys[0]), [], []
  step = jax.jit(stream.step)
  for _ in range(30):
    state, batch = step(state)
    points.append(np.asarray(batch.train).mean(axis=0))
    switches.append(bool(batch.extra.task_switch))
  points, tasks = np.array(points), np.cumsum(switches) - 1
  assert tasks[-1] >= 2
  means = np.array([points[tasks == task].mean(axis=0) for task in range(tasks[-1] + 1)])
  np.testing.assert_allclose(
    found, 0.5 * np.sum((points - means[tasks]) ** 2, axis=1), rtol=0, atol=5e-3
  )


# -- The choice of rates.


def test_rates_are_searched_one_after_the_other():
  """The accuracy is a known function of the rates; LEEDS is played as its version that is told."""
  played = []

  def play(name, rates):
    played.append(name)
    value = 1 - abs(math.log(rates.inner / 0.4)) - abs(math.log(rates.outer / 3e-4)) / 10
    loss = np.full((1, 6), np.nan if rates.in_scale == 1.0 else 1.0)
    return [trace()._replace(before=np.full((1, 6), value), loss=loss)]

  rates, value = tuning.search("leeds", play)
  assert (rates.inner, rates.outer) == (0.4, 3e-4)
  assert rates.in_scale < 1  # What diverged is never chosen.
  assert value == pytest.approx(1.0)
  assert math.isnan(rates.switch)  # No other model has the same scores.
  assert set(played) == {"leeds_told"}
  assert len(played) == 9  # 4 + 3 + 2: nothing twice.
  diverged = lambda name, rates: [trace(loss=np.float32([np.nan] * 6))]
  assert tuning.search("maml", diverged)[1] == -math.inf


def test_c_maml_has_the_best_level_of_its_threshold():
  """The accuracy is best at 0.7, and 0.9 with the detector off, as it is for the other rates."""

  def play(name, rates):
    accuracy = 0.9 if math.isinf(rates.switch) else 0.5 - abs(rates.level - 0.7)
    return [trace()._replace(before=np.full((1, 6), accuracy))]

  rates, value = tuning.search("c_maml", play)
  assert (rates.level, value) == (0.7, 0.5)
  assert math.isnan(rates.switch)


def test_a_level_is_a_quantile_of_scores_with_and_without_a_switch():
  """Both kinds have equal weight, and the first round none."""
  switch = np.arange(41)[None] % 4 == 0
  mine = trace()._replace(switch_score=np.where(switch, 3.0, 1.0), task_switch=switch)
  mine.switch_score[0, 0] = 99
  found = [tuning.at_level([mine], level) for level in (0.0, 0.4, 0.5, 0.6, 1.0)]
  np.testing.assert_allclose(found, [1, 1, 2, 3, 3])


def test_tuning_and_a_report_turn_levels_into_thresholds_of_each_model(tmp_path, monkeypatch):
  given, switch = [], np.tile([True, False], (1, 10))

  def play(run, name, rates, streams):
    given.append((streams.in_distribution, np.ravel(rates.switch).tolist()))
    return trace()._replace(switch_score=1.0 + 2 * switch, task_switch=switch)

  monkeypatch.setattr(runs, "play", play)
  mine = config(tmp_path)
  run = a_run(mine)
  tuning.player(run)("c_maml", Rates(0.1, 0.2, level=0.5))
  assert given == [(True, [math.inf]), (False, [2.0])]
  entry = {"inner": 0.1, "outer": 0.2, "level": 0.5}
  mine.rates_file.write_text(json.dumps({mine.name(): {"c_maml": entry}}))
  assert tuning.rates_of(run, "c_maml", np.array([0])).switch.tolist() == [2.0]


def test_thresholds_leave_out_the_first_round_of_every_stream():
  mine = trace(switch_score=np.float32([99, 1, 5, 1, 5, 1]), task_switch=np.arange(6) % 2 == 0)
  assert tuning.thresholds([mine] * 2).switch == 3.0


def test_the_grid_of_bgd_is_of_deviations():
  assert tuning.grid_of("bgd", "inner") == tuning.DEVIATIONS
  assert tuning.grid_of("maml", "inner") == tuning.GRIDS["inner"]


def test_rates_are_kept_by_setting_and_method(tmp_path):
  mine = config(tmp_path)
  c_maml, leeds = {"inner": 0.1, "outer": 0.01, "switch": "inf"}, {"inner": 0.2, "in_scale": 0.1}
  tables = {mine.name(): {"c_maml": c_maml, "leeds": leeds}}
  mine.rates_file.write_text(json.dumps(tables))
  assert mine.rates_of("c_maml").switch == math.inf
  assert math.isnan(mine.rates_of("c_maml").shift)
  assert mine.rates_of("leeds_told").inner == 0.2
  assert mine.but(in_distribution_scale=0.7).rates_of("leeds").in_scale == 0.7
  other = mine.but(width=3)
  with pytest.raises(
    ValueError, match="no rates were chosen for leeds on glyphs/3way2shot/16px/wi"
  ):
    other.rates_of("leeds")
  assert other.but(smoke=True).rates_of("leeds").inner == 0.2  # Some numbers are better than none.
  del c_maml["switch"]
  leeds["switch"] = "nan"
  mine.rates_file.write_text(json.dumps(tables))
  for name in ("leeds", "c_maml"):
    with pytest.raises(
      ValueError, match=f"{name}: switch must be a number or an infinity, got nan"
    ):
      mine.rates_of(name)


def test_the_rates_file_and_the_picture_have_all_that_the_default_run_needs():
  assert all(Config().rates_of(name) for name in METHODS)
  assert plots.COLORS.keys() == METHODS.keys()


# -- The script.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A small run, of LEEDS at first, which finds its thresholds: settings, output, and programs."""
  mine = config(tmp_path_factory.mktemp("whole"), sweep=True, seeds_at_once=2)
  write_rates(mine)
  printed, programs = io.StringIO(), {}
  # The check of keys takes the batched switch of the stream for reuse.
  with jax.debug_key_reuse(False), contextlib.redirect_stdout(printed), kept_in(programs):
    assert script.run(mine.but(methods=("leeds",))) == 0
    assert script.run(mine.but(resume=True)) == 0
  return mine, printed.getvalue(), programs


kept_in = functools.partial(programs_kept, without={("trained", "maml", seed) for seed in (0, 1)})


def test_a_run_writes_traces_tables_and_pictures_and_goes_on(whole, capsys):
  mine, output, _ = whole
  # Of LEEDS and its detectors; then of both methods, and of their difference.
  assert output.count("│     2 │") == 3 + 5
  for word in ("glyphs, p = 0.7: 12 rounds, 3-way 2-shot", "LEEDS", "negatives", "Detection"):
    assert word in output
  rows = pd.read_csv(mine.output_dir / "results.csv")
  cells = [(method, 0, seed) for method in ("leeds", "maml") for seed in (0, 1)]
  assert list(rows[["method", "group", "seed"]].itertuples(index=False, name=None)) == cells
  assert np.isfinite(rows["regret"]).all()
  for name in ("online_meta_rounds.png", "online_meta_sweep.png", "online_meta.png"):
    with Image.open(mine.output_dir / name) as picture:
      assert picture.width > 600
  notes = json.loads((mine.output_dir / "notes.json").read_text())
  first, second = (notes[tuning.note_of("leeds", seed)] for seed in (0, 1))
  assert first.keys() == {"switch", "shift"}
  assert first != second
  assert notes["sweep of p=0.7, seed 0, switch 6"]["recall"] == 0  # Of four times the chosen one.
  bad = mine.but(resume=True, pretrain_tasks=3)
  assert script.run(bad) == 2
  assert "pretrain_tasks must be 2 to resume, got 3" in capsys.readouterr().err


def test_the_trace_of_leeds_follows_its_thresholds(tmp_path):
  """They are 1.2 and -1.5."""
  mine = config(tmp_path)
  found, maml = (
    played(mine, name, [0], Rates(0.5, 0.01, 0.5, 2.0, 1.2, -1.5)) for name in mine.methods
  )
  later = np.arange(ROUNDS)[None] > 0
  np.testing.assert_array_equal(found.switch_score, found.loss)
  np.testing.assert_array_equal(found.switch, ~later | (found.loss > np.float32(1.2)))
  np.testing.assert_array_equal(found.shift, found.switch & (found.shift_score > -1.5))
  np.testing.assert_array_equal(found.meta_updated, found.switch)
  np.testing.assert_array_equal(found.task_switch, maml.task_switch)
  assert np.any(found.before != found.after)
  assert not np.any(maml.meta_updated)


def played(mine, name, seeds, rates):
  """The trace of a method on the tiny model."""
  run = a_run(mine)
  run.made |= {("trained", "maml", seed): mine.model().init(jax.random.key(seed)) for seed in seeds}
  return runs.play(run, name, rates, Streams(0.7, np.array(seeds)))


def test_seeds_side_by_side_are_as_one_after_the_other(tmp_path):
  mine, rates = config(tmp_path), Rates(0.3)
  with jax.debug_key_reuse(False):  # It takes the batched switch of the stream for reuse.
    both = played(mine, "online_sgd", [4, 5], rates)
  one = played(mine, "online_sgd", [5], rates)
  np.testing.assert_allclose(both.loss[1:], one.loss, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(both.task_switch[1:], one.task_switch)
  assert np.any(both.loss[0] != both.loss[1])


def test_a_run_that_was_stopped_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
  mine = whole[0].but(output_dir=tmp_path)
  monkeypatch.setattr(script, "plots", mock.Mock())  # They take seconds.
  with jax.debug_key_reuse(False), kept_in(whole[2]), stopped_after(4):
    script.run(mine)
  lines, rows, _ = folder.read(tmp_path)
  assert (len(lines), len(rows)) == (4, 0)  # LEEDS has its lines, but was not saved.
  with jax.debug_key_reuse(False), kept_in(whole[2]):
    assert script.run(mine.but(resume=True)) == 0
  expected, found = (folder.read(path) for path in (whole[0].output_dir, tmp_path))
  for a, b in zip(expected[:2], found[:2], strict=True):
    a, b = (pd.DataFrame(table).filter(regex="^(?!seconds)") for table in (a, b))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
  assert expected[2] == found[2]


@pytest.mark.parametrize(
  "options", [{}, {"query": "given", "first_order": True}, {"query": "next"}]
)
def test_every_method_can_be_traced(options, tmp_path):
  """Their numbers are tested in tests/online; a compilation of each would take minutes."""
  mine = config(tmp_path, **options)
  stream, rates = mine.stream(glyphs(16, 6).test, 0.7), Rates(*[0.5] * len(Rates._fields))
  for name, method in METHODS.items():
    if options.get("query") == "next" and name not in ("leeds", "meta_ogd"):
      continue
    model = mine.model(method.begins)

    def run(x, stream, method=method, model=model):
      learner = method.make(model, rates, mine)
      state = learner.init(x, stream=stream, key=0)
      return runs.trace_of(learner.run(state, stream, ROUNDS)[1])

    found = jax.eval_shape(run, model.init(jax.random.key(0)), stream)
    assert {leaf.shape for leaf in found} == {(ROUNDS,)}, name


def test_what_methods_are_made_of(tmp_path):
  """From their first states: scales of gates, thresholds, modulation, responses, bytes."""
  mine = config(tmp_path, no_switch_scale=0.125)
  rates, batch = Rates(0.5, 0.01, 0.25, 2.0, 1.5, -2.0), (jnp.zeros((6, 16, 16, 1)), jnp.arange(6))
  x, states = mine.model().init(jax.random.key(0)), {}
  first = lambda name, choices: (
    METHODS[name].make(mine.model(), rates, choices).init(x, batch=(batch, batch))
  )
  for name in ("maml", "c_maml", "c_maml_um", "c_maml_pap", "restart", "leeds", "leeds_told"):
    states[name] = first(name, mine)
  scales = {name: optax.tree.get(state, "gate_scales") for name, state in states.items()}
  assert scales["leeds"] == scales["leeds_told"] == (0.125, 0.25, 1.0)
  assert scales["c_maml"] == (1.0, 0.0, 0.0)
  assert scales["restart"] == (0.0, 0.0, 0.0)  # No meta-update, whatever is detected.
  rules = {name: tuple(state.detector_state[1:]) for name, state in states.items()}
  assert rules["leeds"] == ((1.5,), (-2.0,))
  assert rules["leeds_told"] == ((), ())
  assert rules["restart"] == ((1.5,), (math.inf,))
  assert rules["c_maml"][0] == (1.5,)
  modulated = {name: optax.tree.get(states[name], "modulation") for name in states}
  kinds = [name for name, value in modulated.items() if value is not None]
  assert kinds == ["c_maml_um", "c_maml_pap"]
  buffers = {
    name: isinstance(s.last_support, jaxbo.meta.SupportBuffer) for name, s in states.items()
  }
  assert [name for name, value in buffers.items() if value] == ["c_maml_pap"]
  dropped = first("leeds", mine.but(first_order=True))
  assert optax.tree.get(dropped, "finite") is None
  assert optax.tree.get(states["leeds"], "finite") is not None
  # The task's x and y are 31 numbers each; two thresholds; two flags.
  streaming = states["maml"]._replace(stream_state=jnp.zeros(99))
  assert meta_methods.state_bytes(streaming, x) == 2 * 31 * 4 + 2 * 4 + 2
  begins = {name: method.begins for name, method in METHODS.items() if method.begins != "maml"}
  assert begins == {"online_sgd": "random", "scratch": "random", "anil": "anil"}


def test_a_stream_in_distribution_never_leaves_the_first_domain(tmp_path):
  stream = config(tmp_path).stream(glyphs(16, 6).test, 0.0, in_distribution=True)
  step = lambda state, _: stream.step(state)
  _, batches = jax.jit(lambda: jax.lax.scan(step, stream.init(0), length=30))()
  assert not np.any(batches.extra.domain)


def test_a_round_has_as_many_queries_as_images_where_they_are_given(tmp_path):
  shapes = {}
  for query in ("same", "given"):
    stream = config(tmp_path, query=query).stream(glyphs(16, 6).test, 0.7)
    shapes[query] = jax.eval_shape(stream.step, stream.init(0))[1]
  assert shapes["same"].query_images is None
  assert shapes["given"].query_images.shape == shapes["same"].images.shape == (6, 16, 16, 1)
  groups = config(tmp_path, first_seed=7, seeds=4, seeds_at_once=2).groups()
  assert [group.tolist() for group in groups] == [[7, 8], [9, 10]]


def test_thresholds_are_swept_around_the_chosen_ones(tmp_path):
  played = []
  base = trace(
    before=np.float32([0.1, 0.3, 0.5, 0.7, 0.9, 0.5]),
    domain=np.int32([0, 0, 1, 1, 2, 2]),
    task_switch=np.array([1, 0, 1, 0, 1, 0], bool),
    switch=np.array([1, 0, 1, 0, 1, 0], bool),
    shift=np.array([0, 0, 1, 0, 1, 0], bool),
    switch_score=np.float32([9, 1, 3, 1, 5, 1]),
    shift_score=np.float32([-3, 99, -1, 99, 1, 99]),
  ).of(0)
  play = lambda rates: (played.append(rates), base)[1]
  rates = Rates(0.5, 0.01, 0.5, switch=2.0, shift=0.25)
  found = pd.DataFrame(sweep.measure(a_run(config(tmp_path)), rates, base, play))
  tried = {kind: rows["threshold"].tolist() for kind, rows in found.groupby("kind")}
  np.testing.assert_allclose(tried["switch"], [0, 0.8, 1.4, 2, 3, 4, 8])
  # The quantiles of -3, -1 and 1, the scores where a switch was detected, and the chosen one.
  np.testing.assert_allclose(tried["shift"], [-3, -2, -1, 0, 0.25, 1])
  assert [rates.switch for rates in played] == tried["switch"] + [2.0] * 6
  assert [rates.shift for rates in played] == [0.25] * 7 + tried["shift"]
  np.testing.assert_allclose(found["accuracy"], 0.5, rtol=1e-6)
  np.testing.assert_allclose(found["out"], 2.6 / 4, rtol=1e-6)
  np.testing.assert_allclose(found[["precision", "recall"]], 1)
  np.testing.assert_allclose(found["logged_recall"][:7], [1, 1, 1, 1, 0.5, 0.5, 0])


def test_thresholds_are_judged_by_the_scores_that_were_logged():
  switches = np.array([1, 0, 1, 0, 1, 0], bool)
  one = trace(
    task_switch=switches,
    switch=switches,
    domain=np.int32([0, 0, 1, 1, 2, 2]),
    switch_score=np.float32([9, 1, 3, 2, 5, 0]),
    shift_score=np.float32([-9, 7, 4, 7, 6, 7]),
  ).of(0)
  # Above 1.5 a round in between is taken for a switch; above 4 one of two switches is missed. The
  # first round is left out.
  found = sweep.logged_quality(one, "switch", np.array([1.5, 2.5, 4.0]))
  np.testing.assert_allclose(found, [[2 / 3, 1], [1, 1], [1, 0.5]], rtol=1e-6)
  found = sweep.logged_quality(one, "shift", np.array([0.0, 5.0]))
  np.testing.assert_allclose(found, [[1, 1], [1, 0.5]], rtol=1e-6)


def test_thresholds_that_are_not_given_are_calibrated_on_characters_alone(tmp_path, monkeypatch):
  """For each model: scores of seed 0 are 3 at switches and 1 elsewhere, of seed 1 one more."""
  calls, of_seed = [], np.array([[0], [1]])
  switch = np.tile([True, False], (2, 10))

  def play(run, name, rates, streams):
    calls.append((name, *streams._replace(seeds=streams.seeds.tolist())))
    scores = {"switch_score": 1.0 + 2 * switch + of_seed, "shift_score": of_seed - 5.0 - switch}
    return trace()._replace(**scores, task_switch=switch, domain=0 * switch)

  monkeypatch.setattr(runs, "play", play)

  def own(method, *given):
    mine = config(tmp_path, stay_probabilities=(0.5, 0.75))
    write_rates(mine, *given)
    found = tuning.rates_of(a_run(mine), method, np.array([0, 1]))
    return np.asarray(found.switch).tolist(), np.asarray(found.shift).tolist()

  assert own("leeds", 9.0, "inf") == (9.0, math.inf)
  assert not calls
  assert own("leeds", 9.0) == (9.0, [-6.0, -5.0])
  calls.clear()
  assert own("leeds") == ([2.0, 3.0], [-6.0, -5.0])
  assert own("restart")[0] == [2.0, 3.0]
  assert calls == [
    (f"{name}_told", p, [0, 1], False, True) for name in ("leeds", "restart") for p in (0.5, 0.75)
  ]


def test_tuning_and_choices_are_on_validation_images_and_a_report_on_its_own(tmp_path, monkeypatch):
  monkeypatch.setattr(Config, "stream", lambda self, images, p, inside: (images[0], inside))
  monkeypatch.setattr(runs, "Program", lambda *arguments: arguments)
  domains = glyphs(16, 6)
  for validation, reported, rounds, images in (
    (False, False, 4, domains.validation),
    (False, True, 9, domains.test),
    (True, True, 9, domains.validation),
  ):
    mine = config(tmp_path, rounds=9, tune_rounds=4, validation=validation)
    streams = Streams(0.5, np.array([0]), reported, in_distribution=not reported)
    program, _ = runs.prepared(a_run(mine), "online_sgd", streams)
    assert program[2] == rounds
    np.testing.assert_array_equal(program[4][0], images[0])
    assert program[4][1] is not reported
    key = jax.random.key(0 if reported else runs.VALIDATION_KEYS)
    assert program[5][0] == key


def test_tuning_writes_rates_that_a_run_uses(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(tuning, "GRIDS", {"inner": (0.1, 0.2), "outer": (0.1, 0.2)})
  committed = Config().rates_in_sources().read_text()
  mine = config(tmp_path, methods=("meta_ogd",), tune=True, rates_file=None)
  assert script.run(mine) == 0
  assert "MetaOGD" in capsys.readouterr().out
  assert Config().rates_in_sources().read_text() == committed
  file = mine.output_dir / "rates.json"
  table = json.loads(file.read_text())[mine.name()]
  assert table.keys() == {"meta_ogd"}
  assert set(table["meta_ogd"]) == {"inner", "outer"}
  rates = mine.but(rates_file=file).rates_of("meta_ogd")
  assert (rates.inner, rates.outer) == (table["meta_ogd"]["inner"], table["meta_ogd"]["outer"])


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"stay_probabilities": (1.5,)}, r"stay_probability must be in [0, 1], got 1.5"),
    ({"num_ways": 11}, "num_ways must be at most 10, the classes of domains[1], got 11"),
    ({"num_shots": 11}, "num_ways must be at most 0, the characters with 22 drawings, got 3"),
    ({"domain_probabilities": (0.5, 0.5, 0.5)}, "must be non-negative and sum to 1, got [0.5, 0.5"),
    ({"domain_switch_probability": 2.0}, "domain_switch_probability must be in [0, 1], got 2"),
    ({"width": 3}, "no rates were chosen for leeds on glyphs/3way2shot/16px/width3/steps1"),
    ({"dataset": "omniglot", "data_dir": Path("/nowhere")}, "no mnist in"),
  ],
)
def test_what_cannot_be_run_ends_with_2_and_no_file(wrong, message, tmp_path, capsys):
  mine = config(tmp_path, **wrong)
  if "width" not in wrong:
    write_rates(mine)
  assert script.run(mine) == 2
  assert message in capsys.readouterr().err
  assert not mine.output_dir.exists()


def test_fields_that_do_not_go_together_say_what_is_allowed(tmp_path):
  with pytest.raises(ValueError, match="seeds must be a multiple of seeds_at_once=2, got 3"):
    config(tmp_path, seeds=3, seeds_at_once=2)
  with pytest.raises(ValueError, match="stay_probabilities should name each one once"):
    config(tmp_path, stay_probabilities=(0.9, 0.9))
