"""Online meta-learning, the script: data, pre-training, choice of rates, traces, files, errors."""

import csv
import dataclasses
import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import jaxbo
from scripts.common import report
from scripts.online_meta import __main__ as script
from scripts.online_meta import config as meta_config
from scripts.online_meta import data as meta_data
from scripts.online_meta import methods as meta_methods
from scripts.online_meta import model as meta_model
from scripts.online_meta import report as meta_report
from scripts.online_meta import runs as meta_runs
from scripts.online_meta import tuning as meta_tuning
from scripts.online_meta import workplace as meta_workplace
from scripts.online_meta.config import Config
from scripts.online_meta.methods import INFINITY, METHODS, Rates
from scripts.online_meta.runs import Run, Trace

pytestmark = pytest.mark.slow  # All together, not each.

ROUNDS = 12


@dataclasses.dataclass(frozen=True)
class Tiny(Config):
  """A mean of pixels under a linear head: compiled in no time."""

  def model(self, adapt="all"):
    def init(key):
      return meta_model.Params({"w": jax.random.normal(key, (4, 4))}, {"b": jnp.zeros((4, 3))})

    def loss(x, y, batch):
      weights, head = (
        optax.tree.add(x, y) if adapt == "all" else (x.backbone, optax.tree.add(x.head, y))
      )
      pixels = batch[0].astype(jnp.float32).reshape(len(batch[0]), 4, -1).mean(axis=2) / 255
      logits = jnp.tanh(pixels @ weights["w"]) @ head["b"]
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), logits

    start = lambda x: optax.tree.zeros_like(x if adapt == "all" else x.head)
    return meta_model.Model(init, loss, start)

  def pretraining(self):
    return super().pretraining()._replace(steps_per_epoch=2, eval_tasks=3)


def config(path, **options):
  small = {
    "dataset": "glyphs", "methods": ("leeds", "maml"), "stay_probabilities": (0.7,),
    "rounds": ROUNDS, "seeds": 2, "num_ways": 3, "num_shots": 2, "images_per_class": 6,
    "inner_steps": 1, "pretrain_epochs": 1, "sweep": False, "rates_file": path / "rates.json",
    "output_dir": path / "out", "tune_rounds": 10,
  }  # fmt: skip
  return Tiny(**(small | options))


@pytest.fixture(autouse=True)
def small_glyphs(monkeypatch):
  monkeypatch.setitem(meta_data.READERS, "glyphs", lambda _, *sizes: glyphs(*sizes))


@functools.cache
def glyphs(size, per_class):
  return meta_data.glyphs(size, per_class)


def write_rates(config):
  for name in METHODS:
    rates = Rates(0.5, 0.01, 0.5, 2.0, 1.2, -1.5)
    meta_tuning.write(config.rates_file, config.name(), name, rates)


# -- Data and model.


def test_the_domains_share_no_character_and_have_one_form():
  domains = glyphs(16, 6)
  parts = (domains.train.images, domains.validation[0], domains.test[0])
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
  monkeypatch.setattr(meta_data, "by_label", lambda name, split, *sizes: f"{name}/{split}")
  classes = [types.SimpleNamespace(images=name) for name in ("train", "validation", "test")]
  characters = types.SimpleNamespace(train=classes[0], validation=classes[1], test=classes[2])
  monkeypatch.setattr(meta_data.fewshot_data, "omniglot", lambda *args, **options: characters)
  domains = meta_data.omniglot_mnist_fashion(None, 16, 5)
  assert (domains.train, domains.early) == (characters.train, characters.validation)
  assert domains.validation == ("validation", "mnist/test", "fashion_mnist/test")
  assert domains.test == ("test", "mnist/train", "fashion_mnist/train")


def test_conv4_adapts_all_or_the_head():
  key, batch = jax.random.key(0), (jnp.ones((4, 16, 16, 1), jnp.uint8), jnp.arange(4) % 2)
  both, head = (meta_model.conv4(2, 16, 2, adapt) for adapt in ("all", "head"))
  x = both.init(key)
  shift = lambda tree: jax.tree.map(lambda leaf: leaf + 0.1, tree)
  whole, of_head = jax.jit(both.loss), jax.jit(head.loss)
  moved = shift(both.start(x))
  zeros = optax.tree.zeros_like(x)
  expected = whole(optax.tree.add(x, moved), zeros, batch)
  np.testing.assert_allclose(whole(x, moved, batch)[1], expected[1], rtol=1e-5)
  only_head = x._replace(head=shift(x.head))
  np.testing.assert_allclose(
    of_head(x, shift(head.start(x)), batch)[1], whole(only_head, zeros, batch)[1], rtol=1e-6
  )
  assert jax.tree.structure(head.start(x)) == jax.tree.structure(x.head)
  np.testing.assert_allclose(whole(x, zeros, batch)[0], np.log(2), rtol=1e-6)


def test_pre_training_stops_early_and_returns_the_best(tmp_path, monkeypatch):
  mine = config(tmp_path, pretrain_epochs=6, pretrain_patience=2)
  domains, seen = glyphs(16, 6), []
  values = iter([0.2, 0.5, 0.4, 0.3, 0.9])
  monkeypatch.setattr(meta_model, "float", lambda value: next(values), raising=False)

  def train(setting, on_epoch=lambda epoch, value: None):
    key = jax.random.key(0)
    return meta_model.pretrain(mine.model(), setting, domains.train, domains.early, key, on_epoch)

  setting = mine.pretraining()
  best, history = train(setting, lambda epoch, value: seen.append((epoch, value)))
  assert history == [0.2, 0.5, 0.4, 0.3]
  assert seen == list(enumerate(history))
  values = iter([0.5, 0.5])
  two, _ = train(setting._replace(max_epochs=2))
  for a, b in zip(jax.tree.leaves(best), jax.tree.leaves(two), strict=True):
    np.testing.assert_array_equal(a, b)
  untrained = mine.model().init(jax.random.split(jax.random.key(0))[0])
  assert np.any(best.backbone["w"] != untrained.backbone["w"])


def test_pre_training_and_its_end_are_decided_by_the_queries(tmp_path, monkeypatch):
  """Black queries give no gradient, and labels that are no classes are never predicted."""

  def blind(*args, **options):
    episode = jaxbo.tasks.sample_episode(*args, **options)
    return episode._replace(
      query_images=jnp.zeros_like(episode.query_images),
      query_labels=jnp.full_like(episode.query_labels, -1),
    )

  monkeypatch.setattr(meta_model, "sample_episode", blind)
  mine, domains, key = config(tmp_path), glyphs(16, 6), jax.random.key(0)
  best, history = meta_model.pretrain(
    mine.model(), mine.pretraining(), domains.train, domains.early, key
  )
  assert history == [0.0]
  untrained = mine.model().init(jax.random.split(jax.random.key(0))[0])
  jax.tree.map(np.testing.assert_array_equal, best, untrained)


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
  two = Trace(*(np.concatenate(leaves) for leaves in zip(trace(), mine, strict=True)))
  row_of = lambda method, both: meta_report.result_of(
    0.9, method, 7, Run(both, 12.0, 102400), 1, best
  )
  row = row_of("leeds", two)
  np.testing.assert_allclose(row.accuracy, 2.6 / 6, rtol=1e-6)
  np.testing.assert_allclose(row.accuracy_domain_0, 1.8 / 4, rtol=1e-6)
  np.testing.assert_allclose((row.accuracy_domain_1, row.accuracy_out), 0.4, rtol=1e-6)
  assert math.isnan(row.accuracy_domain_2)
  assert row.regret == pytest.approx(((3 - 1) + (4 - 2) + (3 - 2)) / 3)
  assert (row.num_switches, row.switch_precision, row.switch_recall) == (2, 0.5, 0.5)
  assert (row.num_shifts, row.shift_precision, row.shift_recall) == (1, 0.5, 1.0)
  assert (row.meta_updates, row.seconds_per_round, row.seed) == (3, 1.0, 7)
  np.testing.assert_allclose((row.accuracy_after, row.accuracy_after_domain_1), (4 / 6, 0.6))
  silent = row_of("maml", two)
  assert math.isnan(silent.switch_recall)
  # A shift that is flagged when its task is over is missed; the third domain is out, too.
  late = row_of("leeds", two._replace(shift=np.tile(np.arange(6) == 4, (2, 1))))
  assert late.shift_recall == 0
  three = row_of("leeds", two._replace(domain=np.tile([0, 0, 1, 1, 2, 2], (2, 1))))
  np.testing.assert_allclose((three.accuracy_out, three.accuracy_domain_2), (0.5, 0.6), rtol=1e-6)
  text = meta_report.accuracy_rows([row])[0]
  assert text[:3] == ["LEEDS", "43.3", "45.0"]
  assert text[-1] == "100"
  assert meta_report.detection_rows([row])[1] == [
    "LEEDS",
    "1 shifts",
    "0.50",
    "1.00",
    "0.00",
    "1.0",
  ]
  assert meta_report.detection_rows([silent]) == []


def test_the_best_fixed_models_are_trained_on_all_rounds_of_their_task(tmp_path):
  """On a quadratic: long training finds the mean of the task's points."""

  def loss(x, y, batch):
    miss = x + y - batch.mean(axis=0)
    return 0.5 * jnp.sum(miss**2), miss

  model = meta_model.Model(lambda key: jnp.zeros(2), loss, jnp.zeros_like)
  stream = jaxbo.tasks.moving_gaussian_stream(2, 5, stay_probability=0.8, domain_step=0.0)
  keys = meta_runs.keys_of([3])
  find = jax.jit(lambda x: meta_runs.best_losses(model, x, stream, keys, 30, passes=100, rate=0.05))
  found = np.asarray(find(jnp.full(2, -6.0)))[0]
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


def test_rates_are_searched_one_after_the_other_and_thresholds_are_calibrated():
  """The accuracy is a known function of the rates; LEEDS is played as its version that is told."""
  played = []
  rng = np.random.default_rng(0)
  switches = rng.random((1, 400)) < 0.3
  domain = np.where(np.cumsum(switches) % 2, 0, 1)[None]
  scores = np.where(switches, 3.0, 1.0) + rng.random((1, 400))
  shift_scores = domain + 0.1 * rng.random((1, 400))

  def play(name, rates):
    played.append(name)
    value = 1 - abs(math.log(rates.inner / 0.4)) - abs(math.log(rates.outer / 3e-4)) / 10
    loss = np.full((1, 400), np.nan if rates.in_scale == 1.0 else 1.0)
    mine = trace()._replace(
      before=np.full((1, 400), value), loss=loss, switch_score=scores,
      shift_score=shift_scores + 50 * (rates.inner != 0.4),  # Of the best rates, not of others.
      task_switch=switches, domain=domain,
    )  # fmt: skip
    return [Run(mine, 1.0, 1)]

  rates, value = meta_tuning.search("leeds", play)
  assert (rates.inner, rates.outer) == (0.4, 3e-4)
  assert rates.in_scale < 1  # What diverged is never chosen.
  assert value == pytest.approx(1.0)
  assert 2.0 <= rates.switch <= 3.01
  assert 0 < rates.shift <= 0.1
  assert set(played) == {"leeds_told"}
  assert len(played) == 9  # 4 + 3 + 2: nothing twice.
  diverged = lambda name, rates: [Run(trace(loss=np.float32([np.nan] * 6)), 1.0, 1)]
  with pytest.raises(ValueError, match="every rate of the grid diverged for maml"):
    meta_tuning.search("maml", diverged)


@pytest.mark.parametrize("with_detector", [0.6, 0.4])
def test_c_maml_leaves_updates_out_where_that_is_better(with_detector):
  """Without a detector the accuracy is 0.5; scores are 3 at switches and 1 elsewhere."""
  switch = np.arange(6)[None] % 2 == 0

  def play(name, rates):
    accuracy = 0.5 if math.isinf(rates.switch) else with_detector
    before = np.full((1, 6), accuracy)
    mine = trace()._replace(before=before, switch_score=1.0 + 2 * switch, task_switch=switch)
    return [Run(mine, 1.0, 1)]

  rates, value = meta_tuning.search("c_maml", play)
  assert (rates.switch, value) == ((2.0, 0.6) if with_detector > 0.5 else (INFINITY, 0.5))


def test_thresholds_leave_out_the_first_round_of_every_stream():
  mine = trace(switch_score=np.float32([99, 1, 5, 1, 5, 1]), task_switch=np.arange(6) % 2 == 0)
  assert meta_tuning.thresholds([Run(mine, 1.0, 1)] * 2).switch == 3.0


def test_the_grid_of_bgd_is_of_deviations():
  assert meta_tuning.grid_of("bgd", "inner") == meta_tuning.DEVIATIONS
  assert meta_tuning.grid_of("maml", "inner") == meta_tuning.GRIDS["inner"]


def test_rates_are_kept_by_setting_and_method(tmp_path):
  path = tmp_path / "rates.json"
  meta_tuning.write(path, "a", "c_maml", Rates(0.1, 0.01, switch=INFINITY))
  meta_tuning.write(path, "a", "leeds", Rates(0.2, 0.01, 0.1, switch=1.5, shift=-4.0))
  found = dict(meta_tuning.all_rates(path, "a", ("c_maml", "leeds_told")))
  assert found["c_maml"].switch == INFINITY
  assert math.isnan(found["c_maml"].shift)
  assert found["leeds_told"].inner == 0.2
  with pytest.raises(ValueError, match="no rates were chosen for maml on a: choose them with --tu"):
    dict(meta_tuning.all_rates(path, "a", ("maml",)))


def test_the_rates_file_has_all_that_the_default_run_needs():
  default = Config()
  assert dict(meta_tuning.all_rates(default.rates_file, default.name(), default.methods))


# -- The script.


def rows_of(path):
  with (path / "results.csv").open() as file:
    return list(csv.DictReader(file))


def test_a_run_is_stopped_and_goes_on_to_the_same_results(tmp_path, capsys, monkeypatch):
  mine = config(tmp_path, sweep=True)
  write_rates(mine)
  play, calls = meta_workplace.Workplace.play, []

  def interrupted(self, *args, **kwargs):
    calls.append(args[0])
    if len(calls) == 4:  # The second seed of MAML.
      raise KeyboardInterrupt
    return play(self, *args, **kwargs)

  monkeypatch.setattr(meta_workplace.Workplace, "play", interrupted)
  assert script.main(dataclasses.replace(mine, sweep=False)) == 130
  output = capsys.readouterr().out
  assert "Interrupted; --resume goes on. What was finished until then:" in output
  assert {row["method"] for row in rows_of(mine.output_dir)} == {"leeds"}
  assert script.main(mine) == 2
  assert "has checkpoints of an earlier run" in capsys.readouterr().err
  assert script.main(dataclasses.replace(mine, resume=True)) == 0
  output = capsys.readouterr().out
  for word in ("glyphs, p = 0.7: 12 rounds, 3-way 2-shot", "LEEDS", "negatives", "Detection"):
    assert word in output
  assert calls[4:6] == ["maml", "leeds"]  # What was kept is not played again; then the sweep.
  rows = rows_of(mine.output_dir)
  assert [(row["method"], row["seed"]) for row in rows] == [
    (method, seed) for method in mine.methods for seed in "01"
  ]
  assert all(math.isfinite(float(row["regret"])) for row in rows)
  check_traces(mine)
  for name in (script.PICTURE, script.SWEEP):
    with Image.open(mine.output_dir / name) as picture:
      assert picture.width > 800
  less = dataclasses.replace(mine, resume=True, methods=("leeds",), sweep=False)
  assert script.main(less) == 0
  rows_of_others = [row for row in rows_of(mine.output_dir) if row["method"] != "leeds"]
  assert rows_of_others == [row for row in rows if row["method"] != "leeds"]  # Nothing is lost.
  bad = dataclasses.replace(mine, resume=True, pretrain_tasks=3)
  assert script.main(bad) == 2
  assert "pretrain_tasks must be 2 to resume, got 3" in capsys.readouterr().err


def check_traces(mine):
  """The first seed of LEEDS (thresholds 1.2 and -1.5), and the ends of its sweeps."""
  load = lambda folder: meta_runs.load_run(mine.output_dir / "checkpoints" / folder / "0")
  run, maml = load("0.7_leeds"), load("0.7_maml")
  found, later = run.trace, np.arange(ROUNDS)[None] > 0
  assert run.seconds > 0
  np.testing.assert_array_equal(found.switch_score, found.loss)
  np.testing.assert_array_equal(found.switch, ~later | (found.loss > np.float32(1.2)))
  np.testing.assert_array_equal(found.shift, found.switch & (found.shift_score > -1.5))
  np.testing.assert_array_equal(found.meta_updated, found.switch)
  np.testing.assert_array_equal(found.task_switch, maml.trace.task_switch)
  assert np.any(found.before != found.after)
  assert not np.any(maml.trace.meta_updated)
  assert np.all(load("0.7_sweep_switch_0").trace.switch)  # A threshold of zero.
  assert np.sum(load("0.7_sweep_switch_6").trace.switch) == 1  # One of 4.8.
  assert not np.any(load(f"0.7_sweep_shift_{last_shift(mine)}").trace.shift[found.switch])


def last_shift(mine):
  folders = (mine.output_dir / "checkpoints").glob("0.7_sweep_shift_*")
  return max(int(folder.name.rsplit("_", 1)[1]) for folder in folders)


def traces(mine, name, seeds):
  """The trace of a method on the tiny model."""
  model = mine.model("head" if METHODS[name].begins == "anil" else "all")
  xs = meta_runs.initial(model, "random", {}, seeds)
  stream, rates = mine.stream(glyphs(16, 6).test, 0.7), Rates(0.3, 0.01, 0.5, 2.0, 1.0, -1.5)
  x = jax.tree.map(lambda leaf: leaf[0], xs)
  program = meta_runs.make_program(name, model, mine.switches(), ROUNDS, x, stream, seeds)
  assert program.state_bytes > 0
  return meta_runs.play(program, rates, xs, stream, seeds).trace


def test_seeds_side_by_side_are_as_one_after_the_other(tmp_path):
  mine = config(tmp_path)
  with jax.debug_key_reuse(False):  # It takes the batched switch of the stream for reuse.
    both = traces(mine, "maml", [4, 5])
  one = traces(mine, "maml", [5])
  np.testing.assert_allclose(both.loss[1:], one.loss, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(both.task_switch[1:], one.task_switch)
  assert np.any(both.loss[0] != both.loss[1])


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
    model = mine.model("head" if method.begins == "anil" else "all")

    def run(x, stream, method=method, model=model):
      learner = method.make(model, rates, mine.switches())
      state = learner.init(x, stream=stream, key=0)
      return meta_runs.trace_of(learner.run(state, stream, ROUNDS)[1])

    found = jax.eval_shape(run, model.init(jax.random.key(0)), stream)
    assert {leaf.shape for leaf in found} == {(ROUNDS,)}, name


def test_what_methods_are_made_of(tmp_path):
  """From their first states: scales of gates, thresholds, modulation, responses, bytes."""
  mine = config(tmp_path, no_switch_scale=0.125)
  rates, batch = Rates(0.5, 0.01, 0.25, 2.0, 1.5, -2.0), (jnp.zeros((6, 16, 16, 1)), jnp.arange(6))
  x, states = mine.model().init(jax.random.key(0)), {}
  first = lambda name, switches: (
    METHODS[name].make(mine.model(), rates, switches).init(x, (batch, batch))
  )
  for name in ("maml", "c_maml", "c_maml_um", "c_maml_pap", "leeds", "leeds_told"):
    states[name] = first(name, mine.switches())
  scales = {name: optax.tree.get(state, "gate_scales") for name, state in states.items()}
  assert scales["leeds"] == scales["leeds_told"] == (0.125, 0.25, 1.0)
  assert scales["c_maml"] == (1.0, 0.0, 0.0)
  rules = {name: tuple(state.detector_state[1:]) for name, state in states.items()}
  assert rules["leeds"] == ((1.5,), (-2.0,))
  assert rules["leeds_told"] == ((), ())
  assert rules["c_maml"][0] == (1.5,)
  modulated = {name: optax.tree.get(states[name], "modulation") for name in states}
  kinds = [name for name, value in modulated.items() if value is not None]
  assert kinds == ["c_maml_um", "c_maml_pap"]
  buffers = {name: isinstance(s.last_support, jaxbo.SupportBuffer) for name, s in states.items()}
  assert [name for name, value in buffers.items() if value] == ["c_maml_pap"]
  dropped = first("leeds", mine.switches()._replace(first_order=True))
  assert optax.tree.get(dropped, "response_finite") is None
  assert optax.tree.get(states["leeds"], "response_finite") is not None
  # The task's x and y are 28 numbers each; two thresholds; two flags.
  streaming = states["maml"]._replace(task_stream_state=jnp.zeros(99))
  assert meta_methods.state_bytes(streaming, x) == 2 * 28 * 4 + 2 * 4 + 2
  begins = {name: method.begins for name, method in METHODS.items() if method.begins != "maml"}
  assert begins == {"online_sgd": "random", "scratch": "random", "anil": "anil"}


def test_a_round_has_as_many_queries_as_images_where_they_are_given(tmp_path):
  shapes = {}
  for query in ("same", "given"):
    mine = config(tmp_path, query=query)
    assert mine.switches().num_examples == 6
    stream = mine.stream(glyphs(16, 6).test, 0.7)
    shapes[query] = jax.eval_shape(stream.step, stream.init(0))[1]
  assert shapes["same"].query_images is None
  assert shapes["given"].query_images.shape == shapes["same"].images.shape == (6, 16, 16, 1)


def test_sizes_of_tasks_and_groups_of_seeds(tmp_path):
  mine = config(tmp_path, num_shots=5, first_seed=7, seeds=4, seeds_at_once=2)
  assert [group.tolist() for group in mine.groups()] == [[7, 8], [9, 10]]
  before = mine.pretraining()
  assert (before.num_ways, before.num_shots, before.num_queries) == (3, 5, 5)
  assert mine.switches().num_examples == 15


def test_thresholds_are_swept_on_the_first_stream_and_seed(tmp_path):
  """Accuracies, domains and scores are those of the first of two seeds."""
  rows, played = {}, []
  for name, seed in (("leeds", 0), ("other", 1)):
    rows[name] = trace(
      before=np.float32([0.1, 0.3, 0.5, 0.7, 0.9, 0.5]) - 0.1 * seed,
      domain=np.int32([0, 0, 1, 1, 2, 2]),
      task_switch=np.array([1, 0, 1, 0, 1, 0], bool),
      switch=np.array([1, 0, 1, 0, 1, seed], bool),
      shift=np.array([0, 0, 1, 0, 1, 0], bool),
      switch_score=np.float32([9, 1, 3, 1, 5, 1]),
      shift_score=np.float32([-3, 99, -1, 99, 1, 99]),
    )
  both = Trace(*(np.concatenate(pair) for pair in zip(*rows.values(), strict=True)))

  def kept(folder, name, rates, p, seeds):
    played.append((folder, name, p, seeds.tolist(), rates))
    return Run(both, 1.0, 1)

  mine = config(tmp_path, stay_probabilities=(0.5, 0.75), seeds=4, seeds_at_once=2)
  place = types.SimpleNamespace(
    config=mine, kept=kept, task=0, progress=types.SimpleNamespace(update=lambda *_, **__: None)
  )
  runs = {(p, "leeds"): Run(both, 1.0, 1) for p in mine.stay_probabilities}
  runs[0.75, "leeds"] = Run(trace(switch=np.ones(6, bool)), 1.0, 1)
  found = meta_workplace.sweep_all(place, Rates(0.5, 0.01, 0.5, switch=2.0, shift=0.25), runs)
  np.testing.assert_allclose(found["switch"].thresholds, [0, 0.8, 1.4, 2, 3, 4, 8])
  # The quantiles of -3, -1 and 1, the scores where a switch was detected, and the chosen one.
  np.testing.assert_allclose(found["shift"].thresholds, [-3, -2, -1, 0, 0.25, 1])
  assert {(name, p, tuple(seeds)) for _, name, p, seeds, _ in played} == {("leeds", 0.5, (0, 1))}
  assert [rates.switch for *_, rates in played[:7]] == found["switch"].thresholds.tolist()
  assert [rates.shift for *_, rates in played[7:]] == found["shift"].thresholds.tolist()
  assert {rates.shift for *_, rates in played[:7]} == {0.25}
  assert len({folder for folder, *_ in played}) == 13
  for sweep in found.values():
    np.testing.assert_allclose(sweep.accuracy, 0.5, rtol=1e-6)
    np.testing.assert_allclose(sweep.out, 2.6 / 4, rtol=1e-6)
    np.testing.assert_allclose((sweep.precision, sweep.recall), 1)
  assert (found["switch"].chosen, found["shift"].chosen) == (2.0, 0.25)
  np.testing.assert_allclose(found["switch"].logged[:, 1], [1, 1, 1, 1, 0.5, 0.5, 0])


def test_thresholds_that_are_not_given_are_calibrated_on_validation_streams(tmp_path):
  """Scores are 3 at switches and 1 elsewhere, and by domain."""
  played = []
  switch, domain = np.tile([True, False], 10)[None], np.repeat([0, 1], 10)[None]

  def play(name, rates, p, seeds, *, test):
    played.append((name, p, seeds.tolist(), test))
    return Run(
      trace(switch_score=0)._replace(
        switch_score=1.0 + 2 * switch, shift_score=-5.0 + domain, task_switch=switch, domain=domain
      ),
      1.0,
      1,
    )

  def own(*given):
    mine = config(tmp_path, stay_probabilities=(0.5, 0.75))
    place = types.SimpleNamespace(
      config=mine, play=play, progress=types.SimpleNamespace(console=report.console())
    )
    rates = {"leeds": Rates(0.5, 0.01, 0.5, math.nan, *given), "maml": Rates(0.5)}
    found = script.with_own_thresholds(place, rates)
    assert found["maml"] is rates["maml"]
    assert found["leeds"][:3] == rates["leeds"][:3]
    return found["leeds"][4:]

  assert own(9.0, math.inf) == (9.0, math.inf)
  assert not played
  assert own(9.0, math.nan) == (9.0, -5.0)
  played.clear()
  assert own() == (2.0, -5.0)
  assert played == [("leeds_told", p, [meta_tuning.FIRST_SEED], False) for p in (0.5, 0.75)]


def test_choices_are_tried_on_validation_images(tmp_path):
  domains = glyphs(16, 6)
  for validation, expected in ((True, domains.validation), (False, domains.test)):
    with report.progress_bar(report.console()) as progress:
      place = meta_workplace.Workplace(config(tmp_path, validation=validation), domains, progress)
    np.testing.assert_array_equal(place.arrays[1][0], expected[0])
    np.testing.assert_array_equal(place.arrays[0][0], domains.validation[0])


def test_tuning_plays_its_rounds_of_validation_images_and_a_report_its_own(tmp_path, monkeypatch):
  monkeypatch.setattr(Tiny, "stream", lambda self, images, p: images[0])
  monkeypatch.setattr(meta_workplace.Workplace, "begin", lambda self, name: None)
  monkeypatch.setattr(meta_runs, "initial", lambda *arguments: {"x": np.zeros((1, 2))})
  monkeypatch.setattr(meta_runs, "make_program", lambda *arguments: arguments[3:6:2])
  monkeypatch.setattr(
    meta_runs,
    "play",
    lambda program, rates, xs, stream, seeds: Run(trace(), program[0], (program[1], stream)),
  )
  domains = glyphs(16, 6)
  with report.progress_bar(report.console()) as progress:
    place = meta_workplace.Workplace(config(tmp_path, rounds=9, tune_rounds=4), domains, progress)
  for test, rounds, images in ((False, 4, domains.validation), (True, 9, domains.test)):
    run = place.play("leeds", Rates(0.5, 0.01), 0.5, [0], test=test)
    assert run.seconds == rounds
    for stream in run.state_bytes:
      np.testing.assert_array_equal(stream, images[0])


def test_thresholds_are_judged_by_the_scores_that_were_logged():
  switches = np.array([1, 0, 1, 0, 1, 0], bool)
  one = Trace(
    *(
      leaf[0]
      for leaf in trace(
        task_switch=switches,
        switch=switches,
        domain=np.int32([0, 0, 1, 1, 2, 2]),
        switch_score=np.float32([9, 1, 3, 2, 5, 0]),
        shift_score=np.float32([-9, 7, 4, 7, 6, 7]),
      )
    )
  )
  # Above 1.5 a round in between is taken for a switch; above 4 one of two switches is missed. The
  # first round is left out.
  found = meta_workplace.logged_quality(one, "switch", np.array([1.5, 2.5, 4.0]))
  np.testing.assert_allclose(found, [[2 / 3, 1], [1, 1], [1, 0.5]], rtol=1e-6)
  found = meta_workplace.logged_quality(one, "shift", np.array([0.0, 5.0]))
  np.testing.assert_allclose(found, [[1, 1], [1, 0.5]], rtol=1e-6)


def test_tuning_writes_rates_that_a_run_uses(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(meta_tuning, "GRIDS", {"inner": (0.1, 0.2), "outer": (0.1, 0.2)})
  mine = config(tmp_path, methods=("meta_ogd",), tune=True)
  assert script.main(mine) == 0
  table = json.loads(mine.rates_file.read_text())[mine.name()]
  assert table.keys() == {"meta_ogd"}
  assert set(table["meta_ogd"]) == {"inner", "outer"}
  assert "MetaOGD: accuracy" in capsys.readouterr().out
  assert not mine.output_dir.exists()
  rates = script.chosen_rates(mine)["meta_ogd"]
  assert (rates.inner, rates.outer) == (table["meta_ogd"]["inner"], table["meta_ogd"]["outer"])


def test_tuning_keeps_no_thresholds_of_leeds(tmp_path, monkeypatch):
  """They are those of one pre-trained model."""
  found = Rates(0.1, 0.2, 0.3, switch=1.0, shift=2.0), 0.5
  monkeypatch.setattr(meta_tuning, "search", lambda name, play: found)
  monkeypatch.setattr(meta_tuning, "score", lambda runs: 0.5)
  monkeypatch.setattr(meta_workplace.Workplace, "play", lambda *arguments, **options: None)
  mine = config(tmp_path, methods=("leeds", "c_maml"), tune=True)
  assert script.main(mine) == 0
  rates = meta_tuning.read(mine.rates_file)[mine.name()]
  assert rates["leeds"] == {"inner": 0.1, "outer": 0.2, "in_scale": 0.3}
  assert rates["c_maml"]["switch"] == 1.0


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"dataset": "cifar"}, "dataset must be one of omniglot, glyphs; got 'cifar'"),
    ({"query": "all"}, "query must be one of same, given, next; got 'all'"),
    ({"methods": ()}, "methods must be among online_sgd, fine_tuning"),
    ({"methods": ("maml", "maml")}, "methods must name each one once, got maml maml"),
    ({"stay_probabilities": ()}, "stay_probabilities must have at least one number, got none"),
    ({"stay_probabilities": (1.5,)}, r"stay_probability must be in [0, 1], got 1.5"),
    ({"num_ways": 11}, "num_ways must be at most 10, the classes of domains[1], got 11"),
    ({"num_shots": 11}, "num_ways must be at most 0, the characters with 22 drawings, got 3"),
    ({"domain_probabilities": (0.5, 0.5, 0.5)}, "must be non-negative and sum to 1, got [0.5, 0.5"),
    ({"domain_switch_probability": 2.0}, "domain_switch_probability must be in [0, 1], got 2"),
    ({"rounds": 1}, "rounds must be at least 2, got 1"),
    ({"inner_steps": 0}, "inner_steps must be positive and finite, got 0"),
    ({"no_switch_scale": -0.1}, "no_switch_scale must be non-negative and finite, got -0.1"),
    (
      {"in_distribution_scale": math.nan},
      "in_distribution_scale must be non-negative and finite, got nan",
    ),
    ({"size": 8}, "size must be in [16, 28], got 8"),
    ({"size": 32}, "size must be in [16, 28], got 32"),
    ({"seeds": 3, "seeds_at_once": 2}, "seeds must be a multiple of seeds_at_once=2, got 3"),
    ({"resume": True}, "resume needs an earlier run in output_dir, none in"),
    (
      {"width": 3},
      "no rates were chosen for leeds on glyphs/3way2shot/16px/width3/steps1: choose them with",
    ),
  ],
)
def test_bad_input(wrong, message, tmp_path, capsys):
  write_rates(config(tmp_path))
  assert script.main(config(tmp_path, **wrong)) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_thresholds_that_are_nan_and_a_missing_data_set(tmp_path, capsys):
  mine = config(tmp_path)
  write_rates(mine)
  tables = json.loads(mine.rates_file.read_text())
  tables[mine.name()]["leeds"]["switch"] = "nan"
  mine.rates_file.write_text(json.dumps(tables))
  assert script.main(mine) == 2
  assert "leeds: switch must be a number or an infinity, got nan" in capsys.readouterr().err
  tables[mine.name()]["leeds"]["switch"] = 1.0
  del tables[mine.name()]["c_maml"]["switch"]
  mine.rates_file.write_text(json.dumps(tables))
  assert script.main(dataclasses.replace(mine, methods=("c_maml",))) == 2
  assert "c_maml: switch must be a number or an infinity, got none" in capsys.readouterr().err
  write_rates(dataclasses.replace(mine, dataset="omniglot"))
  missing = dataclasses.replace(mine, dataset="omniglot", data_dir=tmp_path)
  assert script.main(missing) == 2
  assert "no mnist in" in capsys.readouterr().err
  assert meta_config.RATES_FILE.exists()
