"""Few-shot learning: gradients of all methods against plain JAX, evaluation, files, resuming."""

import dataclasses
import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import tyro
from PIL import Image

from scripts.common import fewshot_data, folder, study
from scripts.common.checkpoints import latest_step
from scripts.few_shot import __main__ as script
from scripts.few_shot import problem as few_shot
from scripts.few_shot import setting as few_shot_setting
from scripts.few_shot.__main__ import Config, FewShot, FewShotStudy
from tests.scripts.common.processes import check_two_do_what_one_does, some_devices, tables_of
from tests.scripts.common.stopped import programs_kept, stopped_after
from tests.scripts.few_shot import small
from tests.scripts.few_shot.small import BACKBONE, SMALL, features

pytestmark = pytest.mark.slow  # All together, not each.


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """It saves seconds."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(script.devices, "all_devices", lambda num_rows: some_devices(1))
    yield


SETTINGS = few_shot_setting.Settings(
  num_ways=2, num_shots=2, num_queries=1, num_rotations=1, num_tasks=2, inner_steps=3,
  inner_learning_rate=0.3, num_samples=3 * 4, smoothing=1e-3, linear_steps=20, maml_steps=2,
  maml_learning_rate=0.1,
)  # fmt: skip


@functools.cache
def episodes():
  classes = fewshot_data.ImageClasses(
    jax.random.uniform(jax.random.key(5), (6, 4, 4, 2, 1)), jnp.full(6, 4), jnp.arange(6)
  )
  return jax.jit(few_shot_setting.sampler(SETTINGS, 1, 2))(jax.random.key(1), classes)


@functools.cache
def hypergradient(name, settings=SETTINGS, seed=0):
  """What the first step of a method moves along, and its initial state."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(few_shot, "optimizer", lambda settings, num_steps: optax.sgd(1.0))
    method = few_shot.make_method(name, BACKBONE, settings, 1, seed)
  method = method._replace(step=jax.jit(method.step))
  state = method.init(jax.random.key(0), jnp.zeros((2, 4, 2, 1)))
  after, loss = method.step(state, episodes())
  x = lambda state: state[0]  # The first of its fields.
  return jax.tree.map(lambda a, b: a - b, x(state), x(after)), state, loss, method


@functools.cache
def mean_over_tasks(of_task):
  """The loss of ``x`` and its gradient."""
  tasks = [jax.tree.map(lambda leaf, t=t: leaf[t], episodes()) for t in range(2)]
  return jax.jit(jax.value_and_grad(lambda x: sum(of_task(x, task) for task in tasks) / 2))


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
def test_anil_steps_along_the_gradient_of_the_composed_loss(name):
  """ESJ has as many orthogonal directions as features, which makes it exact."""
  result, state, loss, _ = hypergradient(name)
  of_task = functools.partial(anil_loss, stop=True) if name == "first_order" else anil_loss
  value, expected = mean_over_tasks(of_task)(state.x)
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  tolerance = 1e-2 if name == "esj_through" else 1e-4
  error = np.linalg.norm(result["w"] - expected["w"]) / np.linalg.norm(expected["w"])
  assert error < tolerance
  if name == "first_order":  # The response is no small part.
    _, exact = mean_over_tasks(anil_loss)(state.x)
    assert np.linalg.norm(exact["w"] - expected["w"]) > 0.05 * np.linalg.norm(exact["w"])


def test_aid_tends_to_itd_with_many_inner_steps():
  settings = dataclasses.replace(SETTINGS, inner_steps=300)
  aid, *_ = hypergradient("aid", settings)
  itd, *_ = hypergradient("itd", settings)
  np.testing.assert_allclose(aid["w"], itd["w"], rtol=1e-2, atol=1e-4)


def test_esj_on_parameters_is_the_response_of_perturbed_parameters():
  """Many directions on 24 parameters: within four standard errors of the exact one."""
  settings = dataclasses.replace(SETTINGS, num_samples_plain=4000)
  result, state, *_ = hypergradient("esj", settings)
  exact = mean_over_tasks(anil_loss)(state.x)[1]["w"]
  first_order, *_ = hypergradient("first_order")
  response = np.linalg.norm(exact - first_order["w"])
  assert np.linalg.norm(result["w"] - exact) < 2 * response * np.sqrt(25 / 4000)


@pytest.mark.parametrize("name", few_shot.ON_PARAMETERS)
def test_esj_on_parameters_moves_along_directions_of_the_parameters(name):
  """With one sample the response is a multiple of its direction, which the keys' law gives.

  The published direction has norm 1, so that its response is no more than a part of the exact one.
  """
  settings = dataclasses.replace(SETTINGS, num_samples_plain=1, smoothing_official=1e-2)
  result, state, *_ = hypergradient(name, settings, seed=3)
  first_order, *_ = hypergradient("first_order")
  response = np.ravel(result["w"] - first_order["w"])
  key = few_shot_setting.draw_key(few_shot_setting.Draw.DIRECTIONS, 3)
  sample_key = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
  direction = np.ravel(jax.random.normal(jax.random.split(sample_key, 1)[0], (8, 3)))
  cosine = response @ direction / np.linalg.norm(response) / np.linalg.norm(direction)
  np.testing.assert_allclose(abs(cosine), 1, atol=1e-3)
  exact = np.ravel(mean_over_tasks(anil_loss)(state.x)[1]["w"] - first_order["w"])
  if name == "official":
    direction = direction / np.linalg.norm(direction)
  np.testing.assert_allclose(
    response @ direction, (exact @ direction) * (direction @ direction), rtol=0.05
  )


def test_maml_steps_along_the_gradient_through_all_parameters():
  result, state, *_ = hypergradient("maml")

  def of_task(x, episode):
    def loss(theta, images, labels):
      head = theta["head"]
      return softmax_loss(head["w"], head["b"], features(theta["backbone"], images), labels)

    theta = x
    for _ in range(2):
      grads = jax.grad(loss)(theta, episode.support_images, episode.support_labels)
      theta = jax.tree.map(lambda p, g: p - 0.1 * g, theta, grads)
    return loss(theta, episode.query_images, episode.query_labels)

  _, expected = mean_over_tasks(of_task)(state.x)
  chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-6)


def test_protonet_predicts_the_nearest_class_mean():
  _, state, loss, method = hypergradient("protonet")
  total = 0.0
  for t in range(2):
    episode = jax.tree.map(lambda leaf, t=t: np.asarray(leaf[t]), episodes())
    z, queries = (
      np.asarray(features(state[0], jnp.asarray(images)), np.float64)
      for images in (episode.support_images, episode.query_images)
    )
    means = np.stack([z[episode.support_labels == way].mean(axis=0) for way in range(2)])
    logits = -((queries[:, None] - means) ** 2).sum(axis=2)
    np.testing.assert_allclose(method.predict(state, episode), logits, rtol=1e-4)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    total += -np.log(probabilities[np.arange(2), episode.query_labels]).mean() / 2
  np.testing.assert_allclose(loss, total, rtol=1e-4)


@pytest.mark.parametrize("name", few_shot.LABELS)
def test_evaluation_adapts_to_the_support_set_and_leaves_the_state(name):
  """As training does; with support and query the same, it must beat chance."""
  _, state, _, method = hypergradient(name)
  later, _ = method.step(state, episodes())  # Heads start elsewhere than at zero now.
  predict = jax.jit(method.predict)
  tasks = [jax.tree.map(lambda leaf, t=t: leaf[t], episodes()) for t in range(2)]
  predicted = jnp.stack([predict(later, episode) for episode in tasks])
  query_loss = few_shot.cross_entropy(predicted, episodes().query_labels)
  np.testing.assert_allclose(query_loss, method.step(later, episodes())[1], rtol=1e-4)
  images = jnp.stack([jnp.zeros((4, 2, 1)), jnp.ones((4, 2, 1))])
  support = {"support_images": images[jnp.array([0, 0, 1, 1])]}
  episode = tasks[0]._replace(**support, query_images=images)
  for labels in (episode.support_labels, 1 - episode.support_labels):
    predicted = jnp.argmax(predict(state, episode._replace(support_labels=labels)), axis=-1)
    np.testing.assert_array_equal(predicted, labels[::2])


def test_a_step_is_the_same_program_for_every_seed():
  """The seed of ESJ's directions is in the state."""
  ends = []
  for seed in (0, 1):
    method = few_shot.make_method("esj", BACKBONE, SETTINGS, 1, 1)
    state = method.init(jax.random.key(0), jnp.zeros((2, 4, 2, 1)))
    step = few_shot.make_method("esj", BACKBONE, SETTINGS, 1, seed).step
    ends.append(jax.jit(step)(state, episodes()))
  chex.assert_trees_all_equal(*ends)


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
  scaled = script.scale_pixels(jnp.array([0, 51, 255], jnp.uint8))
  np.testing.assert_allclose(scaled, [0.0, 0.2, 1.0])
  np.testing.assert_array_equal(script.scale_pixels(jnp.array([0.0, 51.0])), [0.0, 51.0])


def test_the_accuracy_is_that_of_as_many_episodes_as_are_wanted():
  one = object.__new__(FewShot)
  one.classes, one.where = {few_shot_setting.Draw.TEST: None}, some_devices(1)
  one._evaluate = lambda state, key, classes: (np.arange(20), None)
  assert one.accuracies(None, few_shot_setting.Draw.TEST, 5).tolist() == [0, 1, 2, 3, 4]
  assert len(one.accuracies(None, few_shot_setting.Draw.TEST, 41)) == 41


def test_the_interval_is_the_one_of_the_mean():
  mean, half = script.interval(np.array([0.0, 1.0, 1.0, 0.0]))
  assert mean == 0.5
  np.testing.assert_allclose(half, 1.96 * np.sqrt(1 / 3) / 2)
  assert script.interval(np.array([0.5])) == (0.5, 0.0)


def test_one_seed_has_the_interval_over_episodes_and_several_their_spread():
  rows = pd.DataFrame({"test_accuracy": [0.5, 0.7], "confidence": [0.01, 0.02]})
  assert script.accuracy_of(rows[:1]) == "50.00 ± 1.00 %"
  assert script.accuracy_of(rows) == "60.00 ± 14.14 %"


def test_no_two_streams_of_keys_and_no_two_seeds_share_a_root():
  """``split(key, n)[i]`` is ``fold_in(key, i)``: keys of one root would meet."""
  roots = [
    few_shot_setting.draw_key(draw, seed) for draw in few_shot_setting.Draw for seed in range(3)
  ]
  assert len({tuple(jax.random.key_data(root).tolist()) for root in roots}) == 15


def padded(images, count):
  """A class ``[3, 28, 28, 1]`` of ``count`` images; the rest must never be seen."""
  return np.concatenate([images[:count], np.full((3 - count, 28, 28, 1), np.nan)]).astype("float32")


def test_a_run_evaluates_on_other_classes_without_turns_and_padding_and_draws_its_episode(
  tmp_path, monkeypatch, capsys
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
  optimizer, draw_key, steps, drawn = few_shot.optimizer, script.draw_key, set(), set()

  def recorded_optimizer(settings, num_steps):
    steps.add(num_steps)
    return optimizer(settings, num_steps)

  def recorded_key(draw, seed=0):
    drawn.add((draw.name, seed))
    return draw_key(draw, seed)

  monkeypatch.setattr(few_shot, "optimizer", recorded_optimizer)
  monkeypatch.setattr(script, "draw_key", recorded_key)
  config = Config(output_dir=tmp_path, first_seed=3, methods=("protonet",), **SMALL)
  assert study.run(FewShotStudy(), config) == 0
  assert steps == {config.steps}  # The schedule's.
  assert drawn == {("PARAMETERS", 3), ("TRAINING", 3), ("VALIDATION", 0), ("TEST", 0)}
  lines, [row], _ = folder.read(tmp_path)
  assert [(line["method"], line["seed"], line["step"]) for line in lines] == [
    ("protonet", 3, 2),
    ("protonet", 3, 4),
  ]
  assert [line["validation_accuracy"] for line in lines] == [0.5, 0.5]
  assert np.isfinite([line["outer_loss"] for line in lines]).all()
  assert (row["method"], row["seed"], row["steps"], row["test_accuracy"]) == ("protonet", 3, 4, 1.0)
  table = " ".join(capsys.readouterr().out.split())  # Titles are wrapped.
  for word in ("ProtoNet", "2-way 1-shot", "4 meta-steps", "seed 3", "100.00 ± 0.00 %"):
    assert word in table
  for name in ("few_shot.png", "episode_protonet.png"):
    with Image.open(tmp_path / name) as picture:
      assert picture.width > 100


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"num_ways": 60, "methods": ("protonet",)}, "num_ways must be at most"),
    ({"num_shots": 18, "methods": ("protonet",)}, "num_shots + num_queries must be at most"),
    ({"width": 4, "methods": ("esj_through",)}, "esj_through: num_samples must be at most the"),
    ({"dataset": "omniglot", "data_dir": Path("/nowhere")}, "no omniglot in /nowhere"),
  ],
)
def test_what_cannot_run_is_refused_before_anything_is_trained(
  tmp_path, capsys, monkeypatch, wrong, message
):
  blank = lambda n, each: np.zeros((n, each, 28, 28, 1), np.uint8)  # Drawing them takes seconds.
  monkeypatch.setattr(fewshot_data, "draw_glyphs", lambda n, each, *_: blank(n, each))
  assert study.run(FewShotStudy(), Config(output_dir=tmp_path / "out", **wrong)) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_a_single_run_is_given_its_seed():
  assert tyro.cli(Config, args=["--seed", "7"]).first_seed == 7


def test_a_stopped_run_goes_on_bit_for_bit_and_two_processes_do_the_same(tmp_path, monkeypatch):
  """The four devices of two processes share two tasks and the samples of each."""
  small.make_small(monkeypatch.setattr)
  options = SMALL | {"methods": ("esj_through",), "first_seed": 1}
  config = Config(output_dir=tmp_path / "whole", **options)
  stopped = config.but(output_dir=tmp_path / "stopped")
  with programs_kept():
    assert small.run(config) == 0
    with stopped_after(2):
      small.run(stopped)
    cell = folder.checkpoints(stopped.output_dir, {"method": "esj_through", "seed": 1})
    assert latest_step(cell) == 2
    assert [line["step"] for line in folder.read(stopped.output_dir)[0]] == [2, 4]
    assert small.run(stopped.but(resume=True)) == 0
  tables = map(tables_of, (config.output_dir, stopped.output_dir))
  for whole, resumed in zip(*tables, strict=True):
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
  check_two_do_what_one_does(small, config, tmp_path / "two")


def test_what_defaults_stand_for_is_in_the_identity():
  identity = Config().identity()
  assert identity["settings.num_ways"] == 5
  assert "settings.steps" not in identity  # It may grow.


def test_settings_are_those_of_the_backbone_and_the_size_of_images():
  """The shrunk ESJ has the scale of the least error: directions over features of a support set."""
  for options, size in (
    ({}, 64),
    ({"image_size": 32, "width": 8}, 8 * 4),
    ({"backbone": "resnet12"}, 640),
    ({"dataset": "caltech101_fewshot", "image_size": 42}, 640),
    ({"dataset": "caltech101_fewshot", "backbone": "conv4"}, 64 * 25),
  ):
    config = Config(**options)
    images = jax.ShapeDtypeStruct((2, config.pixels(), config.pixels(), 1), jnp.float32)
    backbone = script.make_backbone(config)
    x = jax.eval_shape(backbone.init, jax.random.key(0), images)
    assert jax.eval_shape(backbone.features, x, images).shape == (2, size), options
    settings = config.settings()
    assert settings.response_scale == min(1, 256 / (25 * size))
    assert settings.smoothing_plain == (1e-3 if size == 640 else 1e-2)
  assert Config(response_scale=0.5).settings().response_scale == 0.5


def test_smaller_images_of_caltech_are_means_over_areas(monkeypatch):
  images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
  monkeypatch.setattr(fewshot_data, "tfds_source", lambda *_: None)
  monkeypatch.setattr(fewshot_data, "in_chunks", lambda _: iter([(images, np.array([0, 0]))]))
  small = fewshot_data.caltech101_fewshot(size=2).train.images[0, :2]
  blocks = images.reshape(2, 2, 2, 2, 2, 3).mean(axis=(2, 4))
  assert np.abs(small - blocks).max() <= 0.5
