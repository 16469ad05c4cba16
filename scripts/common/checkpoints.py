"""Checkpoints of a run: its last state on disk, from which it goes on bit for bit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
  """The last state of a run, written in the background."""

  def __init__(self, folder: Path):
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
    handler = ocp.StandardCheckpointHandler()
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler)

  def restore(self, state: Any) -> tuple[Any, float, int]:
    """The last checkpoint, on the devices of ``state``: ``(state, seconds, steps done)``.

    If there is none, ``(state, 0.0, 0)``.
    """
    done = self._manager.latest_step()
    if done is None:
      return state, 0.0, 0
    like = {"state": state, "seconds": np.float64(0)}
    restored = self._manager.restore(done, args=ocp.args.StandardRestore(like))
    return restored["state"], float(restored["seconds"]), done

  def raw(self) -> Any:
    """The state of the last checkpoint as NumPy arrays in dictionaries and lists."""
    done = self._manager.latest_step()
    if done is None:
      raise FileNotFoundError(f"{self._manager.directory} has no checkpoint")
    # As NumPy arrays: it may be of other devices than there are here.
    saved = self._manager.item_metadata(done)
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
    return self._manager.restore(done, args=ocp.args.StandardRestore(like))["state"]

  def save(self, done: int, state: Any, seconds: float) -> None:
    """Writes a checkpoint in the background, from a copy: the state will be donated."""
    tree = {"state": _copy(state), "seconds": np.float64(seconds)}
    self._manager.save(done, args=ocp.args.StandardSave(tree))

  def close(self) -> None:
    """Waits until all is written."""
    self._manager.close()


@jax.jit
def _copy(state: Any) -> Any:
  """The same, which no step takes over."""
  return jax.tree.map(jnp.copy, state)


def latest_step(folder: Path) -> int:
  """The last step with a checkpoint; 0 if there is none."""
  return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)
