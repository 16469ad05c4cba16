"""Streams of what a Python iterator yields."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo._types import Data, PyTree
from jaxbo.tasks.streams import Stream, function_stream


def iterator_stream(batches: Iterable[Data] | Callable[[], Iterator[Data]]) -> Stream:
  """A stream of what a Python iterator yields: a data loader, a Grain dataset, a generator.

  Under jit the host reads a batch when a round needs it (``jax.pure_callback``), so one
  ``lax.scan`` plays any number of rounds. The device waits for a slow iterator: let it prefetch.
  Outside of jit, ``loop.step(state, batch)`` takes the iterator's batches directly.

  Round ``t`` is always the ``t``-th batch, counted from 0. After a restart from a checkpoint, the
  stream skips the batches that were played; to go back, it makes a new iterator. Both need the same
  batches each time. A generator can only go forward.

  Args:
    batches: an iterable whose ``iter()`` starts again, or a function without arguments that returns
      a new iterator. Each batch is a pytree of numeric arrays, with the structure, shapes and
      dtypes of the first. 64-bit numbers become 32-bit ones unless JAX has 64 bits enabled.

  Returns:
    A :class:`Stream` with a :class:`RoundState`. The stream ignores its key and keeps one batch on
    the host. To ``jit``, two streams of one iterable are different programs: make the stream once.

  Raises:
    TypeError: if ``batches`` is not an iterable or a function; if a leaf is not numeric.
    ValueError: if the iterator is empty. At run time, inside the error that JAX raises: if the
      iterator ends, if a batch is not like the first, or if a generator is asked to go back.

  Example:
    >>> import jax, numpy as np, jaxbo
    >>> def load():
    ...   rng = np.random.default_rng(0)
    ...   while True:
    ...     yield rng.normal(size=(8, 2)), rng.normal(size=(4, 2))
    >>> stream = jaxbo.tasks.iterator_stream(load)
    >>> play = lambda state: jax.lax.scan(lambda s, _: stream.step(s), state, length=10)
    >>> state, (train, val) = jax.jit(play)(stream.init())
    >>> train.shape, bool((train[1] == list(zip(range(2), load()))[1][1][0].astype("f")).all())
    ((10, 8, 2), True)
  """
  return function_stream(_Reader(batches))


class _Reader:
  """Reads the batch of a round; what it gives depends on the number of the round alone."""

  def __init__(self, batches: Iterable[Data] | Callable[[], Iterator[Data]]):
    if not (isinstance(batches, Iterable) or callable(batches)):
      raise TypeError(
        "batches must be an iterable or a function that returns an iterator, got "
        f"{type(batches).__name__}"
      )
    self._begin = functools.partial(iter, batches) if isinstance(batches, Iterable) else batches
    self._only_once, self._lock = isinstance(batches, Iterator), threading.Lock()
    self._position, self._batches = -1, self._begin()
    self._shapes = jax.tree.map(self._shape, self._read(0))

  def __call__(self, key, t):
    del key
    return jax.pure_callback(self._of_this_shape, self._shapes, t, vmap_method="sequential")

  def _read(self, t: int) -> PyTree:
    if t < self._position:
      if self._only_once:
        raise ValueError(f"batches must be a function or restart to give round {t} again")
      self._position, self._batches = -1, self._begin()
    while self._position < t:
      try:
        self._batch = next(self._batches)
      except StopIteration:
        raise ValueError(
          f"batches must not end before round {t}, got {self._position + 1} batches"
        ) from None
      self._position += 1
    return self._batch

  def _of_this_shape(self, t):
    with self._lock:  # Programs may run in several threads.
      batch = self._read(int(t))
    shapes = jax.tree.map(self._shape, batch)
    if shapes != self._shapes:
      raise ValueError(
        f"batches must all be like the first, {self._shapes}; got {shapes} in round {t}"
      )
    return jax.tree.map(lambda leaf, like: np.asarray(leaf, like.dtype), batch, shapes)

  @staticmethod
  def _shape(leaf) -> jax.ShapeDtypeStruct:
    array = np.asarray(leaf)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
      raise TypeError(f"batches must have numeric leaves, got {leaf!r}")
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))
