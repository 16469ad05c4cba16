"""Training that can be stopped at any moment and goes on bit for bit."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from scripts.common.checkpoints import Checkpoints


class Resumable:
  """A state, the step that changes it, and its checkpoints.

  Step ``t`` depends on the state and ``t`` alone, so a restored run goes on bit for bit.

  Attributes:
    state: a pytree of arrays.
    seconds: of training so far, without compilation and evaluation.
    checkpoints: of the state and the seconds.
  """

  def __init__(self, state: Any, checkpoints: Path):
    self.state = state
    self.seconds = 0.0
    self.checkpoints = Checkpoints(checkpoints)

  def advance(self, t: int) -> Any:
    """Does step ``t``: replaces ``state`` and returns the loss, on the device."""
    raise NotImplementedError

  def restore(self) -> int:
    """Goes back to the last checkpoint if there is one; returns the steps done."""
    self.state, self.seconds, done = self.checkpoints.restore(self.state)
    return done

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
        self.checkpoints.save(done, self.state, self.seconds)
