"""The hyper-cleaning problem: what is corrupted, the losses, and what each method does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import roc_auc_score

import jaxbo
from scripts.common import cleaning
from scripts.common.data import Examples

pytestmark = pytest.mark.slow  # All together, not each.

SMALL = dataclasses.replace(
  cleaning.DATASETS["digits"], num_train=60, num_val=40, inner_steps=5, num_samples=8
)
PERCEPTRON = dataclasses.replace(
  SMALL, hidden=(7,), batch_size=4, inner_learning_rate=0.1, momentum=0.0, damping=1.0
)


def small_data(seed=0):
  return cleaning.split(cleaning.read("digits"), SMALL, 0.5, seed)


@pytest.mark.parametrize("rate, num_wrong", [(0.0, 0), (0.254, 254), (0.5, 500), (0.999, 999)])
def test_exactly_the_given_share_of_labels_is_wrong_and_known_to_be(rate, num_wrong):
  labels = np.random.default_rng(0).integers(0, 10, 1000).astype(np.int32)
  noisy, corrupted = cleaning.corrupt(labels, rate, np.random.default_rng(1))
  assert corrupted.sum() == num_wrong
  np.testing.assert_array_equal(noisy != labels, corrupted)
  assert noisy.dtype == labels.dtype


def test_wrong_labels_are_uniform_over_the_other_classes():
  labels = np.full(9000, 3)
  noisy, _ = cleaning.corrupt(labels, 0.9999, np.random.default_rng(0))
  counts = np.bincount(noisy, minlength=10)
  assert counts[3] == 1  # the one clean label
  others = np.delete(counts, 3)
  assert np.abs(others - 1000).max() < 4 * np.sqrt(1000 * 8 / 9)


def test_systematic_noise_is_the_next_class():
  labels = np.arange(1000) % 10
  noisy, corrupted = cleaning.corrupt(labels, 0.5, np.random.default_rng(0), "systematic")
  np.testing.assert_array_equal(noisy, (labels + corrupted) % 10)


def test_splits_are_disjoint_cover_everything_and_only_training_labels_are_wrong():
  examples = Examples(np.arange(200.0, dtype=np.float32)[:, None], np.arange(200) % 10)
  data = cleaning.split((examples, None), SMALL, 0.5, seed=3)
  parts = [data.train, data.val, data.test]
  assert [len(part.labels) for part in parts] == [60, 40, 100]
  everything = np.concatenate([part.images[:, 0] for part in parts])
  np.testing.assert_array_equal(np.sort(everything), np.arange(200))
  for part, wrong in zip(parts, (data.corrupted, False, False), strict=True):
    np.testing.assert_array_equal(part.labels != part.images[:, 0] % 10, wrong)
  again = cleaning.split((examples, None), SMALL, 0.5, seed=3)
  jax.tree.map(np.testing.assert_array_equal, data, again)


def numpy_cross_entropies(logits, labels):
  """Cross-entropies in float64 of ``logits`` ``[n, classes]``."""
  shifted = logits - logits.max(axis=1, keepdims=True)
  return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]


@pytest.mark.parametrize("settings", [SMALL, PERCEPTRON], ids=["softmax", "perceptron"])
def test_losses_equal_numpy_in_float64(settings):
  rng = np.random.default_rng(0)
  images, labels = rng.uniform(size=(4, 3)), np.array([1, 0, 9, 9])
  x, indices = rng.normal(size=6), np.array([5, 0, 5, 2])
  y = jax.eval_shape(lambda key: cleaning.init_params(settings, 3, key), jax.random.key(0))
  y = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), y)
  inner_loss, outer_loss = map(jax.jit, cleaning.make_losses(settings))

  plain = jax.tree.map(np.asarray, y)
  if settings.hidden:
    first, second = plain["Dense_0"], plain["Dense_1"]
    hidden = np.maximum(images @ first["kernel"] + first["bias"], 0)
    logits = hidden @ second["kernel"] + second["bias"]
    matrices = [first["kernel"], second["kernel"]]
  else:
    logits = images @ plain["w"].T + plain["b"]
    matrices = [plain["w"]]
  losses = numpy_cross_entropies(logits.astype(np.float64), labels)
  ridge = settings.ridge * sum(np.sum(matrix.astype(np.float64) ** 2) for matrix in matrices)
  weights = 1 / (1 + np.exp(-x[indices]))

  examples = Examples(jnp.asarray(images), jnp.asarray(labels))
  batch = cleaning.Batch(examples, jnp.asarray(indices))
  expected = np.mean(weights * losses) + ridge
  np.testing.assert_allclose(inner_loss(jnp.asarray(x), y, batch), expected, rtol=1e-5)
  everything = cleaning.Batch(examples, None)
  np.testing.assert_allclose(
    inner_loss(jnp.asarray(x[indices]), y, everything), expected, rtol=1e-5
  )
  np.testing.assert_allclose(outer_loss(None, y, examples), losses.mean(), rtol=1e-5)
  two = Examples(examples.images, jnp.array([1, -1, 9, -1]))  # -1: there is no such example.
  np.testing.assert_allclose(outer_loss(None, y, two), losses[[0, 2]].mean(), rtol=1e-5)


def run(method, data, settings, steps=2, seed=0):
  state, run = cleaning.make_program(method, data, settings, seed, steps)
  return jax.jit(run)(state, jax.random.key(seed), data.train, data.val)


def test_first_order_keeps_its_weights():
  state, losses = run("first_order", small_data(), SMALL)
  np.testing.assert_array_equal(state.x, 0)
  assert losses.shape == (2,)
  assert losses[1] < losses[0]  # The model learns all the same.


def test_a_single_loop_has_an_outer_step_after_each_inner_one():
  data = small_data()
  state, losses = run("soba", data, SMALL, steps=2)
  assert losses.shape == (2 * 5,)
  once = dataclasses.replace(SMALL, inner_steps=1)
  expected, _ = run("soba", data, once, steps=10)  # Its rate outside is five times as large.
  np.testing.assert_allclose(5 * np.abs(state.x).max(), np.abs(expected.x).max(), rtol=0.5)
  assert not np.allclose(state.x, 0)


@pytest.mark.parametrize("method", ["itd", "aid", "stocbio", "esj"])
def test_weights_of_a_perceptron_move_where_the_inner_run_saw_an_example(method):
  state, losses = run(method, small_data(), PERCEPTRON, steps=1)
  moved = np.asarray(state.x) != 0
  if method == "esj":  # It moves along random directions.
    assert moved.mean() > 0.9
  else:
    key = jax.random.split(jax.random.key(0), 1)[0]
    indices = jax.random.randint(key, (5, 4), 0, 60)
    assert set(np.flatnonzero(moved)) <= set(np.asarray(indices).ravel().tolist())
    assert moved.sum() > 10
  assert np.isfinite(losses).all()


@pytest.mark.parametrize("method", ["itd", "aid"])
def test_wrong_labels_get_small_weights(method):
  settings = dataclasses.replace(SMALL, num_train=300, num_val=200)
  data = cleaning.split(cleaning.read("digits"), settings, 0.5, seed=100)
  state, _ = run(method, data, settings, steps=60)
  assert roc_auc_score(data.corrupted, -np.asarray(state.x)) > 0.9


def test_accuracy_is_the_share_of_correct_classes():
  y = {"w": jnp.eye(10, 3), "b": jnp.zeros(10)}  # The class is the largest of three features.
  examples = Examples(jnp.eye(3)[jnp.array([0, 1, 2, 2])], jnp.array([0, 1, 2, 0]))
  assert cleaning.accuracy(SMALL, y, examples) == 0.75


NAN = float("nan")


@pytest.mark.parametrize(
  "weights, corrupted, expected",
  [
    ([0.1, 0.2, 0.6, 0.9], [True, True, False, False], (1.0, 1.0)),
    ([0.6, 0.2, 0.4, 0.9], [True, True, False, False], (0.75, 0.5)),
    ([0.5, 0.5], [True, False], (0.5, 0.0)),  # One half, where weights start, accuses nobody.
    ([0.1, 0.9], [False, False], (NAN, NAN)),
    ([NAN, 0.9], [True, False], (NAN, NAN)),
  ],
)
def test_auc_and_f1_are_of_low_weights_at_wrong_labels(weights, corrupted, expected):
  scores = cleaning.detection_scores(np.array(weights), np.array(corrupted))
  np.testing.assert_array_equal(scores, expected)


HEADS = {
  "itd": lambda inner: jaxbo.add_unrolled_response(inner),
  "aid": lambda inner: jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(2, damping=0.5)),
  "stocbio": lambda inner: jaxbo.add_implicit_response(inner, jaxbo.neumann(2, 0.5)),
  "darts": lambda inner: jaxbo.add_finite_difference_response(inner),
  "esj": lambda inner: jaxbo.add_es_response(inner, num_samples=3, smoothing=0.5, key=7),
}


@pytest.mark.parametrize("method", HEADS)
def test_the_first_hypergradient_is_that_of_the_settings(method):
  settings = dataclasses.replace(
    SMALL,
    inner_steps=4,
    inner_learning_rate=0.3,
    momentum=0.5,
    outer_learning_rate=0.25,
    linear_steps=2,
    damping=0.5,
    neumann_learning_rate=0.5,
    num_samples=3,
    smoothing=0.5,
  )
  data = small_data()
  state, losses = run(method, data, settings, steps=1, seed=7)
  assert np.isfinite(losses).all()
  assert np.mean(np.asarray(state.x) != 0) > 0.9

  inner_loss, outer_loss = cleaning.make_losses(settings)
  inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.3, 0.5), 4)
  head, x, batch = HEADS[method](inner), jnp.zeros(60), cleaning.Batch(data.train, None)
  y = inner.init({"w": jnp.zeros((10, 64)), "b": jnp.zeros(10)})

  @jax.jit
  def hypergradient(x, y):
    y = inner.solve(x, y, batch)
    grads = jax.grad(outer_loss, (0, 1))(x, y.params, data.val)
    return head.update(grads, head.init(x), x, solution=y, batch=batch)[0]

  expected = np.asarray(hypergradient(x, y))
  # Adam's first step hides the size of the gradient, but its first moment is a tenth of it.
  moment = np.asarray(optax.tree.get(state.outer_state, "mu"))
  np.testing.assert_allclose(10 * moment, expected, rtol=1e-3, atol=1e-4 * abs(expected).max())
  np.testing.assert_allclose(state.x, -0.25 * np.sign(expected), rtol=0.01)
