"""A step, compiled once for all cells that share it, and what it costs."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure


class Program:
  """``step(state, t, *data) -> (state, told)``, which reuses the state's memory; ``t`` is an int32.

  It is compiled for the shapes that it meets first, and again where others come.

  Attributes:
    compile_seconds: what the last compilation took.
    temporary_bytes: XLA's scratch memory of it, beside inputs and outputs; -1 if unknown.
  """

  def __init__(self, step: Callable[..., tuple[Any, Any]], **options: Any):
    self._jitted = jax.jit(step, donate_argnums=0, **options)
    self._compiled: dict[Any, Callable[..., tuple[Any, Any]]] = {}
    self.compile_seconds = 0.0
    self.temporary_bytes = -1

  def compile(self, state: Any, *data: Any) -> Callable[..., tuple[Any, Any]]:
    """The compiled step for arguments like these."""
    leaves, structure = jax.tree.flatten((state, data))
    shapes = (structure, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
    if shapes not in self._compiled:
      start = time.perf_counter()
      compiled = self._jitted.lower(state, jnp.int32(0), *data).compile()
      self.compile_seconds = time.perf_counter() - start
      self.temporary_bytes = measure.temporary_bytes(compiled)
      self._compiled[shapes] = compiled
    return self._compiled[shapes]
