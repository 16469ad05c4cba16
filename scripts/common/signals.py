"""What asks a run to stop: Ctrl-C, and SIGTERM, which clusters send.

While steps are done, the first signal waits for the end of a step, and a checkpoint is written
there; a second one, or a step that takes too long, stops the run at once.
"""

import contextlib
import signal
from collections.abc import Callable, Generator
from typing import Any

SECONDS = {signal.SIGINT: 2.0, signal.SIGTERM: 20.0}  # That a step has; clusters give 30 or more.


class _Asked:
  """The signal, which is noted: Python drops an exception that meets a callback."""

  number: int | None = None
  waits = False


def listen() -> None:
  """Makes signals ask."""
  for number in SECONDS:
    signal.signal(number, _stop)
  signal.signal(signal.SIGALRM, _stop_now)


@contextlib.contextmanager
def at_a_step() -> Generator[Callable[[], bool], None, None]:
  """Steps look whether they were asked to stop; at the end, ``KeyboardInterrupt`` if so."""
  _Asked.waits = True
  try:
    yield _asked
    if _asked():
      raise KeyboardInterrupt
  finally:
    _Asked.waits = False
    signal.setitimer(signal.ITIMER_REAL, 0)


def status() -> int:
  """The exit status after an interruption: 130 after Ctrl-C, 143 after SIGTERM."""
  return 128 + (_Asked.number or signal.SIGINT)


def forget() -> None:
  """Begins anew."""
  _Asked.number = None


def _asked() -> bool:
  if _Asked.number is None:
    return False
  signal.setitimer(signal.ITIMER_REAL, 0)  # The step has ended.
  return True


def _stop(number: int, _: Any) -> None:
  first, _Asked.number = _Asked.number is None, number
  if not (first and _Asked.waits):
    raise KeyboardInterrupt
  signal.setitimer(signal.ITIMER_REAL, SECONDS[signal.Signals(number)])


def _stop_now(*_: Any) -> None:
  raise KeyboardInterrupt
