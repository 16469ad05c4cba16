"""Several devices and processes: where arrays lie, and how processes refuse together."""

import contextlib
from collections.abc import Generator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Devices(NamedTuple):
  """Where things are.

  Attributes:
    rows: divided among all devices by the leading axis.
    everywhere: the same on all of them.
  """

  rows: NamedSharding
  everywhere: NamedSharding


def all_devices() -> Devices:
  """All devices of all processes, in a row."""
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  return Devices(NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec()))


def put(devices: Devices, array: np.ndarray, rows: np.ndarray) -> jax.Array:
  """``array[rows]``, divided among devices; a process reads the rows of its own."""
  shape = (len(rows), *array.shape[1:])
  read = lambda index: array[rows[index[0]]]
  return jax.make_array_from_callback(shape, devices.rows, read)


@contextlib.contextmanager
def together() -> Generator[None, None, None]:
  """What one process refuses inside, all refuse: none goes on and waits for one that has left."""
  refusal = None
  try:
    yield
  except (ValueError, OSError) as error:
    refusal = error
  if jax.process_count() > 1:
    refused = multihost_utils.process_allgather(np.bool_(refusal is not None))
    if refused.any() and refusal is None:
      refusal = ValueError(f"process {refused.argmax()} cannot go on; it says why")
  if refusal is not None:
    raise refusal
