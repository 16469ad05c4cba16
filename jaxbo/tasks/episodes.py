"""N-way K-shot episodes, gathered on the device from one array of images."""

import functools
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxbo import _check, _random, _tree


class Episode(NamedTuple):
  """One few-shot task: a small classification problem to learn, with data to judge the learner.

  Rows are ordered by label: row ``i`` has label ``i // num_shots`` in the support set and ``i //
  num_queries`` in the query set.

  Attributes:
    support_images: the images to learn from, ``[num_ways * num_shots, ...]``, with the dtype of the
      images.
    support_labels: ``[num_ways * num_shots]``, int32 in ``[0, num_ways)``.
    query_images: the images that judge the learner, ``[num_ways * num_queries, ...]``, with the
      dtype of the images.
    query_labels: ``[num_ways * num_queries]``, int32 in ``[0, num_ways)``.
  """

  support_images: jax.Array
  support_labels: jax.Array
  query_images: jax.Array
  query_labels: jax.Array


def sample_episode(
  key: jax.typing.ArrayLike,
  images: jax.typing.ArrayLike,
  *,
  num_ways: int,
  num_shots: int,
  num_queries: int,
  num_rotations: int = 1,
  counts: jax.typing.ArrayLike | None = None,
) -> Episode:
  """Draws an N-way K-shot episode: classes, then images of each, all without replacement.

  The ``num_ways`` classes are drawn uniformly, in random order, so a label says nothing about its
  class. For each class, ``num_shots + num_queries`` different images are drawn uniformly. The first
  ``num_shots`` form the support set, the others the query set. The episode depends only on the key
  and the arguments: for a meta-batch of tasks, use ``jax.vmap`` over keys.

  With ``num_rotations=4`` each pair (class, quarter turn) is a class of its own, as is usual for
  Omniglot. There are then four times as many classes. An episode may hold the same character at two
  turns, under two labels; all images of one episode class have the same turn. (learn2learn's
  ``RandomClassRotation`` differs: see Departures from the papers.) Use rotations for characters,
  where a turned character is as good as a new one. A turned dog is still a dog.

  Cost: ``classes * num_rotations + num_ways * per_class`` random numbers, and a gather of the
  episode's images. Memory besides ``images``: one episode, with rotations up to ``num_rotations``
  episodes.

  Args:
    key: an int, a raw key array or a typed key.
    images: ``[classes, per_class, ...]`` of any dtype. The pixels do not change: uint8 stays uint8,
      and the caller normalizes. Put the array on the device once and pass it to a jitted function
      as an argument; a closure would copy it into the program.
    num_ways: the number of classes in the episode, N in the papers; at least 1 and at most the
      number of classes.
    num_shots: the number of support images of each class, K in the papers; at least 1.
    num_queries: the number of query images of each class; at least 1.
    num_rotations: 1 to 4; the number of versions of each class, turned counterclockwise by the
      first of 0, 90, 180 and 270 degrees. Above 1, images must be square, ``[classes, per_class,
      size, size, ...]``.
    counts: ``[classes]``, integers in ``[0, per_class]``: how many images each class has. Only
      ``images[c, :counts[c]]`` can be drawn; the rest is padding. A class with fewer than
      ``num_shots + num_queries`` images is never drawn. By default all classes are full.

  Returns:
    The :class:`Episode`.

  Raises:
    TypeError: if a number is not a Python int, ``key`` is not a key, or ``counts`` are not
      integers.
    ValueError: if a number is below 1; if fewer than ``num_ways`` classes have enough images; if a
      class holds fewer than ``num_shots + num_queries`` images; if ``images`` or ``counts`` have a
      wrong shape, or ``counts`` a wrong value. The values of traced ``counts`` cannot be checked:
      if too few classes have enough images, other classes and padding fill the episode. Call the
      function once outside ``jax.jit`` to check them.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo.tasks
    >>> images = jnp.zeros((30, 20, 28, 28, 1), jnp.uint8)          # 30 characters, 20 drawings
    >>> @jax.jit
    ... def meta_batch(keys, images):
    ...   return jax.vmap(lambda key: jaxbo.tasks.sample_episode(
    ...     key, images, num_ways=5, num_shots=1, num_queries=3, num_rotations=4))(keys)
    >>> tasks = meta_batch(jax.random.split(jax.random.key(0), 16), images)
    >>> tasks.support_images.shape, tasks.support_images.dtype      # 16 tasks, 5 * 1 drawings
    ((16, 5, 28, 28, 1), dtype('uint8'))
    >>> print(tasks.query_labels[0])
    [0 0 0 1 1 1 2 2 2 3 3 3 4 4 4]

  References:
    Vinyals et al., `Matching Networks for One Shot Learning <https://arxiv.org/abs/1606.04080>`_
    (episodes); Santoro et al., `One-shot Learning with Memory-Augmented Neural Networks
    <https://arxiv.org/abs/1605.06065>`_ (rotations as new classes)
  """
  num_ways = _check.positive_int("num_ways", num_ways)
  num_shots = _check.positive_int("num_shots", num_shots)
  num_queries = _check.positive_int("num_queries", num_queries)
  num_rotations = _check.positive_int("num_rotations", num_rotations)
  num_images = num_shots + num_queries
  _check_arguments(images, counts, num_ways, num_images, num_rotations)
  images = jnp.asarray(images)
  num_classes, per_class = images.shape[:2]
  counts = jnp.full(num_classes, per_class) if counts is None else jnp.asarray(counts)

  if _random.key_impl("key", key) is None and jnp.ndim(key) == 0:
    key = jax.random.key(key)
  class_key, image_key = jax.random.split(key)

  # With probabilities, choice is a Gumbel top-k: classes of probability zero come last.
  eligible = jnp.repeat(counts >= num_images, num_rotations).astype(jnp.float32)
  drawn = _choice(class_key, eligible, num_ways)
  classes, turns = drawn // num_rotations, drawn % num_rotations

  def choose_images(key, count):
    return _choice(key, (jnp.arange(per_class) < count).astype(jnp.float32), num_images)

  chosen = jax.vmap(choose_images)(jax.random.split(image_key, num_ways), counts[classes])
  episode = images_of(images, classes, chosen)
  if num_rotations > 1:
    episode = jax.vmap(functools.partial(_rotate, num_rotations=num_rotations))(episode, turns)

  def rows(of_class):
    return of_class.reshape(-1, *images.shape[2:])

  labels = jnp.arange(num_ways, dtype=jnp.int32)
  return Episode(
    support_images=rows(episode[:, :num_shots]),
    support_labels=jnp.repeat(labels, num_shots),
    query_images=rows(episode[:, num_shots:]),
    query_labels=jnp.repeat(labels, num_queries),
  )


def _choice(key: jax.Array, probabilities: jax.Array, size: int) -> jax.Array:
  """Indices ``[size]`` of ``probabilities`` ``[n]``, without replacement, in random order."""
  return jax.random.choice(key, len(probabilities), (size,), replace=False, p=probabilities)


def _rotate(images: jax.Array, turn: jax.Array, num_rotations: int) -> jax.Array:
  """Turns images ``[n, size, size, ...]`` by ``turn`` quarters; ``turn`` may be traced.

  Under ``vmap`` the switch computes all versions and selects one: ``num_rotations`` copies of an
  episode. Versions of the whole array would be ``num_rotations`` copies of the data.
  """
  quarter = lambda k: lambda images: jnp.rot90(images, k, axes=(1, 2))
  return jax.lax.switch(turn, [quarter(k) for k in range(num_rotations)], images)


def _check_arguments(images, counts, num_ways: int, num_images: int, num_rotations: int) -> None:
  """Raises if the images cannot give such episodes, as far as the static values show."""
  shape = np.shape(images)
  if len(shape) < 2:
    raise ValueError(f"images must have shape [classes, per_class, ...], got shape {shape}")
  if num_rotations > 4:
    raise ValueError(f"num_rotations must be at most 4, the quarter turns, got {num_rotations}")
  if num_rotations > 1 and (len(shape) < 4 or shape[2] != shape[3]):
    raise ValueError(
      f"images must be square, [classes, per_class, size, size, ...], for num_rotations="
      f"{num_rotations}, got shape {shape}"
    )
  num_classes, per_class = shape[:2]
  if num_images > per_class:
    raise ValueError(
      f"num_shots + num_queries must be at most {per_class}, the images of a class, "
      f"got {num_images}"
    )
  available, which = num_classes, "the number of classes"
  if counts is not None:
    if np.shape(counts) != (num_classes,):
      raise ValueError(
        f"counts must have shape {(num_classes,)}, one number a class, got shape {np.shape(counts)}"
      )
    if not jnp.issubdtype(jnp.result_type(counts), jnp.integer):
      raise TypeError(f"counts must be integers, got dtype {jnp.result_type(counts)}")
    if not isinstance(counts, jax.core.Tracer):
      known = np.asarray(counts)
      outside = known[(known < 0) | (known > per_class)]
      if outside.size:
        raise ValueError(f"counts must be in [0, {per_class}], got {outside[0]}")
      available = int(np.sum(known >= num_images))
      which = f"the number of classes with num_shots + num_queries = {num_images} images or more"
  if num_ways > available * num_rotations:
    times = f", times num_rotations = {num_rotations}" if num_rotations > 1 else ""
    raise ValueError(
      f"num_ways must be at most {available * num_rotations}, {which}{times}, got {num_ways}"
    )


def images_of(images: jax.Array, classes: jax.Array, chosen: jax.Array) -> jax.Array:
  """Takes ``chosen [ways, shots]`` of ``classes [ways]``; divided classes meet on all devices."""
  sharding = _tree.explicit_sharding(images)
  if sharding is not None:
    sharding = sharding.update(spec=(None, None, *sharding.spec[2:]))
  return images.at[classes[:, None], chosen].get(out_sharding=sharding)
