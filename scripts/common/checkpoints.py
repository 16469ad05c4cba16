"""Checkpoints of a cell: its last two states on disk, from which it goes on bit for bit.

A checkpoint is a file, ``<steps done>.ckpt``. Its first line has the length and the checksum of a
header in JSON, which follows: whose checkpoint it is, and path, dtype, shape and checksum of every
array. Then come the bytes of the arrays.
"""

import contextlib
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts.common.devices import together
from scripts.common.files import UnusableError, write, writing
from scripts.common.task import Row

MAGIC = "jaxbo-checkpoint-1"
KEPT = 2


class Header(NamedTuple):
  """What is said of a checkpoint.

  Attributes:
    about: whose it is.
    done: steps that were done.
    steps: steps of the whole cell.
    lines: lines that the cell had.
    seconds: that its steps took.
    told: the steps since the last stop.
  """

  about: Row
  done: int
  steps: int
  lines: int
  seconds: float
  told: int = 0


class Saved(NamedTuple):
  """What a run goes on with: a state, what its last steps told, and why later ones were lost."""

  header: Header
  state: Any
  told: list[np.ndarray]  # For each leaf of what a step tells, [steps since the last stop, ...].
  lost: list[str]

  def told_as(self, one: Any) -> list[Any]:
    """What the steps since the last stop told, each like ``one``."""
    of_step = lambda i: jax.tree.unflatten(
      jax.tree.structure(one),
      [_like(leaf[i], like) for leaf, like in zip(self.told, jax.tree.leaves(one), strict=True)],
    )
    return [of_step(i) for i in range(self.header.told)]


class Checkpoints:
  """Those in ``folder``, of the cell and the run that ``about`` describes."""

  def __init__(self, folder: Path, about: Row | None = None):
    self._folder, self._about = folder, json.loads(json.dumps(about or {}, default=str))

  def restore(self, state: Any, unfit: Callable[[Header], str] = lambda _: "") -> Saved | None:
    """The last one that can be used, on the devices of ``state``; None without a file.

    ``unfit`` says why one that is whole does not fit, or nothing.

    Raises:
      UnusableError: if none of the files can be used, or one is of another run.
    """
    lost = list[str]()
    for path in self._files():
      try:
        header, arrays = self._read(path)
        if reason := unfit(header):
          raise _LostError(reason)
        told = [arrays.pop(key) for key in list(arrays) if key[0] == "told"]
        return Saved(header, _placed(arrays, state, path), told, lost)
      except _LostError as reason:
        lost.append(f"{path} cannot be used: {reason}")
    if lost:
      raise UnusableError(f"{'; '.join(lost)}; delete {self._folder} to begin this part anew")
    return None

  def raw(self, of_end: bool = False) -> Any:
    """The last state as NumPy arrays in dictionaries and lists.

    Raises:
      FileNotFoundError: if there is none.
      UnusableError: if it is damaged, of another run, or not ``of_end`` but that was asked for.
    """
    for path in self._files():
      try:
        header, arrays = self._read(path)
        if of_end and header.done < header.steps:
          raise _LostError("it is not of the end")
        return _nested({key[1:]: array for key, array in arrays.items() if key[0] == "state"})
      except _LostError as reason:
        raise UnusableError(
          f"{path} cannot be used: {reason}; delete {self._folder} to go on without it"
        ) from None
    raise FileNotFoundError(f"{self._folder} has no checkpoint")

  def last(self) -> Header | None:
    """What is said of the last one, if it can be read."""
    try:
      return self._read(self._files()[0], header_only=True)[0]
    except (IndexError, _LostError):
      return None

  def save(
    self,
    done: int,
    state: Any,
    seconds: float,
    steps: int,
    lines: int,
    told: Sequence[Any] | None = None,
  ) -> None:
    """Writes one after ``done`` of ``steps``, with ``lines`` so far; on disk when this returns.

    What was ``told`` since the last stop is only given where a run is stopped, which may be in one
    of several processes alone; else they wait for each other.
    """
    header = Header(self._about, done, steps, lines, seconds, len(told or ()))
    with contextlib.nullcontext() if told is not None else together():
      self._write(header, state, told or ())

  def _write(self, header: Header, state: Any, told: Sequence[Any]) -> None:
    if jax.process_index():
      return
    rows = zip(*map(jax.tree.leaves, told), strict=True)
    columns = [np.stack([*map(_array, column)]) for column in rows]
    tree = {"state": state, "told": columns}
    arrays = {_key(path): _array(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
    kinds = [(key, a.dtype.name, a.shape, zlib.crc32(_bytes(a))) for key, a in arrays.items()]
    text = json.dumps([header, kinds]).encode()
    first = f"{MAGIC} {len(text)} {zlib.crc32(text)}\n"
    with writing(self._folder):
      self._folder.mkdir(parents=True, exist_ok=True)
      write(self._folder / f"{header.done}.ckpt", first, text, *map(_bytes, arrays.values()))
      files = self._files()
      until = [path for path in files if int(path.stem) <= header.done]
      for path in {*files} - {*until[:KEPT]}:  # Long past, or of a future that was given up.
        path.unlink()

  def _files(self) -> list[Path]:
    """The last one first."""
    if any(path.is_dir() for path in self._folder.glob("[0-9]*")):
      raise UnusableError(
        f"{self._folder} has checkpoints of an older version of this program: go on with that "
        "version, or begin anew with --overwrite or in another folder"
      )
    return sorted(self._folder.glob("[0-9]*.ckpt"), key=lambda path: -int(path.stem))

  def _read(self, path: Path, header_only: bool = False) -> tuple[Header, dict[Any, np.ndarray]]:
    """What a file holds, all checksums compared."""
    arrays = dict[Any, np.ndarray]()
    try:
      with path.open("rb") as file:
        words = file.readline(100).decode(errors="replace").split()
        if len(words) != 3 or words[0] != MAGIC or not words[1].isdecimal():
          raise _LostError("its first line is damaged")
        text = file.read(int(words[1]))
        if words[2] != str(zlib.crc32(text)):
          raise _LostError("its header is damaged")
        header, kinds = json.loads(text)
        for key, kind, shape, checksum in [] if header_only else kinds:
          dtype = jnp.dtype(kind)
          data = file.read(dtype.itemsize * math.prod(shape))
          if zlib.crc32(data) != checksum:
            raise _LostError(f"its array {'.'.join(map(str, key))} is damaged")
          arrays[tuple(key)] = np.frombuffer(data, dtype).reshape(shape)
    except OSError as error:
      raise _LostError(error.strerror) from error
    header = Header(*header)
    for name, mine in self._about.items():
      if (its := header.about.get(name)) != mine:
        raise UnusableError(
          f"{path} is of another run: {name} is {its!r} there and {mine!r} here; delete it to go "
          "on without it, or choose another folder"
        )
    return header, arrays


def latest_step(folder: Path) -> int:
  """The last step with a checkpoint; 0 if there is none."""
  return max((int(path.stem) for path in folder.glob("[0-9]*.ckpt")), default=0)


class _LostError(Exception):
  """Why a checkpoint cannot be used; the one before it may be."""


def _key(path: Sequence[Any]) -> tuple[str | int, ...]:
  """A path in a tree: numbers for places in a sequence, else names."""
  part = lambda step: (
    step.idx if hasattr(step, "idx") else str(getattr(step, "name", None) or step.key)
  )
  return tuple(map(part, path))


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _array(leaf: Any) -> np.ndarray:
  return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _bytes(array: np.ndarray) -> memoryview:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _like(array: np.ndarray, leaf: Any) -> Any:
  """An array as what it was made of, on the devices of ``leaf``."""
  if not isinstance(leaf, jax.Array):
    return array if isinstance(leaf, np.ndarray) else type(leaf)(array[()])
  if _is_key(leaf):
    return jax.random.wrap_key_data(
      _like(array, jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
    )
  return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])


def _placed(arrays: dict[Any, np.ndarray], state: Any, path: Path) -> Any:
  """The arrays in the structure of ``state`` and on its devices, in memory that it may reuse."""
  like = {_key(place): leaf for place, leaf in jax.tree.leaves_with_path({"state": state})}
  shape = lambda leaf: (_array(leaf).dtype, np.shape(_array(leaf)))
  for key in {*like, *arrays}:
    its, mine = (f"{shape(tree[key])}" if key in tree else "none" for tree in (arrays, like))
    if its != mine:
      raise UnusableError(
        f"{path} is of another version of this program: the array {'.'.join(map(str, key))} is "
        f"{its} there and {mine} here; begin anew with --overwrite or in another folder"
      )
  leaves = [_like(arrays[key], leaf) for key, leaf in like.items()]
  own = iter(_copy([leaf for leaf in leaves if isinstance(leaf, jax.Array)]))
  leaves = [next(own) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
  return jax.tree.unflatten(jax.tree.structure(state), leaves)


@jax.jit
def _copy(leaves: list[jax.Array]) -> list[jax.Array]:
  """The same in memory of JAX's own, which a step may take over."""
  return [*map(jnp.copy, leaves)]


def _nested(arrays: dict[Any, np.ndarray]) -> Any:
  """Arrays by their paths in dictionaries and lists."""
  if () in arrays:
    return arrays[()]
  groups = dict[Any, dict[Any, np.ndarray]]()
  for key, array in arrays.items():
    groups.setdefault(key[0], {})[key[1:]] = array
  nested = {name: _nested(group) for name, group in groups.items()}
  return [*nested.values()] if all(isinstance(name, int) for name in nested) else nested
