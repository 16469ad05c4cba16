"""An experiment whose process is killed: ``python -m tests.scripts.common.killed 9 ROOM FLAGS``."""

import os
import runpy
import signal
import sys

import jax

from scripts.common.folder import RunFolder


def environment():
  """Of a process that finds the programs that tests of this one have compiled."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def kill_after(number):
  """From now on this process ends when its run has so many lines."""
  add_lines = RunFolder.add_lines

  def add_and_end(self, lines):
    add_lines(self, lines)
    if len(self.lines) >= number:
      os.kill(os.getpid(), signal.SIGKILL)

  RunFolder.add_lines = add_and_end


if __name__ == "__main__":
  kill_after(int(sys.argv.pop(1)))
  runpy.run_module(f"scripts.{sys.argv.pop(1)}", run_name="__main__")
