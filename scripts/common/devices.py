"""Where arrays lie: divided among all devices of all processes by rows, or the same on all."""

from typing import NamedTuple

import jax
import numpy as np
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
