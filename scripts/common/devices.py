"""Several devices and processes: how they meet, where arrays lie, how they refuse together.

Every process runs the same program; process 0 alone writes. What a step leaves behind is the same
on all devices, so that every process can read it and any number of devices can go on with it.

With more virtual devices of a CPU (``XLA_FLAGS``) than cores, XLA needs ``NPROC=16`` or so in the
environment: it has a thread for each core, and devices that wait for others block theirs.
"""

import contextlib
import math
from collections.abc import Callable, Generator
from typing import Annotated, Any, NamedTuple, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pydantic import model_validator

from scripts.common.config import FREE, Count, Index, StudyConfig


class DistributedConfig(StudyConfig):
  """The fields of an experiment that runs on any number of processes."""

  distributed: Annotated[bool, FREE] = False
  """Whether this is one of several processes that find each other (Slurm, TPU pods, ...). All must
  see output_dir."""
  coordinator_address: Annotated[str | None, FREE] = None
  """Host and port of process 0, if processes cannot find each other; needs the next two, too."""
  num_processes: Annotated[Count | None, FREE] = None
  """How many processes there are."""
  process_id: Annotated[Index | None, FREE] = None
  """The number of this process, from 0."""

  @model_validator(mode="after")
  def _processes_together(self) -> Self:
    address = (self.coordinator_address, self.num_processes, self.process_id)
    if 0 < address.count(None) < len(address):
      raise ValueError("coordinator_address, num_processes and process_id should come together")
    if self.process_id is not None and self.process_id >= (self.num_processes or 0):
      raise ValueError(
        f"process_id should be below num_processes = {self.num_processes}, got {self.process_id}"
      )
    return self

  def is_one_of_several(self) -> bool:
    """Whether there are other processes to meet."""
    return self.distributed or self.coordinator_address is not None


def connect(config: StudyConfig) -> None:
  """Meets the other processes, once, if there are any."""
  if not isinstance(config, DistributedConfig) or not config.is_one_of_several():
    return
  if not jax.distributed.is_initialized():
    address = config.coordinator_address
    jax.distributed.initialize(address, config.num_processes, config.process_id)


class Devices(NamedTuple):
  """Where things are.

  Attributes:
    rows: divided among all devices by the leading axis.
    everywhere: the same on all of them.
  """

  rows: NamedSharding
  everywhere: NamedSharding

  @property
  def number(self) -> int:
    """How many there are."""
    return self.rows.mesh.size

  @property
  def for_samples(self) -> dict[str, Any]:
    """Arguments by which ES divides its samples among the devices that rows leave over, if any."""
    over: dict[str, Any] = {"mesh": self.rows.mesh, "axis_name": "samples"}
    return over if self.rows.mesh.shape["samples"] > 1 else {}

  def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(keys, *arguments)``, compiled; each device runs it on one key ``[devices]``.

    Arguments are the same everywhere, and so are results, stacked ``[devices, ...]``.
    """
    mesh = self.rows.mesh
    apart, same = PartitionSpec(mesh.axis_names), PartitionSpec()

    def on_a_device(keys, *arguments):
      return jax.tree.map(lambda leaf: leaf[None], function(keys[0], *arguments))

    def call(keys, *arguments):
      specs = (apart, *[same] * len(arguments))
      options: dict[str, Any] = {"mesh": mesh, "out_specs": apart, "check_vma": False}
      return jax.shard_map(on_a_device, in_specs=specs, **options)(keys, *arguments)

    return jax.jit(call, out_shardings=self.everywhere)


def all_devices(num_rows: int = 0) -> Devices:
  """All devices of all processes: a mesh of the axes ``data``, which divides rows, and ``samples``.

  ``data`` has as many devices as can divide ``num_rows`` evenly, all of them by default.
  """
  number = math.gcd(num_rows, jax.device_count())
  shape, kinds = (number, jax.device_count() // number), (AxisType.Auto,) * 2
  mesh = jax.make_mesh(shape, ("data", "samples"), axis_types=kinds)
  return Devices(NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec()))


def check_divides(name: str, value: int) -> None:
  """Raises ``ValueError`` unless so many rows can be divided evenly among all devices."""
  if value % (number := jax.device_count()):
    raise ValueError(f"{name} must be a multiple of the number of devices, {number}, got {value}")


def put(devices: Devices, array: np.ndarray, rows: np.ndarray) -> jax.Array:
  """``array[rows]``, divided among devices; a process reads the rows of its own."""
  shape = (len(rows), *array.shape[1:])
  read = lambda index: array[rows[index[0]]]
  return jax.make_array_from_callback(shape, devices.rows, read)


def in_batches(
  devices: Devices, function: Callable[..., Any], params: Any, *arrays: Any, size: int = 250
) -> Any:
  """``function(params, *arrays)``, about ``size`` rows at a time, as NumPy arrays.

  Rows are divided among devices; ``function`` gives the same on all of them.
  """
  num = len(arrays[0])
  size = -(-min(size, num) // devices.number) * devices.number
  # All parts have one shape: the last one goes on with the first rows.
  parts = [np.arange(begin, begin + size) % num for begin in range(0, num, size)]
  results = [function(params, *(put(devices, array, rows) for array in arrays)) for rows in parts]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num], *results)


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
