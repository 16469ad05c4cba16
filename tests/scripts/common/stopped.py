"""Runs that are stopped and go on, without much to compile."""

import contextlib
import os

import jax
import pytest

from scripts.common.folder import RunFolder
from scripts.common.study import Run


def environment():
  """Of a process that finds the programs that tests of this one have compiled."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


class StoppedError(Exception):
  """Ends a run as a kill does: it prints and draws nothing more."""


@contextlib.contextmanager
def programs_kept(kept=None, without=()):
  """Runs within share what the cells of a run do, programs above all: they are compiled once.

  They find it in ``kept``, and leave it there; but not what is named in ``without``.
  """
  kept, of_run = {} if kept is None else kept, Run.shared

  def shared(self, name, make):
    if name in without:
      return of_run(self, name, make)
    if name not in kept:
      kept[name] = make()
    return kept[name]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Run, "shared", shared)
    yield


@contextlib.contextmanager
def stopped_after(number):
  """The run within ends when it has so many lines, before it saves what they are of.

  That a kill does no more harm is shown in test_study.py.
  """
  add_lines = RunFolder.add_lines

  def add_and_stop(self, lines):
    add_lines(self, lines)
    if len(self.lines) >= number:
      raise StoppedError

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(RunFolder, "add_lines", add_and_stop)
    with pytest.raises(StoppedError):
      yield
