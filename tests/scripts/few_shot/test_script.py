"""Few-shot learning: gradients of all methods against plain JAX, resuming, errors, files."""

import csv
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from scripts.common import fewshot_data
from scripts.few_shot import __main__ as script
from scripts.few_shot import problem as few_shot
from scripts.few_shot import setting as few_shot_setting
from scripts.few_shot import trainer
from scripts.few_shot.__main__ import Config

pytestmark = pytest.mark.slow  # All together, not each.

SETTINGS = few_shot_setting.Settings(
  num_ways=2,
  num_shots=2,
  num_queries=1,
  num_rotations=1,
  num_tasks=2,
  inner_steps=3,
  inner_learning_rate=0.3,
  num_samples=3 * 4,
  smoothing=1e-3,
  linear_steps=20,
  maml_steps=2,
  maml_learning_rate=0.1,
)


def features(x, images):
  """Three features of eight pixels, so that everything can be exact."""
  return jnp.tanh(images.reshape(len(images), -1) @ x["w"])


BACKBONE = few_shot.Backbone(
  lambda key, images: {"w": jax.random.normal(key, (8, 3))}, features, features
)


def episodes(num_tasks=2):
  classes = fewshot_data.ImageClasses(
    jax.random.uniform(jax.random.key(5), (6, 4, 4, 2, 1)), jnp.full(6, 4), jnp.arange(6)
  )
  return few_shot_setting.sampler(SETTINGS, 1, num_tasks)(jax.random.key(1), classes)


def hypergradient(name, monkeypatch, settings=SETTINGS, seed=0):
  """What the first step of a method moves along, and its initial state."""
  monkeypatch.setattr(few_shot, "optimizer", lambda settings, num_steps: optax.sgd(1.0))
  method = few_shot.make_method(name, BACKBONE, settings, 1, seed)
  state = method.init(jax.random.key(0), jnp.zeros((2, 4, 2, 1)))
  before = jax.tree.map(np.asarray, state.x)
  after, loss = jax.jit(method.step)(state, episodes())
  return jax.tree.map(lambda a, b: a - b, before, after.x), state, loss, method


def mean_over_tasks(of_task, x):
  losses = [of_task(x, jax.tree.map(lambda leaf, t=t: leaf[t], episodes())) for t in range(2)]
  return sum(losses) / 2


def softmax_loss(w, b, z, labels):
  return jnp.mean(
    jax.nn.logsumexp(z @ w + b[None], axis=1) - (z @ w + b[None])[jnp.arange(len(z)), labels]
  )


def anil_loss(x, episode, stop=False):
  """The query loss after SGD with momentum on the head, written anew."""
  z = features(x, episode.support_images)
  if stop:
    z = jax.lax.stop_gradient(z)

  def ridge_loss(head):
    penalty = sum(jnp.sum(leaf**2) for leaf in head)
    return softmax_loss(*head, z, episode.support_labels) + 0.1 * penalty

  head = (jnp.zeros((3, 2)), jnp.zeros(2))
  trace = jax.tree.map(jnp.zeros_like, head)
  for _ in range(3):
    trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, jax.grad(ridge_loss)(head))
    head = jax.tree.map(lambda y, t: y - 0.3 * t, head, trace)
  return softmax_loss(*head, features(x, episode.query_images), episode.query_labels)


@pytest.mark.parametrize("name", ["itd", "first_order", "esj_through"])
def test_anil_steps_along_the_gradient_of_the_composed_loss(name, monkeypatch):
  """ESJ has as many orthogonal directions as features, which makes it exact."""
  result, state, loss, _ = hypergradient(name, monkeypatch)
  of_task = lambda x, episode: anil_loss(x, episode, stop=name == "first_order")
  value, expected = jax.value_and_grad(lambda x: mean_over_tasks(of_task, x))(state.x)
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  tolerance = 1e-2 if name == "esj_through" else 1e-4
  error = np.linalg.norm(result["w"] - expected["w"]) / np.linalg.norm(expected["w"])
  assert error < tolerance
  if name == "first_order":  # The response is no small part.
    exact = jax.grad(lambda x: mean_over_tasks(anil_loss, x))(state.x)
    assert np.linalg.norm(exact["w"] - expected["w"]) > 0.05 * np.linalg.norm(exact["w"])


def test_aid_tends_to_itd_with_many_inner_steps(monkeypatch):
  settings = dataclasses.replace(SETTINGS, inner_steps=300)
  aid, *_ = hypergradient("aid", monkeypatch, settings)
  itd, *_ = hypergradient("itd", monkeypatch, settings)
  np.testing.assert_allclose(aid["w"], itd["w"], rtol=1e-2, atol=1e-4)


def test_esj_on_parameters_is_the_response_of_perturbed_parameters(monkeypatch):
  """Many directions on 24 parameters: within four standard errors of the exact one."""
  settings = dataclasses.replace(SETTINGS, num_samples_plain=4000)
  result, state, *_ = hypergradient("esj", monkeypatch, settings)
  exact = jax.grad(lambda x: mean_over_tasks(anil_loss, x))(state.x)["w"]
  first_order, *_ = hypergradient("first_order", monkeypatch)
  response = np.linalg.norm(exact - first_order["w"])
  assert np.linalg.norm(result["w"] - exact) < 2 * response * np.sqrt(25 / 4000)


def test_esj_on_parameters_moves_along_directions_of_the_parameters(monkeypatch):
  """With one sample the response is a multiple of its direction, which the keys' law gives."""
  settings = dataclasses.replace(SETTINGS, num_samples_plain=1)
  result, *_ = hypergradient("esj", monkeypatch, settings, seed=3)
  first_order, *_ = hypergradient("first_order", monkeypatch)
  response = np.ravel(result["w"] - first_order["w"])
  key = few_shot_setting.draw_key(few_shot_setting.Draw.DIRECTIONS, 3)
  sample_key = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
  direction = np.ravel(jax.random.normal(jax.random.split(sample_key, 1)[0], (8, 3)))
  cosine = response @ direction / np.linalg.norm(response) / np.linalg.norm(direction)
  np.testing.assert_allclose(abs(cosine), 1, atol=1e-3)


def test_maml_steps_along_the_gradient_through_all_parameters(monkeypatch):
  result, state, *_ = hypergradient("maml", monkeypatch)

  def of_task(x, episode):
    def loss(theta, images, labels):
      head = theta["head"]
      return softmax_loss(head["w"], head["b"], features(theta["backbone"], images), labels)

    theta = x
    for _ in range(2):
      grads = jax.grad(loss)(theta, episode.support_images, episode.support_labels)
      theta = jax.tree.map(lambda p, g: p - 0.1 * g, theta, grads)
    return loss(theta, episode.query_images, episode.query_labels)

  expected = jax.grad(lambda x: mean_over_tasks(of_task, x))(state.x)
  chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-6)


def test_protonet_predicts_the_nearest_class_mean(monkeypatch):
  _, state, loss, method = hypergradient("protonet", monkeypatch)
  total = 0.0
  for t in range(2):
    episode = jax.tree.map(lambda leaf, t=t: np.asarray(leaf[t]), episodes())
    z, queries = (
      np.asarray(features(state.x, jnp.asarray(images)), np.float64)
      for images in (episode.support_images, episode.query_images)
    )
    means = np.stack([z[episode.support_labels == way].mean(axis=0) for way in range(2)])
    logits = -((queries[:, None] - means) ** 2).sum(axis=2)
    np.testing.assert_allclose(method.predict(state, episode), logits, rtol=1e-4)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    total += -np.log(probabilities[np.arange(2), episode.query_labels]).mean() / 2
  np.testing.assert_allclose(loss, total, rtol=1e-4)


@pytest.mark.parametrize("name", few_shot.LABELS)
def test_evaluation_adapts_to_the_support_set_and_leaves_the_state(name, monkeypatch):
  """As training does; with support and query the same, it must beat chance."""
  _, state, _, method = hypergradient(name, monkeypatch)
  step = jax.jit(method.step)
  later, _ = step(state, episodes())  # Heads start elsewhere than at zero now.
  predicted = jax.jit(jax.vmap(method.predict, (None, 0)))(later, episodes())
  query_loss = few_shot.cross_entropy(predicted, episodes().query_labels)
  np.testing.assert_allclose(query_loss, step(later, episodes())[1], rtol=1e-4)
  episode = jax.tree.map(lambda leaf: leaf[0], episodes())
  images = jnp.stack([jnp.zeros((4, 2, 1)), jnp.ones((4, 2, 1))])
  episode = episode._replace(
    support_images=images[jnp.array([0, 0, 1, 1])],
    query_images=images,
    query_labels=jnp.array([0, 1], jnp.int32),
  )
  assert few_shot.accuracy(method, state, episode) == 1.0
  swapped = episode._replace(support_labels=1 - episode.support_labels)
  assert few_shot.accuracy(method, state, swapped) == 0.0


def test_the_outer_rate_falls_to_a_tenth_along_a_cosine_and_stays():
  """Adam's step is its rate where the gradient is always 1."""
  optimizer = few_shot.optimizer(few_shot_setting.Settings(outer_learning_rate=0.5), 10)
  step = lambda state, _: optimizer.update(jnp.float32(1), state)[::-1]
  _, updates = jax.lax.scan(step, optimizer.init(jnp.float32(0)), length=13)
  turns = np.minimum(np.arange(13), 10) / 10
  np.testing.assert_allclose(
    -updates, 0.5 * (0.1 + 0.9 * (1 + np.cos(np.pi * turns)) / 2), rtol=1e-4
  )


def test_pixels_are_scaled_to_the_unit_interval_and_floats_left():
  scaled = few_shot.scale_pixels(jnp.array([0, 51, 255], jnp.uint8))
  np.testing.assert_allclose(scaled, [0.0, 0.2, 1.0])
  np.testing.assert_array_equal(few_shot.scale_pixels(jnp.array([0.0, 51.0])), [0.0, 51.0])


def test_a_checkpoint_is_a_copy_of_the_state(tmp_path, monkeypatch):
  """The state is donated to the next step while the checkpoint is still being written."""
  saved = []
  config = Config(output_dir=tmp_path, **SMALL)
  one = script.make_trainer("itd", config, script.read(config))
  save = lambda manager, step, args: saved.append(args.item["state"])
  monkeypatch.setattr(ocp.CheckpointManager, "save", save)
  one.checkpoints.save(1, one.state, one.seconds)
  one.close()
  for copy, leaf in zip(jax.tree.leaves(saved[0]), jax.tree.leaves(one.state), strict=True):
    assert not np.shares_memory(copy, np.asarray(leaf))


def test_the_accuracy_is_that_of_as_many_episodes_as_are_wanted():
  one = object.__new__(trainer.Trainer)
  one.state, one._evaluate = None, lambda state, key, classes: np.arange(20)
  assert one.accuracy(None, 5, few_shot_setting.Draw.TEST)[0] == 2


def test_the_interval_is_the_one_of_the_mean():
  mean, half = trainer.interval(np.array([0.0, 1.0, 1.0, 0.0]))
  assert mean == 0.5
  np.testing.assert_allclose(half, 1.96 * np.sqrt(1 / 3) / 2)
  assert trainer.interval(np.array([0.5])) == (0.5, 0.0)


SMALL = {
  "width": 2,
  "num_ways": 2,
  "num_shots": 1,
  "num_queries": 1,
  "num_tasks": 2,
  "inner_steps": 2,
  "num_samples": 2,
  "eval_episodes": 20,
  "eval_every": 2,
  "checkpoint_every": 2,
  "steps": 4,
  "methods": ("itd",),
}


def test_no_two_streams_of_keys_and_no_two_seeds_share_a_root():
  """``split(key, n)[i]`` is ``fold_in(key, i)``: keys of one root would meet."""
  roots = [
    few_shot_setting.draw_key(draw, seed) for draw in few_shot_setting.Draw for seed in range(3)
  ]
  assert len({tuple(jax.random.key_data(root).tolist()) for root in roots}) == 15


def test_a_run_writes_its_files_and_a_resumed_one_repeats_nothing(tmp_path, capsys, monkeypatch):
  drawn = []

  def draw_key(draw, seed=0):
    drawn.append((draw.name, seed))
    return jax.random.fold_in(jax.random.key(seed), draw)

  for module in (few_shot, trainer):
    monkeypatch.setattr(module, "draw_key", draw_key)
  config = Config(output_dir=tmp_path, seed=3, **SMALL)
  assert script.main(config) == 0
  of_training = {(name, 3) for name in ("PARAMETERS", "DIRECTIONS", "TRAINING")}
  assert set(drawn) == of_training | {("VALIDATION", 0), ("TEST", 0)}
  table = capsys.readouterr().out
  for word in ("ITD (ANIL)", "2-way 1-shot", "4 meta-steps"):
    assert word in table
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [(line["method"], line["step"]) for line in lines] == [
    ("itd", 2),
    ("itd", 4),
  ]
  results = (tmp_path / "results.csv").read_text()
  assert [row["method"] for row in csv.DictReader(results.splitlines())] == ["itd"]
  for name in ("few_shot.png", "episode_itd.png"):
    with Image.open(tmp_path / name) as picture:
      assert picture.width > 100
  metrics = (tmp_path / "metrics.jsonl").read_text()
  assert script.main(dataclasses.replace(config, resume=True)) == 0
  assert (tmp_path / "metrics.jsonl").read_text() == metrics
  accuracy = lambda text: [row["test_accuracy"] for row in csv.DictReader(text.splitlines())]
  assert accuracy((tmp_path / "results.csv").read_text()) == accuracy(results)

  for wrong, message in (
    ({}, "has checkpoints of an earlier run"),
    ({"resume": True, "seed": 1}, "seed must be 3 to resume, got 1"),
  ):
    assert script.main(dataclasses.replace(config, **wrong)) == 2
    assert message in capsys.readouterr().err


def padded(images, count):
  """A class ``[3, 28, 28, 1]`` of ``count`` images; the rest must never be seen."""
  return np.concatenate([images[:count], np.full((3 - count, 28, 28, 1), np.nan)]).astype("float32")


def test_validation_has_its_own_classes_and_evaluation_no_turns_and_nothing_sees_padding(
  tmp_path, monkeypatch
):
  """Data sets that give themselves away.

  The one character for training makes two classes only if it is turned. Those for validation look
  the same, so that half of them are right by chance. The two for testing are easy to tell from each
  other, but not from themselves, turned.
  """
  rng = np.random.default_rng(0)
  edge = np.linspace(-1, 1, 28) ** 2
  disk = np.tile((edge[:, None] + edge)[None, ..., None], (3, 1, 1, 1)) / 2
  drawings = {
    "train": [padded(rng.uniform(size=(3, 28, 28, 1)), 2)],
    "validation": [padded(disk, 2), padded(disk, 3)],
    "test": [padded(disk, 3), padded(1 - disk, 2)],
  }
  classes = {
    name: fewshot_data.ImageClasses(
      np.stack(images),
      np.array([np.isfinite(image[:, 0, 0, 0]).sum() for image in images]),
      np.arange(len(images)),
    )
    for name, images in drawings.items()
  }
  monkeypatch.setattr(script, "read", lambda config: fewshot_data.FewShotData(**classes))
  steps, optimizer = set(), few_shot.optimizer

  def recorded_optimizer(settings, num_steps):
    steps.add(num_steps)
    return optimizer(settings, num_steps)

  monkeypatch.setattr(few_shot, "optimizer", recorded_optimizer)
  config = Config(output_dir=tmp_path, **SMALL | {"methods": ("protonet",)})
  assert script.main(config) == 0
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["validation_accuracy"] for line in lines] == [0.5, 0.5]
  assert all(line["outer_loss"] for line in lines)  # It would be null for NaN.
  [row] = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
  assert float(row["test_accuracy"]) == 1
  assert steps == {config.steps}  # The schedule's.


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"dataset": "imagenet"}, "dataset must be one of glyphs, omniglot, caltech101_fewshot; got"),
    ({"backbone": "vgg"}, "backbone must be one of auto, conv4, resnet12; got 'vgg'"),
    ({"methods": ("itd", "magic")}, "methods must be among esj_through, esj_shrunk, esj, itd, "),
    ({"methods": ()}, "got none"),
    ({"methods": ("itd", "itd")}, "methods must name each method once, got itd itd"),
    ({"steps": 0}, "steps must be positive, got 0"),
    ({"outer_learning_rate": -1.0}, "outer_learning_rate must be positive, got -1.0"),
    ({"seed": -1}, "seed must not be negative, got -1"),
    ({"resume": True}, "resume needs an earlier run in output_dir"),
    ({"num_ways": 60, "methods": ("protonet",)}, "num_ways must be at most"),
    ({"num_shots": 18, "methods": ("protonet",)}, "num_shots + num_queries must be at most"),
    ({"width": 4, "methods": ("esj_through",)}, "num_samples must be at most the number of"),
    ({"dataset": "omniglot", "data_dir": Path("/nowhere")}, "no omniglot in /nowhere"),
    ({"output_dir": Path("/dev/null/x")}, "output_dir must be a folder to write to"),
  ],
)
def test_bad_input_says_what_is_allowed(tmp_path, capsys, wrong, message):
  assert script.main(Config(**({"output_dir": tmp_path / "out"} | wrong))) == 2
  assert message in capsys.readouterr().err


def command(output_dir, *more):
  arguments = SMALL | {"methods": "esj_through", "steps": 60, "output_dir": output_dir}
  flags = [part for k, v in arguments.items() for part in (f"--{k.replace('_', '-')}", str(v))]
  return [sys.executable, "-m", "scripts.few_shot", *flags, *more]


@pytest.fixture
def interruptible():
  """Processes that Ctrl-C ends, although a parent may ignore it, and pass that on."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_an_interrupted_and_a_killed_run_go_on_bit_for_bit(tmp_path, interruptible):
  """Ctrl-C, and after resuming kill -9, at a random step, in the middle of whatever it does."""
  environment = os.environ | {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),  # Only the first run compiles.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  run = functools.partial(subprocess.run, check=True, env=environment, capture_output=True)
  run(command(tmp_path / "whole"))
  stopped = tmp_path / "stopped"
  metrics = stopped / "metrics.jsonl"
  count = lambda: metrics.read_text().count("\n") if metrics.exists() else 0
  for stop, status, more in (
    (signal.SIGINT, 130, []),
    (signal.SIGKILL, -signal.SIGKILL, ["--resume"]),
  ):
    enough = count() + 3
    process = subprocess.Popen(command(stopped, *more), env=environment, stdout=-3, stderr=-3)
    while process.poll() is None and count() < enough:
      time.sleep(0.01)
    process.send_signal(stop)
    assert process.wait(timeout=300) == status
  assert count() < 30  # It was stopped before the end.
  run(command(stopped, "--resume"))
  states = []
  for name in ("whole", "stopped"):
    path = tmp_path / name / "checkpoints" / "esj_through"
    with ocp.CheckpointManager(path) as manager:
      assert manager.latest_step() == 60
      states.append(manager.restore(60, args=ocp.args.StandardRestore())["state"])
  chex.assert_trees_all_equal(*states)
  without_time = [
    [
      json.loads(line) | {"seconds": 0}
      for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]
    for name in ("whole", "stopped")
  ]
  assert without_time[0] == without_time[1]
