"""Bayesian gradient descent: a mean and a standard deviation for every weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _random, _schedule, _tree
from jaxbo._types import Key, PyTree
from jaxbo.bilevel.response import MISSING


class BgdInfo(NamedTuple):
  """Diagnostics of :func:`bayesian_gradient_descent`.

  Attributes:
    finite: whether the update was finite; if not, nothing moved.
  """

  finite: jax.Array


class BgdState(NamedTuple):
  """State of :func:`bayesian_gradient_descent`.

  Attributes:
    deviations: the standard deviation of every weight, shaped like the parameters.
    bgd_key: raw key data.
    bgd_count: the number of updates so far, int32.
    info: the :class:`BgdInfo` of the last update.
  """

  deviations: optax.Params
  bgd_key: jax.Array
  bgd_count: jax.Array
  info: BgdInfo


def bayesian_gradient_descent(
  learning_rate: jax.typing.ArrayLike,
  deviation: jax.typing.ArrayLike,
  *,
  num_samples: int = 5,
  num_examples: int = 1,
  key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Bayesian gradient descent (BGD), which limits forgetting without task boundaries.

  The parameters are the means :math:`\mu` of independent Gaussians with standard deviations
  :math:`s`. With :math:`g(\theta)` the gradient of the *sum* of the losses,

  .. math::
    \mu &\leftarrow \mu - \eta s^2\, E[g(\mu + s \epsilon)] \\
    s &\leftarrow s \sqrt{1 + a^2} - s a, \qquad
      a = \tfrac12 s\, E[g(\mu + s \epsilon)\, \epsilon], \qquad \epsilon \sim N(0, I)

  Weights on which the loss depends strongly become certain and stop moving. On :math:`\frac h2
  (\theta - m)^2` the expectations are :math:`h (\mu - m)` and :math:`h s`, and :math:`s` falls to
  :math:`s\, e^{-\operatorname{arsinh}(h s^2 / 2)}`.

  The expectations are means over ``num_samples`` draws. Use BGD as the optimizer of the *inner*
  problem: :func:`jaxbo.inner_solver` passes the loss as a function (``value_fn``). BGD ignores the
  incoming gradient, which is taken at :math:`\mu`. The deviations scale the step, so there is no
  learning rate besides :math:`\eta`.

  Cost: ``num_samples`` gradients. Memory: a copy of the parameters.

  Args:
    learning_rate: :math:`\eta > 0`; nearly all tuned runs of OSAKA use 10.
    deviation: the initial :math:`s > 0` of every weight; OSAKA uses 0.01.
    num_samples: the number of draws of :math:`\epsilon`, at least 1; OSAKA uses 5.
    num_examples: the factor that turns the loss, a mean, into a sum; at least 1.
    key: an int, a raw key array or a typed key.

  Returns:
    A transformation whose ``update`` requires ``params`` and ``value_fn=``, a function of the
    parameters. If a gradient is not finite, nothing moves.

  Raises:
    ValueError: if a number is outside its range, or ``params`` is missing.
    TypeError: if ``value_fn`` is missing.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> bgd = jaxbo.meta.bayesian_gradient_descent(1.0, 0.5, num_samples=50)
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: 0.5 * (y - batch) ** 2, bgd, num_steps=50)
    >>> y = inner.solve(jnp.float32(0.0), inner.init(jnp.float32(0.0)), 2.0)
    >>> print(abs(y.params - 2.0) < 0.2, y.opt_state.deviations < 0.2)
    True True

  References:
    Zeno, Golan, Hoffer and Soudry, `Task Agnostic Continual Learning Using Online Variational Bayes
    <https://arxiv.org/abs/1803.10123>`_, 2018.
  """
  _check.positive("learning_rate", learning_rate)
  _check.positive("deviation", deviation)
  num_samples = _check.positive_int("num_samples", num_samples)
  num_examples = _check.positive_int("num_examples", num_examples)
  impl = _random.key_impl("key", key)

  def init(params):
    _check.floating("params", params)
    deviations = jax.tree.map(lambda leaf: jnp.full_like(leaf, deviation), params)
    return BgdState(deviations, _random.key_data(key), jnp.int32(0), BgdInfo(jnp.bool_(True)))

  def update(updates, state, params=None, *, value_fn: Any = MISSING, **extra_args):
    del extra_args
    if params is None:
      raise ValueError("bayesian_gradient_descent: update must be given params, the means")
    if not callable(value_fn):
      raise TypeError(
        "bayesian_gradient_descent: update must be given value_fn=, the loss as a function of the "
        "parameters; jaxbo.inner_solver gives it"
      )
    mean, deviations = _tree.at_least_float32((params, state.deviations))

    def loss(params):
      value: PyTree = value_fn(params)
      _check.scalar_loss("value_fn", value, params)
      return value

    base = jax.random.fold_in(jax.random.wrap_key_data(state.bgd_key, impl=impl), state.bgd_count)

    def add(sums, sample):
      noise = optax.tree.random_like(jax.random.fold_in(base, sample), mean)
      drawn = jax.tree.map(lambda m, s, e: m + s * e, mean, deviations, noise)
      grads = _tree.at_least_float32(jax.grad(loss)(_tree.cast_like(drawn, params)))
      grads = optax.tree.scale(num_examples / num_samples, grads)
      with_noise = jax.tree.map(lambda g, e: g * e, grads, noise)
      return optax.tree.add(sums, (grads, with_noise)), None

    zeros = (optax.tree.zeros_like(mean), optax.tree.zeros_like(mean))
    (gradient, correlation), _ = jax.lax.scan(add, zeros, jnp.arange(num_samples))
    rate = lambda s: jnp.asarray(learning_rate, s.dtype)
    step = jax.tree.map(lambda s, g: -rate(s) * s**2 * g, deviations, gradient)
    # Equals s sqrt(1 + a^2) - s a, without the difference of two large numbers.
    shrink = lambda s, c: s * jnp.exp(-jnp.arcsinh(0.5 * s * c))
    shrunk = jax.tree.map(shrink, deviations, correlation)
    finite = _tree.all_finite((step, shrunk))
    step, shrunk = _tree.where(finite, (step, shrunk), (zeros[0], deviations))
    state = BgdState(
      _tree.cast_like(shrunk, state.deviations),
      state.bgd_key,
      _schedule.after(state.bgd_count),
      BgdInfo(finite),
    )
    return _tree.cast_like(step, updates), state

  return optax.GradientTransformationExtraArgs(init, update)
