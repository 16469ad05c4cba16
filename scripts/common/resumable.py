"""Training that can be stopped at any moment and goes on bit for bit."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


class Resumable:
  """A state, the step that changes it, and its checkpoints.

  Step ``t`` depends on the state and ``t`` alone, so a restored run goes on bit for bit.

  Attributes:
    state: a pytree of arrays.
    seconds: of training so far, without compilation and evaluation.
    checkpoints: where states are kept.
  """

  def __init__(self, state: Any, checkpoints: Path):
    self.state = state
    self.seconds = 0.0
    self.checkpoints = ocp.CheckpointManager(
      checkpoints.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    )

  def advance(self, t: int) -> Any:
    """Does step ``t``: replaces ``state`` and returns the loss, on the device."""
    raise NotImplementedError

  def restore(self) -> int:
    """Goes back to the last checkpoint if there is one; returns the steps done."""
    done = self.checkpoints.latest_step()
    if done is None:
      return 0
    like = {"state": jax.tree.map(np.asarray, self.state), "seconds": np.float64(0)}
    restored = self.checkpoints.restore(done, args=ocp.args.StandardRestore(like))
    self.state, self.seconds = jax.device_put(restored["state"]), float(restored["seconds"])
    return done

  def save(self, done: int) -> None:
    """Writes a checkpoint in the background, from a copy: the state will be donated."""
    copy = jax.tree.map(lambda leaf: np.array(leaf, copy=True), self.state)
    tree = {"state": copy, "seconds": np.float64(self.seconds)}
    self.checkpoints.save(done, args=ocp.args.StandardSave(tree))

  def close(self) -> None:
    """Waits until all checkpoints are written."""
    self.checkpoints.close()

  def fit(
    self,
    done: int,
    num_steps: int,
    eval_every: int,
    checkpoint_every: int,
    on_step: Callable[[int], None] = lambda done: None,
  ) -> Iterator[tuple[int, float]]:
    """Trains; yields ``(steps done, loss)`` where an evaluation is due.

    ``on_step`` is called with the number of steps that the device has finished.
    A checkpoint of such a step is written afterwards, so that no evaluation is left out when the
    run is stopped in between. ``seconds`` counts the training alone.
    """
    while done < num_steps:
      every = (eval_every, checkpoint_every)
      stop = min(num_steps, *((done // n + 1) * n for n in every))
      start, loss = time.perf_counter(), jnp.nan
      while done < stop:
        before = loss
        loss = self.advance(done)
        jax.block_until_ready(before)  # One step waits while another runs.
        on_step(done)
        done += 1
      loss = float(loss)  # Waits for the device.
      self.seconds += time.perf_counter() - start
      if done % eval_every == 0 or done == num_steps:
        yield done, loss
      if done % checkpoint_every == 0 or done == num_steps:
        self.save(done)
