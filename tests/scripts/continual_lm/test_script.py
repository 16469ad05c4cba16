"""Continual language-model training: steps against oracles, devices, processes, resuming, files."""

import contextlib
import fcntl
import functools
import io
import itertools
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from jaxbo_models import transformer
from PIL import Image

import jaxbo
from scripts.common import folder, study
from scripts.common.folder import RunFolder
from scripts.common.study import Results, Run
from scripts.continual_lm import data as lm_data
from scripts.continual_lm import methods as lm_methods
from scripts.continual_lm import plots as lm_plots
from scripts.continual_lm import report, runs, train
from scripts.continual_lm.__main__ import ContinualLM
from scripts.continual_lm.config import Config
from scripts.continual_lm.documents import DATASETS
from scripts.continual_lm.methods import METHODS, START, START_KEY, Rates
from scripts.continual_lm.runs import Training
from tests.scripts.common.processes import run_two, some_devices, tables_of
from tests.scripts.continual_lm import small_lm
from tests.scripts.continual_lm.small_lm import SMALL

GOLDEN = Path(__file__).parents[2] / "models" / "golden"
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


def steps(weighting, number, num_steps, rate=0.1):
  """The start, and of each step its rows, the state after it, and what it showed."""
  where = some_devices(number)
  params = jax.device_put(PARAMS, where.everywhere)
  init, program = train.make_program(loss_fn, weighting, rate, where)
  state = init(params)
  yield params, state
  for step in range(num_steps):
    rows = lm_data.rows_of_batch(40, BATCH, (3, 1), step)
    batch = train.batch_of(SEQUENCES, rows, where)
    state, shown = program.compile(state, batch)(state, np.int32(step), batch)
    yield rows, jax.device_get(state.params), jax.device_get(shown)


def test_a_step_goes_along_the_gradient_of_the_weighted_losses(monkeypatch):
  """Weights and gradient in float64 NumPy; two steps, the second at other parameters."""
  make = lambda weighting, rate: optax.chain(jaxbo.reweight(weighting), optax.sgd(rate))
  monkeypatch.setattr(lm_methods, "make_optimizer", make)
  weighting = METHODS["ir_dro"].weighting(Rates(temperature=2.0), DOMAINS)
  (params, _), *after = steps(weighting, 8, 2, 0.01)
  w = np.asarray(PARAMS["w"], np.float64)
  for rows, reached, shown in after:
    x = SEQUENCES.tokens[rows].astype(np.float64)
    losses = (x @ w - 3) ** 2
    weights = np.exp((losses - losses.max()) / 2)
    weights /= weights.sum()
    w = w - 0.01 * (2 * weights * (x @ w - 3)) @ x
    np.testing.assert_allclose(shown.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(shown.weights, BATCH * weights, rtol=1e-3)
    share = 1 / (weights**2).sum() / BATCH
    np.testing.assert_allclose(shown.effective_sample_size, share, rtol=1e-3)
    np.testing.assert_allclose(reached["w"], w, rtol=1e-4)
  np.testing.assert_array_equal(params["w"], PARAMS["w"])  # not taken over


@pytest.mark.parametrize("name", ["ir_dro_compositional", "group_dro"])
def test_eight_devices_do_what_one_does(name):
  """Methods with a state: losses, weights and parameters of three steps."""
  weighting = METHODS[name].weighting(Rates(), DOMAINS)
  (_, *alone), (_, *divided) = (steps(weighting, number, 3) for number in (1, 8))
  weigh, state = jax.jit(weighting.weigh), weighting.init()
  for (rows, params, shown), (_, other_params, other) in zip(alone, divided, strict=True):
    # Weights are those before each update, and groups are domains.
    weights, state, _ = weigh(shown.losses, state, groups=SEQUENCES.domain[rows])
    np.testing.assert_allclose(shown.weights, BATCH * weights, rtol=1e-4)
    chex.assert_trees_all_close(shown, other, rtol=1e-4)
    chex.assert_trees_all_close(params, other_params, rtol=1e-5)


def test_evaluation_is_of_every_sequence_once_and_leaves_out_what_fills_the_last_batch():
  evaluate = train.make_evaluate(loss_fn, BATCH, some_devices(8))
  losses = evaluate(PARAMS, SEQUENCES)  # 40 are two and a half batches
  np.testing.assert_allclose(losses, loss_fn(PARAMS, {"tokens": SEQUENCES.tokens}), rtol=1e-5)


def test_every_method_weighs_as_the_library_does():
  """Band, temperature and level are those of the rates."""
  losses, groups = jnp.asarray(RNG.uniform(1, 4, 16), jnp.float32), jnp.arange(16) % DOMAINS
  rates = Rates(
    temperature=0.7, compositional_rate=0.3, fraction=0.25, shape_temperature=0.6, level=0.5,
    group_step_size=0.9,
  )  # fmt: skip
  expected = {
    "uniform": jaxbo.dro.uniform(),
    "ir_dro": jaxbo.dro.kl(0.7),
    "ir_dro_compositional": jaxbo.dro.compositional(jaxbo.dro.kl(0.7), 0.3),
    "mid_rank_0": jaxbo.dro.mid_rank(0.25, 0),
    "mid_rank_1": jaxbo.dro.mid_rank(0.25, 1),
    "mid_rank_3": jaxbo.dro.mid_rank(0.25, 3),
    "lin_upper": jaxbo.dro.lin_upper(0.6),
    "quadratic": jaxbo.dro.quadratic(0.6),
    "extremes": jaxbo.dro.extremes(0.6),
    "cvar": jaxbo.dro.cvar(0.5),
    "group_dro": jaxbo.dro.group(DOMAINS, 0.9),
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
  tx = lm_methods.make_optimizer(jaxbo.dro.uniform(), 0.1)
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
  scratch, hf = Config(), Config(init="hf", model_dir=Path("x"))
  assert (scratch.sequence_length(), scratch.continual_learning_rate()) == (64, 3e-4)
  assert (hf.sequence_length(), hf.continual_learning_rate()) == (512, 2e-6)


# -- What is said about runs.


def test_weights_are_told_by_domain_and_noise():
  sequences = lm_data.Sequences(
    np.zeros((4, 1), np.int32),
    np.array([0, 0, 1, 1], np.int32),
    np.array([False, True, False, True]),
  )
  weights, rows = np.array([[1.0, 3.0], [0.0, 4.0]]), np.array([[0, 1], [2, 1]])
  shown = train.Shown(np.arange(4.0).reshape(2, 2), weights, np.array([0.0, 1.0]))
  told = report.of_window(shown, rows, sequences, ["a", "b", "c"])
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
  told = report.of_held_out(np.array([1.0, 2.0, 5.0]), held_out, ["a", "b"])
  assert told["loss"] == 0.25 * 1.5 + 0.75 * 5
  assert (told["worst"], told["worst_domain"]) == (5, "b")
  assert (told["loss/a"], told["loss/b"]) == (1.5, 5)
  assert (told["median"], told["q90"], told["q99"]) == (5, 5, 5)


def test_a_run_is_the_mean_over_its_steps():
  line = {"step": 4, "seconds": 1.0, "ess": 0.5, "weight_noise": None, "weight/a": 1.0, "loss": 7.0}
  last = line | {"step": 5, "seconds": 2.0, "ess": 1.0, "weight/a": 2.0}
  told = report.of_run([line, last], 100)
  assert told["ess"] == pytest.approx(0.6)
  assert told["weight/a"] == pytest.approx(1.2)
  assert np.isnan(told["weight_noise"])
  assert told["tokens_per_second"] == 250
  assert "loss" not in told


def test_what_weights_look_at_depends_on_the_batch_size_unless_they_are_compositional():
  losses = RNG.uniform(0, 4, 500).astype(np.float32)
  tilted = np.exp(losses) @ losses / np.exp(losses).sum()
  looks = functools.partial(report.weighted_losses, losses=losses, num_batches=4000)
  spread = losses.std() / np.sqrt(4000)
  one, many = looks(jaxbo.dro.kl(1.0), sizes=[1, 256])
  assert abs(one - losses.mean()) < 4 * spread
  assert abs(many - tilted) < 0.02
  [one] = looks(jaxbo.dro.compositional(jaxbo.dro.kl(1.0), 0.05), sizes=[1])
  # The weights' relative second moment is 2, so the standard error is about 1.5 of the plain one.
  assert abs(one - tilted) < 0.05 + 6 * spread


def test_what_is_looked_at_is_compared_with_uniform_weights_and_with_all_at_once(monkeypatch):
  monkeypatch.setattr(report, "weighted_losses", lambda *_: [])
  looked_at = report.looked_at(Rates(temperature=2.0), np.array([1.0, 3.0]))
  assert looked_at["uniform"] == ([1, 256], [2, 2])
  of_all = (1 + 3 * np.e) / (1 + np.e)
  assert looked_at[""][1] == pytest.approx([of_all, of_all])


def rows():
  """Two seeds; the method is better by 1 and by 3."""
  numbers = lambda loss: dict.fromkeys(("loss", "worst", "median", "q90", "q99", "loss/a"), loss)
  run = {"corruption": 0.2, "ess": 0.5, "weight/a": 2.0, "weight_noise": 0.25}
  run["tokens_per_second"] = 10.0
  return [
    {"corruption": 0.0, "method": START, "seed": 0, **numbers(9.0)},
    {**run, "method": "uniform", "seed": 0, **numbers(5.0)},
    {**run, "method": "uniform", "seed": 1, **numbers(8.0)},
    {**run, "method": "ir_dro", "seed": 0, **numbers(4.0)},
    {**run, "method": "ir_dro", "seed": 1, **numbers(5.0)},
    {**run, "method": "ir_dro", "seed": 2, **numbers(1.0)},  # uniform has no such seed yet
  ]


def test_tables_have_losses_differences_in_pairs_weights_and_times():
  notes = {"time/uniform": {"seconds": 0.1, "ratio": 1, "spread": 0}}
  losses, gains, weights, times = ContinualLM().tables(Results(Config(), [], rows(), notes))
  assert losses.title.startswith("python, 20% of the sequences with shuffled tokens: 60 steps")
  assert losses.columns == ["method", "seeds", "loss", "worst domain", "a"]
  assert losses.rows[0][0] == "checkpoint (no training on)"
  assert losses.rows[1] == ["uniform", "2", *3 * ["6.500 ± 2.121"]]
  assert gains.columns == ["minus uniform", "seeds", "loss", "worst domain", "median", "q90", "q99"]
  assert gains.rows == [
    ["checkpoint (no training on)", "2", *5 * ["2.500 ± 2.121"]],
    ["IR-DRO", "2", *5 * ["-2.000 ± 1.414"]],
  ]
  assert weights.columns == ["method", "seeds", "ESS", "a", "noise weight", "tokens/s"]
  assert weights.rows[0] == ["uniform", "2", "0.50 ± 0.00", "2.00 ± 0.00", "0.25 ± 0.00", "10"]
  assert times.rows == [["uniform", "100.0", "1.00 ± 0.00"]]


def lines():
  """Curves of IR-DRO; that of seed 2 was stopped, and one of seed 1 has no finite loss."""
  found = {
    "seed": [0, 0, 1, 1, 2],
    "step": [2, 4, 2, 4, 2],
    "validation_loss": [4.0, 3.0, 6.0, None, 9.0],
    "ess": [0.5, 0.7, 0.7, 0.9, 0.1],
  }
  return pd.DataFrame(found).assign(corruption=0.2, method="ir_dro")


def test_pictures_show_differences_weights_and_curves_of_finished_runs(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(lm_plots.plots, "save", lambda fig, *_, **legend: figures.append(fig))
  told_lines = pd.concat([lines(), lines()[:1].assign(method="uniform")])
  lm_plots.draw_overview(pd.DataFrame(rows()), told_lines, ["a"], "random", tmp_path)
  looked_at = {"ir_dro": ([1, 2], [3.0, 4.0]), "": ([1, 2], [5.0, 5.0])}
  lm_plots.draw_curves(lines(), 6.0, looked_at, "random", tmp_path)
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


def test_a_run_is_the_same_if_all_that_matters_is():
  may_differ = {
    "methods": ("cvar",), "corruptions": (0.5,), "timing_rounds": 9, "distributed": True,
    "coordinator_address": "x", "num_processes": 9, "process_id": 8, "rates_file": Path("x"),
  }  # fmt: skip
  identity = Config().identity()
  assert Config(**may_differ).identity() == identity
  mine = set(Config.model_fields) - set(study.StudyConfig.model_fields)
  full = {"settings.batch_size", "settings.length", "settings.learning_rate"}  # Of the task.
  assert identity.keys() | may_differ == mine | full
  assert Config(task="instruct").identity()["settings.length"] == 256
  assert Config(rates=Rates(level=0.5)).identity() != identity


# -- Whole runs.


@pytest.fixture(scope="module")
def small():
  """Two small domains on one device, which saves seconds."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setitem(DATASETS, "python", small_lm.corpus)
    monkeypatch.setattr(runs.devices, "all_devices", lambda: some_devices(1))
    yield


def play(**options):
  return study.run(ContinualLM(), Config(**SMALL | options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small):
  """The options of a run, and what it has printed."""
  options = {"output_dir": tmp_path_factory.mktemp("whole"), "timing_rounds": 1}
  options |= {"methods": ("uniform", "ir_dro_compositional")}
  with contextlib.redirect_stdout(io.StringIO()) as output:
    assert play(**options) == 0
  return options, output.getvalue()


def test_a_run_writes_its_files_and_a_resumed_one_repeats_nothing(whole, capsys, monkeypatch):
  options, output = whole
  for word in ("checkpoint (no training on)", "20% of the sequences with shuffled", "digits"):
    assert word in output
  runs = [(0.0, START), *itertools.product((0.0, 0.2), options["methods"])]
  lines, found, notes = before = folder.read(options["output_dir"])
  of_line = lambda line: (line["corruption"], line["method"], line["step"])
  assert [of_line(line) for line in lines] == [
    (0.0, START, 2),
    *((*run, step) for run in runs[1:] for step in (2, 4)),
  ]
  assert [(row["corruption"], row["method"]) for row in found] == runs
  losses = [row["loss"] for row in found]
  assert len(set(losses)) == 5  # Every run has gone somewhere else.
  assert 0 < min(losses) < max(losses) < 8
  assert found[3]["weight_noise"] == pytest.approx(1)  # uniform weights
  assert found[0]["validation_loss"] == lines[0]["validation_loss"]
  assert notes["time/uniform"]["ratio"] == 1
  for name in ("continual_lm.png", "curves.png"):
    with Image.open(options["output_dir"] / name) as picture:
      assert picture.width > 100
  monkeypatch.setattr(ContinualLM, "draw", lambda *_: None)  # It takes seconds.
  assert play(**options | {"corruptions": (0.2,), "methods": ("uniform",), "resume": True}) == 0
  assert "clean data" not in capsys.readouterr().out  # Only what was asked for is told.
  assert str(folder.read(options["output_dir"])) == str(before)  # Nothing is lost.


def test_a_step_is_on_the_batch_of_its_number_with_the_noise_of_its_seed(tmp_path, small):
  """Both phases have batches of their own; the first one has no noise."""
  config = Config(**SMALL | {"output_dir": tmp_path})
  with contextlib.closing(RunFolder(config, "", "")) as files:
    run = Run(ContinualLM(), config, ContinualLM().prepare(config), files)
  train_on = run.data.data.train
  start = Training(run, **START_KEY | {"seed": 5})
  noisy = Training(run, start.state, corruption=0.5, method="uniform", seed=5)
  expected = lm_data.corrupt(train_on, 0.5, "shuffled", 257, 5)
  for task, sequences, stream in ((start, train_on, (5, 0)), (noisy, expected, (5, 1))):
    tokens = sequences.tokens[lm_data.rows_of_batch(len(sequences.tokens), 8, stream, 7)]
    losses = jax.jit(run.data.language.loss_fn)(start.state.params, {"tokens": tokens})
    _, (shown, _) = task.step(jax.tree.map(jnp.copy, task.state), 7)
    np.testing.assert_allclose(shown.losses, losses, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_weights_from_a_folder_are_trained_on_as_they_are(family, tmp_path, small):
  """The checkpoint has the loss of the model that was read; OPT has another end of a text."""
  end = "</s>" if family == "opt" else "<|endoftext|>"
  model_dir = shutil.copytree(GOLDEN / family, tmp_path / "model")
  letters = [end, *"abcdefghijklmnopqrstuvwxyz0123456789Ġ"]  # Ġ is a space.
  write = lambda words: (model_dir / "vocab.json").write_text(
    json.dumps({word: i for i, word in enumerate(words)})
  )
  write(letters)
  (model_dir / "merges.txt").write_text("#version: 0.2\n")
  hf = {"init": "hf", "model_dir": model_dir, "methods": ("uniform",), "corruptions": (0.0,)}
  config = Config(**SMALL | hf | {"output_dir": tmp_path / "out", "steps": 1})
  given = ContinualLM().prepare(config)
  assert given.data.train.tokens[0].tolist() == [
    letters.index(letter.replace(" ", "Ġ")) for letter in small_lm.WORDS[:16]
  ]
  assert given.language.tokenizer.end_of_text == 0
  if family == "opt":
    model, params = transformer.from_safetensors(model_dir)
    test = given.data.test
    tokens = {"tokens": jnp.asarray(test.sequences.tokens)}
    losses = jax.jit(transformer.sequence_losses(model))(params, tokens)
    assert study.run(ContinualLM(), config) == 0
    lines, (checkpoint, uniform), _ = folder.read(tmp_path / "out")
    assert checkpoint["loss"] == pytest.approx(float(test.weights @ losses), rel=1e-5)
    assert 0 < abs(uniform["loss"] - checkpoint["loss"]) < 1e-2  # A step of 2e-6.
    assert [line["method"] for line in lines] == ["uniform"]
  with pytest.raises(ValueError, match="length must be at most 16, that of the model; got 17"):
    ContinualLM().prepare(config.but(length=17))
  write(letters + [f"{i}#" for i in range(13)])
  with pytest.raises(ValueError, match="must have at most the model's 50 tokens, got 51 in"):
    ContinualLM().prepare(config)


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"init": "hf"}, "model_dir should be given with init=hf and only then, got None"),
    ({"corruptions": (0.1, 0.1)}, "corruptions should name each one once"),
    ({"process_id": 0}, "coordinator_address, num_processes and process_id should come together"),
    ({"coordinator_address": "x:1"}, "num_processes and process_id should come together"),
    (
      {"coordinator_address": "x:1", "num_processes": 2, "process_id": 2},
      "process_id should be below num_processes = 2, got 2",
    ),
  ],
)
def test_fields_that_do_not_fit_together_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    Config(**wrong)


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"rates": Rates(fraction=0.5)}, "band must be below 1 / fraction = 2"),
    ({"batch_size": 12}, "batch_size must be a multiple of the number of devices, 8, got 12"),
    ({"batch_size": 800_000}, "batch_size must be at most"),
    ({"length": 100_000}, "length must leave a sequence of every domain"),
    ({"width": 9}, "width must be a multiple of num_heads"),
    ({"dataset": "text_domains", "data_dir": Path("/nowhere")}, "no text_domains in /nowhere"),
  ],
)
def test_what_the_data_or_the_model_cannot_do_is_refused(tmp_path, capsys, small, wrong, message):
  assert play(**{"output_dir": tmp_path / "out"} | wrong) == 2
  assert message in capsys.readouterr().err


def test_two_processes_do_what_one_does_and_go_on_bit_for_bit_where_they_were_stopped(
  tmp_path, whole
):
  """Before they go on, both refuse a run, and process 0 alone refuses another one."""
  (tmp_path / "in_use").mkdir()
  with (tmp_path / "in_use" / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    options = SMALL | {"methods": ("ir_dro_compositional",), "corruptions": (0.2,)}
    flags = *Config(**options).flags().split(), "--output-dir", tmp_path / "stopped"
    outputs = run_two(small_lm.__name__, *flags, devices_each=1)
  for said, by in (
    ("[2, 2, 0, 0]", [True, True]),
    ("resume needs an earlier run in output_dir", [True, True]),
    ("is in use by another process", [True, False]),
    ("process 0 cannot go on", [False, True]),
    ("results.csv and pictures are in", [True, False]),
    ("checkpoint (no training on)", [True, False]),
  ):
    assert [said in output for output in outputs] == by, said
  for mine, theirs, of_one, names in zip(
    tables_of(tmp_path / "stopped"),
    tables_of(tmp_path / "whole"),
    tables_of(whole[0]["output_dir"]),
    (["train_loss", "validation_loss", "ess", "weight_clean"], ["loss"]),
    strict=True,
  ):
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    same = (of_one["corruption"] == 0.2) & (of_one["method"] != "uniform")
    expected = of_one[same | (of_one["method"] == START)]
    np.testing.assert_allclose(mine[names], expected[names], rtol=1e-3)
    assert ((mine["ess"] < 1) == (mine["method"] != START)).all()
