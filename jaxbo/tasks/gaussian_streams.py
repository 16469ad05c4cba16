"""Streams of tasks whose best answers are known exactly: means of Gaussians."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check, _random
from jaxbo._types import Key
from jaxbo.tasks.streams import Stream, bound


class GaussianTruth(NamedTuple):
  """The truth about a round, hidden from the learner.

  Attributes:
    task_mean: the mean of the task, ``[dim]``.
    domain_mean: the mean of the task means, ``[dim]``.
    domain: the number of domain changes so far, int32.
    task_switch: whether the task is new, bool; true in the first round.
    domain_switch: whether the domain changed, bool; false in the first round.
  """

  task_mean: jax.Array
  domain_mean: jax.Array
  domain: jax.Array
  task_switch: jax.Array
  domain_switch: jax.Array


class GaussianBatch(NamedTuple):
  """A round of :func:`moving_gaussian_stream` or :func:`jumping_gaussian_stream`.

  Attributes:
    train: samples to learn from, ``[num_shots, dim]`` float32.
    val: samples that judge the learner, ``[num_queries, dim]`` float32.
    extra: the :class:`GaussianTruth`.
  """

  train: jax.Array
  val: jax.Array
  extra: GaussianTruth

  @property
  def task_switch(self) -> jax.Array:
    """Whether the task is new."""
    return self.extra.task_switch

  @property
  def domain(self) -> jax.Array:
    """The number of domain changes so far."""
    return self.extra.domain


class GaussianState(NamedTuple):
  """State of a stream of Gaussians.

  Attributes:
    base_key: raw key data; the keys of a round come from it and the number of the round.
    num_rounds: the number of rounds so far, int32.
    task_mean: the task mean of the last round, ``[dim]``.
    domain_mean: the domain mean of the last round, ``[dim]``.
    domain: the number of domain changes so far, int32.
  """

  base_key: jax.Array
  num_rounds: jax.Array
  task_mean: jax.Array
  domain_mean: jax.Array
  domain: jax.Array


def moving_gaussian_stream(
  dim: int,
  num_shots: int,
  *,
  stay_probability: float | int,
  domain_switch_probability: float | int = 1.0,
  num_queries: int = 1,
  first_mean: float | int = -5.0,
  domain_step: float | int = 1.0,
  task_variance: float | int = 1.0,
  data_variance: float | int = 0.1,
) -> Stream:
  r"""A stream of Gaussian tasks around a domain mean, which moves when the domain changes.

  .. math::
    m_d = m_0 + d\, s \mathbf 1, \qquad \mu \sim N(m_d, \sigma_\mu^2 I), \qquad
    u_i \sim N(\mu, \sigma^2 I)

  :func:`gaussian_posterior_mean` gives the best estimate of the mean from ``num_shots`` samples.
  With the loss :math:`\frac12 \|\phi - \bar u\|^2` of the sample mean, :math:`k` gradient steps of
  rate :math:`a` give :math:`\bar u + (1 - a)^k (\theta - \bar u)`, and the meta-gradient is
  :math:`(1 - a)^k (\phi_k - \bar u_Q)`.

  The published stream has two dimensions, begins at -6 and also moves by 1 at the start;
  ``first_mean=-5`` gives the same first domain.

  Args:
    dim: the dimension, at least 1.
    num_shots: the number of samples to learn from in each round, at least 1.
    stay_probability: the probability in [0, 1] that the task stays.
    domain_switch_probability: the probability in [0, 1] that the domain moves when the task
      changes.
    num_queries: the number of samples that judge the learner, at least 1.
    first_mean: each coordinate of the first domain mean :math:`m_0`.
    domain_step: :math:`s`, the step of each coordinate.
    task_variance: :math:`\sigma_\mu^2 \ge 0`.
    data_variance: :math:`\sigma^2 \ge 0`.

  Returns:
    A :class:`Stream` whose batches are :class:`GaussianBatch`.

  Raises:
    ValueError: if a number is outside its range.

  Example:
    >>> import jaxbo.tasks
    >>> stream = jaxbo.tasks.moving_gaussian_stream(2, 5, stay_probability=0.0)
    >>> state = stream.init(0)
    >>> for _ in range(3):
    ...   state, batch = stream.step(state)
    ...   print(batch.train.shape, batch.extra.domain_mean)
    (5, 2) [-5. -5.]
    (5, 2) [-4. -4.]
    (5, 2) [-3. -3.]

  References:
    The moving Gaussian of https://github.com/livreQ/DynamicCML.
  """
  _check.finite("first_mean", first_mean)
  _check.finite("domain_step", domain_step)
  _check.non_negative("task_variance", task_variance)

  numbers = {
    "first_mean": first_mean, "domain_step": domain_step, "task_variance": task_variance,
    "stay": stay_probability, "domain_switch": domain_switch_probability, "variance": data_variance,
  }  # fmt: skip
  return _make(_move, numbers, dim, num_shots, num_queries)


def jumping_gaussian_stream(
  dim: int,
  num_shots: int,
  *,
  stay_probability: float | int,
  distance: float | int,
  num_queries: int = 1,
  data_variance: float | int = 1.0,
) -> Stream:
  r"""A stream of Gaussian tasks whose means jump, so a detector's error rates are known exactly.

  The first task is a jump from the origin; every jump has a uniformly random direction. The loss of
  a model :math:`\phi` in a round is :math:`L = \frac{1}{2n} \sum_i \|\phi - u_i\|^2`, and

  .. math:: \frac{2 n L}{\sigma^2} \sim \chi^2_{nd}\Big(\frac{n \|\phi - \mu\|^2}{\sigma^2}\Big),

  the noncentral chi-square distribution. Take the model that knows the last task's mean, and a
  detector with threshold :math:`\ell`. Its two rates are the survival function of this
  distribution at :math:`2 n \ell / \sigma^2`: with parameter 0 for the false-alarm rate, and with
  :math:`n\, \text{distance}^2 / \sigma^2` for the detection rate. For ``dim=5``, ``num_shots=10``,
  unit variance, distance 2 and threshold 3.5 they are 3.24 % and 89.96 %.

  Args:
    dim: the dimension, at least 1.
    num_shots: the number of samples to learn from in each round, :math:`n \ge 1`.
    stay_probability: the probability in [0, 1] that the task stays.
    distance: the length of a jump, non-negative.
    num_queries: the number of samples that judge the learner, at least 1.
    data_variance: :math:`\sigma^2 \ge 0`.

  Returns:
    A :class:`Stream` whose batches are :class:`GaussianBatch`; the domain never changes.

  Raises:
    ValueError: if a number is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo.tasks
    >>> stream = jaxbo.tasks.jumping_gaussian_stream(3, 5, stay_probability=0.0, distance=2.0)
    >>> state, first = stream.step(stream.init(0))
    >>> state, second = stream.step(state)
    >>> print(jnp.linalg.norm(second.extra.task_mean - first.extra.task_mean).round(4))
    2.0
  """
  _check.non_negative("distance", distance)

  numbers = {
    "distance": distance, "stay": stay_probability, "domain_switch": 0.0, "variance": data_variance
  }  # fmt: skip
  return _make(_jump, numbers, dim, num_shots, num_queries)


def gaussian_posterior_mean(
  samples: jax.Array,
  prior_mean: jax.Array,
  *,
  task_variance: float | int = 1.0,
  data_variance: float | int = 0.1,
) -> jax.Array:
  r"""The posterior mean of a task given samples: on average, no learner can beat it.

  .. math:: \frac{(n / \sigma^2)\, \bar u + m_d / \sigma_\mu^2}{n / \sigma^2 + 1 / \sigma_\mu^2}

  Its expected squared error is :math:`d / (n / \sigma^2 + 1 / \sigma_\mu^2)` in :math:`d`
  dimensions.

  Args:
    samples: ``[n, dim]``.
    prior_mean: the domain mean :math:`m_d`, ``[dim]``.
    task_variance: :math:`\sigma_\mu^2 > 0`.
    data_variance: :math:`\sigma^2 > 0`.

  Returns:
    ``[dim]``.

  Raises:
    ValueError: if a variance is not positive.

  Example:
    >>> import jax.numpy as jnp, jaxbo.tasks
    >>> samples, prior = jnp.full((1, 2), 3.0), jnp.zeros(2)
    >>> print(jaxbo.tasks.gaussian_posterior_mean(samples, prior, data_variance=0.5))
    [2. 2.]
  """
  _check.positive("task_variance", task_variance)
  _check.positive("data_variance", data_variance)
  data, prior = len(samples) / data_variance, 1 / task_variance
  return (data * jnp.mean(samples, axis=0) + prior * prior_mean) / (data + prior)


def _make(move, numbers, dim, num_shots, num_queries) -> Stream:
  dim = _check.positive_int("dim", dim)
  num_shots = _check.positive_int("num_shots", num_shots)
  num_queries = _check.positive_int("num_queries", num_queries)
  _check.within("stay_probability", numbers["stay"], 0, 1)
  _check.within("domain_switch_probability", numbers["domain_switch"], 0, 1)
  _check.non_negative("data_variance", numbers["variance"])
  numbers = {name: jnp.float32(number) for name, number in numbers.items()}
  init = bound(_first_round, dim=dim)
  step = bound(_next_round, move=move, dim=dim, num_shots=num_shots, num_queries=num_queries)
  return Stream(jax.tree_util.Partial(init), jax.tree_util.Partial(step, numbers))


def _first_round(key: Key = 0, *, dim):
  data = _random.default_key_data(key)
  return GaussianState(data, jnp.int32(0), jnp.zeros(dim), jnp.zeros(dim), jnp.int32(0))


def _next_round(numbers, state, *, move, dim, num_shots, num_queries):
  key = jax.random.fold_in(jax.random.wrap_key_data(state.base_key), state.num_rounds)
  keys = jax.random.split(key, 4)
  first = state.num_rounds == 0
  task_switch = first | (jax.random.uniform(keys[0]) >= numbers["stay"])
  redrawn = jax.random.uniform(keys[1]) < numbers["domain_switch"]
  domain_switch = task_switch & ~first & redrawn
  new_mean, domain_mean = move(numbers, keys[2], state, first, domain_switch)
  task_mean = jnp.where(task_switch, new_mean, state.task_mean)
  domain = state.domain + domain_switch.astype(jnp.int32)
  noise = jax.random.normal(keys[3], (num_shots + num_queries, dim))
  samples = task_mean[None] + jnp.sqrt(numbers["variance"]) * noise
  truth = GaussianTruth(task_mean, domain_mean, domain, task_switch, domain_switch)
  batch = GaussianBatch(samples[:num_shots], samples[num_shots:], truth)
  num_rounds = state.num_rounds + 1
  return GaussianState(state.base_key, num_rounds, task_mean, domain_mean, domain), batch


def _move(numbers, key, state, first, domain_switch):
  """A task around the domain mean, which moves when the domain changes."""
  domain_mean = state.domain_mean + jnp.where(first, numbers["first_mean"], 0.0)
  domain_mean = domain_mean + jnp.where(domain_switch, numbers["domain_step"], 0.0)
  noise = jax.random.normal(key, domain_mean.shape)
  return domain_mean + jnp.sqrt(numbers["task_variance"]) * noise, domain_mean


def _jump(numbers, key, state, first, domain_switch):
  """A jump of the task, in any direction."""
  del first, domain_switch
  direction = jax.random.normal(key, state.task_mean.shape)
  jump = numbers["distance"] * direction / jnp.linalg.norm(direction)
  return state.task_mean + jump, state.domain_mean
