"""Sources of labels, runs without a derivative, and responses that must agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.svm import SVC

from scripts.common import data
from scripts.es_regime import methods, problem
from scripts.es_regime.problem import Settings

SHORT = dataclasses.replace(Settings(), inner_steps=20, grid=2.0**-8)


@functools.cache
def digits_of(sources, seed=0):
  return problem.split(data.digits(), SHORT, sources, seed)


def test_half_of_the_sources_confuse_classes_and_no_digit_is_in_two_parts():
  drawn, digits = digits_of(16, 3), data.digits()
  which = {digit.tobytes(): label for digit, label in zip(*digits, strict=True)}
  right = np.array([which[image.tobytes()] for image in drawn.train.images])
  wrong = (drawn.train.labels - right) % 10
  assert set(wrong) == {0, 1}  # The next class.
  share = wrong.reshape(16, -1).mean(axis=1)
  bad = problem.bad_sources(16, 3)
  assert bad.sum() == 8
  assert (share[~bad] == 0).all()
  assert abs(share[bad].mean() - 0.9) < 4 * (0.9 * 0.1 / 96) ** 0.5
  np.testing.assert_array_equal([which[i.tobytes()] for i in drawn.test.images], drawn.test.labels)
  assert [len(part.labels) for part in drawn] == [192, 200, 1797 - 392]
  images = np.concatenate([part.images for part in drawn])
  assert len(np.unique(images, axis=0)) == len(np.unique(digits.images, axis=0))


def test_rounding_ends_on_the_grid_and_is_right_in_the_mean():
  rounding, params = problem.stochastic_rounding(0.25), jnp.array([0.5, -1.0, 0.0])
  move = jnp.array([0.1, 0.2, -0.07])
  round_at = lambda count: params + rounding.update(move, count, params)[0]
  rounded = np.asarray(jax.jit(jax.vmap(round_at))(jnp.arange(4000)))
  np.testing.assert_array_equal(rounded / 0.25, np.round(rounded / 0.25))
  error = rounded.std(axis=0) / np.sqrt(4000)
  assert (np.abs(rounded.mean(axis=0) - (params + move)) < 4 * error).all()
  assert (np.ptp(rounded, axis=0) == 0.25).all()


def test_a_quantised_run_has_no_derivative_and_itd_refuses_it():
  grads = {}
  for through in (False, True):
    inner = problem.solver(SHORT, quantised=True, straight_through=through)

    def loss(x, inner=inner):
      y = inner.solve(x, inner.init(problem.init_params()), digits_of(4)).params
      return problem.outer_loss(x, y, digits_of(4)), y

    (_, y), grads[through] = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.zeros(4))
  np.testing.assert_array_equal(grads[False], 0)
  assert np.abs(grads[True]).min() > 0
  np.testing.assert_array_equal(y["w"] / SHORT.grid, np.round(y["w"] / SHORT.grid))
  state, step = methods.descent("itd", "quantised", SHORT, 4, 1.0, 0)
  with pytest.raises(ValueError, match="rounding"):
    jax.eval_shape(step, state, 0, digits_of(4))


@functools.cache
def norm_of(method):
  """Of the first hypergradient."""
  state, step = methods.descent(method, "smooth", SHORT, 4, 1.0, 0)
  (loop, incumbent), loss = jax.jit(step)(state, 0, digits_of(4))
  np.testing.assert_array_equal(incumbent.x, 0)  # Where the loss was taken.
  assert incumbent.loss == loss
  return float(optax.tree.get(loop, "hypergradient_norm"))


@pytest.mark.parametrize("method", ["itd_remat", "esj", "full_es"])
def test_with_as_many_directions_as_sources_es_is_the_exact_hypergradient(method):
  np.testing.assert_allclose(norm_of(method), norm_of("itd"), rtol=0.02)


def test_sources_without_weight_are_not_in_the_support_vector_machine():
  train, _, test = digits_of(4)
  x = np.array([-60, 60, 60, -60])
  found = problem.svm_logits(SHORT, x, train, test.images[:50])
  kept = slice(48, 144)
  machine = SVC(C=SHORT.svm_cost, gamma=SHORT.svm_gamma)
  machine.fit(train.images[kept], train.labels[kept] == 3)
  expected = SHORT.svm_slope * machine.decision_function(test.images[:50])
  np.testing.assert_allclose(found[3], expected, rtol=1e-2, atol=1e-2)


def test_optuna_goes_on_with_trials_that_another_asked_for():
  """And is told what came of them: it ends nearer to the best point than it began."""
  pytest.importorskip("optuna")

  def search(restart):
    tried, tpe = methods.Tried(np.zeros((32, 2)), np.full(32, np.inf)), methods.Tpe()
    for done in range(0, 32, 4):
      tpe = methods.Tpe() if restart and done == 20 else tpe
      xs = tried.xs[done : done + 4] = tpe(tried, done, 4, 2.0, 1)
      tried.losses[done : done + 4] = np.where(xs[:, 0] > 1.9, np.inf, ((xs - 1) ** 2).sum(axis=1))
    return tried

  whole, resumed = search(False), search(True)
  np.testing.assert_array_equal(resumed.xs, whole.xs)
  assert np.abs(whole.xs).max() <= 2
  assert np.median(whole.losses[-12:]) < 0.5 * np.median(whole.losses[:12])
