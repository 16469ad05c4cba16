"""Streams of few-shot tasks that change without notice: OSAKA, and with separate shifts."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import _check, _random
from jaxbo._types import Data, Key
from jaxbo.tasks.episodes import images_of
from jaxbo.tasks.streams import Stream, bound


class StreamTruth(NamedTuple):
  """The truth about a round, hidden from the learner.

  Attributes:
    domain: the number of the domain, int32; 0 is the domain of the pre-training.
    classes: the class behind each label, ``[num_ways]`` int32.
    task_switch: whether the classes were drawn anew, bool; true in the first round.
    domain_switch: whether the domain differs from that of the last round, bool; false in the first
      round.
  """

  domain: jax.Array
  classes: jax.Array
  task_switch: jax.Array
  domain_switch: jax.Array


class StreamBatch(NamedTuple):
  """A round of :func:`osaka_stream`.

  Attributes:
    images: ``[num_ways * num_shots, ...]``, with the dtype of the images.
    labels: ``[num_ways * num_shots]``, int32 in ``[0, num_ways)``.
    domain: the number of the domain, int32; 0 is the domain of the pre-training.
    classes: the class behind each label, ``[num_ways]`` int32.
    task_switch: whether the classes were drawn anew, bool; true in the first round.
    domain_switch: whether the domain differs from that of the last round, bool; false in the first
      round.
    query_images: ``[num_ways * num_queries, ...]``, or ``None`` without queries.
    query_labels: ``[num_ways * num_queries]``, int32 in ``[0, num_ways)``, or ``None``.
  """

  images: jax.Array
  labels: jax.Array
  domain: jax.Array
  classes: jax.Array
  task_switch: jax.Array
  domain_switch: jax.Array
  query_images: jax.Array | None = None
  query_labels: jax.Array | None = None

  @property
  def train(self) -> tuple[Data, Data]:
    """The labeled data to learn from, ``(images, labels)``."""
    return self.images, self.labels

  @property
  def val(self) -> tuple[Data, Data]:
    """The data that judge the learner: the queries, or without queries the same as ``train``."""
    if self.query_images is None or self.query_labels is None:
      return self.train
    return self.query_images, self.query_labels

  @property
  def extra(self) -> StreamTruth:
    """The truth, small enough to keep for every round."""
    return StreamTruth(self.domain, self.classes, self.task_switch, self.domain_switch)


class OsakaState(NamedTuple):
  """State of :func:`osaka_stream`.

  Attributes:
    base_key: raw key data; the keys of a round come from it and the number of the round.
    num_rounds: the number of rounds so far, int32.
    domain: the domain of the last round, int32.
    classes: the classes of the last round, ``[num_ways]`` int32.
  """

  base_key: jax.Array
  num_rounds: jax.Array
  domain: jax.Array
  classes: jax.Array


def osaka_stream(
  domains: Sequence[jax.typing.ArrayLike],
  *,
  num_ways: int,
  num_shots: int,
  stay_probability: float | int,
  domain_probabilities: Sequence[float | int] | jax.typing.ArrayLike,
  domain_switch_probability: float | int | None = None,
  num_queries: int = 0,
  shuffle: bool = True,
  label_order: str = "drawn",
) -> Stream:
  r"""A stream of N-way K-shot tasks from several domains, by the rule of OSAKA.

  In each round the task stays with probability :math:`p`. Otherwise there is a *task switch*: the
  stream draws a domain, then ``num_ways`` of its classes without replacement. Every round draws
  ``num_shots`` new images of each class, with replacement. The first round is a switch.

  ``domain_switch_probability`` :math:`p_e` (the rule of DynamicCML) separates shifts from switches:
  a task switch draws the domain anew with probability :math:`p_e` and keeps it otherwise. The draw
  may give the same domain. ``None`` means :math:`p_e = 1`, the rule of OSAKA.

  In :math:`T` rounds, :math:`1 + (T - 1)(1 - p)` switches are expected, and a task takes :math:`1 /
  (1 - p)` rounds on average. In each round the domain changes with probability :math:`(1 - p) p_e
  (1 - \sum_i \pi_i^2)`.

  Rows are shuffled, because an order by class leaks the labels to batch statistics (the published
  code differs here and elsewhere: see Departures from the papers). Classes are numbered by their
  place in the arrays, so put them in a fixed order. The stream does not change pixels: make sure
  that all domains have the same scale and polarity. If a domain has exactly ``num_ways`` classes,
  its tasks differ only in the order of the labels.

  Args:
    domains: a list of arrays ``[classes, per_class, ...]``; the numbers of classes and of images
      may differ. The first array is the domain of the pre-training. Put the arrays on the device
      once.
    num_ways: the number of classes of a task, at least 1 and at most the number of classes of the
      smallest domain.
    num_shots: the number of images of each class in a round, at least 1.
    stay_probability: :math:`p` in [0, 1]; OSAKA uses 0.9 and 0.98.
    domain_probabilities: :math:`\pi`, one for each domain, non-negative, with sum 1; OSAKA uses
      0.5, 0.25, 0.25.
    domain_switch_probability: :math:`p_e` in [0, 1], or ``None``.
    num_queries: the number of images of each class in a separate query set; 0 for none, as in
      OSAKA. Each round splits the images of a class at a random place, in proportion, so no image
      is in both sets.
    shuffle: whether rows are in random order; otherwise they are ordered by label.
    label_order: ``"drawn"``: labels follow the order in which classes were drawn, so old classes
      also get new labels. ``"sorted"``: labels follow the order of the classes. A switch within a
      domain whose classes are all drawn then changes nothing (a soft stream, harder to detect).

  Returns:
    A :class:`Stream` whose batches are :class:`StreamBatch`.

  Raises:
    ValueError: if a number is outside its range; if ``domains`` is empty; if a domain has fewer
      than ``num_ways`` classes, or no images of a class (fewer than two with queries); if images
      differ in shape or dtype; if ``domain_probabilities`` are not one for each domain, are
      negative, or do not sum to 1.
    TypeError: if a number is not a Python int, or ``domains`` is not a list.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo.tasks
    >>> domains = [jnp.zeros((30, 20, 28, 28), jnp.uint8), jnp.ones((10, 50, 28, 28), jnp.uint8)]
    >>> stream = jaxbo.tasks.osaka_stream(domains, num_ways=5, num_shots=2, stay_probability=0.9,
    ...                                   domain_probabilities=[0.5, 0.5])
    >>> def play(stream, num_rounds):
    ...   def body(state, _):
    ...     state, batch = stream.step(state)
    ...     return state, batch.extra._replace(classes=batch.images.shape[0])
    ...   return jax.lax.scan(body, stream.init(0), length=num_rounds)[1]
    >>> truth = jax.jit(play, static_argnums=1)(stream, 1000)
    >>> int(truth.task_switch.sum())                                # 100.9 are expected
    88

  References:
    Caccia et al., `Online Fast Adaptation and Knowledge Accumulation
    <https://arxiv.org/abs/2003.05856>`_, 2020; its code is https://github.com/ServiceNow/osaka. The
    separate probability of shifts: https://github.com/livreQ/DynamicCML.
  """
  num_ways = _check.positive_int("num_ways", num_ways)
  num_shots = _check.positive_int("num_shots", num_shots)
  if num_queries != 0:
    num_queries = _check.positive_int("num_queries", num_queries)
  _check.within("stay_probability", stay_probability, 0, 1)
  if domain_switch_probability is None:
    domain_switch_probability = 1.0
  _check.within("domain_switch_probability", domain_switch_probability, 0, 1)
  _check.one_of("label_order", label_order, ("drawn", "sorted"))
  arrays = _checked_domains(domains, num_ways, num_queries)
  probabilities = np.asarray(domain_probabilities, np.float64)
  if probabilities.shape != (len(arrays),):
    raise ValueError(
      f"domain_probabilities must be {len(arrays)} numbers, one for each domain, got shape "
      f"{probabilities.shape}"
    )
  if not np.all(probabilities >= 0) or abs(np.sum(probabilities) - 1) > 1e-6:
    raise ValueError(
      f"domain_probabilities must be non-negative and sum to 1, got {probabilities.tolist()}"
    )
  numbers = (stay_probability, domain_switch_probability, probabilities)
  numbers = tuple(jnp.asarray(number, jnp.float32) for number in numbers)
  init = bound(_init, num_ways=num_ways)
  step = bound(
    _step,
    num_ways=num_ways,
    num_shots=num_shots,
    num_queries=num_queries,
    shuffle=shuffle,
    label_order=label_order,
  )
  return Stream(jax.tree_util.Partial(init), jax.tree_util.Partial(step, arrays, numbers))


def _init(key: Key = 0, *, num_ways: int) -> OsakaState:
  data = _random.default_key_data(key)
  return OsakaState(data, jnp.int32(0), jnp.int32(0), jnp.zeros(num_ways, jnp.int32))


def _step(domains, numbers, state, *, num_ways, num_shots, num_queries, shuffle, label_order):
  stay, redraw, probabilities = numbers
  key = jax.random.fold_in(jax.random.wrap_key_data(state.base_key), state.num_rounds)
  keys = jax.random.split(key, 6)
  first = state.num_rounds == 0
  task_switch = first | (jax.random.uniform(keys[0]) >= stay)
  new_domain = task_switch & (first | (jax.random.uniform(keys[1]) < redraw))
  drawn = jax.random.choice(keys[2], len(domains), p=probabilities).astype(jnp.int32)
  domain = jnp.where(new_domain, drawn, state.domain)

  def draw_task(images):
    def draw(key):
      classes = jax.random.choice(key, len(images), (num_ways,), replace=False).astype(jnp.int32)
      return jnp.sort(classes) if label_order == "sorted" else classes

    return draw

  def draw_images(images):
    def draw(key, classes):
      rows = _draw_rows(key, images.shape[1], num_ways, num_shots, num_queries)
      return tuple(images_of(images, classes, r).reshape(-1, *images.shape[2:]) for r in rows)

    return draw

  new_classes = jax.lax.switch(domain, [draw_task(images) for images in domains], keys[3])
  classes = jnp.where(task_switch, new_classes, state.classes)
  sets = jax.lax.switch(domain, [draw_images(images) for images in domains], keys[4], classes)

  def with_labels(key, images):
    labels = jnp.repeat(jnp.arange(num_ways, dtype=jnp.int32), len(images) // num_ways)
    order = jax.random.permutation(key, len(labels)) if shuffle else jnp.arange(len(labels))
    return images[order], labels[order]

  both = jax.vmap(jax.random.fold_in, (None, 0))(keys[5], jnp.arange(len(sets)))
  (images, labels), *queries = (with_labels(key, s) for key, s in zip(both, sets, strict=True))
  batch = StreamBatch(
    images,
    labels,
    domain,
    classes,
    task_switch,
    (domain != state.domain) & ~first,
    *(queries[0] if queries else (None, None)),
  )
  return OsakaState(state.base_key, state.num_rounds + 1, domain, classes), batch


def _draw_rows(key, per_class, num_ways, num_shots, num_queries):
  """Draws image indices of each class, ``[num_ways, num_shots]``, and of the queries if any."""
  cut_key, shot_key, query_key = jax.random.split(key, 3)
  if not num_queries:
    return (jax.random.randint(shot_key, (num_ways, num_shots), 0, per_class),)
  pool = round(per_class * num_shots / (num_shots + num_queries))
  pool = min(max(pool, 1), per_class - 1)
  cut = jax.random.randint(cut_key, (num_ways, 1), 0, per_class)
  shots = jax.random.randint(shot_key, (num_ways, num_shots), 0, pool)
  queries = jax.random.randint(query_key, (num_ways, num_queries), pool, per_class)
  return (cut + shots) % per_class, (cut + queries) % per_class


def _checked_domains(domains, num_ways: int, num_queries: int) -> tuple[jax.Array, ...]:
  if not isinstance(domains, Sequence):
    kind = type(domains).__name__
    raise TypeError(f"domains must be a list of arrays [classes, per_class, ...], got {kind}")
  if not len(domains):
    raise ValueError("domains must have at least one array [classes, per_class, ...], got none")
  arrays = tuple(jnp.asarray(domain) for domain in domains)
  enough = 2 if num_queries else 1
  for i, images in enumerate(arrays):
    if images.ndim < 2 or images.shape[1] < enough:
      raise ValueError(
        f"domains[{i}] must have shape [classes, per_class, ...] with at least {enough} images of "
        f"each class, got shape {images.shape}"
      )
    if images.shape[0] < num_ways:
      raise ValueError(
        f"num_ways must be at most {images.shape[0]}, the classes of domains[{i}], got {num_ways}"
      )
    if (images.shape[2:], images.dtype) != (arrays[0].shape[2:], arrays[0].dtype):
      raise ValueError(
        f"domains must have images of one shape and dtype, got {images.shape[2:]} {images.dtype} "
        f"in domains[{i}] and {arrays[0].shape[2:]} {arrays[0].dtype} in domains[0]"
      )
  return arrays
