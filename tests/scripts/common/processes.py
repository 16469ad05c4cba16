"""Experiments on some of the devices, and on two processes that meet.

``python -m tests.scripts.common.processes MODULE FLAGS`` is one of them; the module has a small
experiment: ``Config``, ``run(config)``, ``make_small(setattr)`` and ``NUM_LINES``.
Nothing may be computed when either is imported: processes have not met yet.
"""

import functools
import importlib
import socket
import subprocess
import sys

import jax
import pandas as pd
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scripts.common import folder, study
from scripts.common.devices import Devices
from tests.scripts.common.stopped import environment, programs_kept, stopped_after

TIMES = [
  "seconds", "seconds_per_epoch", "seconds_per_step", "ms_per_step", "tokens_per_second",
  "temporary_bytes",
]  # fmt: skip


def some_devices(number):
  """The first devices of this process, as ``scripts.common.devices.all_devices`` has all."""
  kinds = (AxisType.Auto,) * 2
  some = jax.devices()[:number]
  mesh = jax.make_mesh((number, 1), ("data", "samples"), axis_types=kinds, devices=some)
  return Devices(NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec()))


def run_two(*program, devices_each):
  """What two processes say, of so many devices each: ``python -m program`` in all of them."""
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    address = f"localhost:{listener.getsockname()[1]}"
  flags = ["--coordinator-address", address, "--num-processes", "2", "--process-id"]
  command = [sys.executable, "-m", *map(str, program), *flags]
  its = environment()
  its["XLA_FLAGS"] = its["XLA_FLAGS"].replace("count=8", f"count={devices_each}")
  its["NPROC"] = "16"  # Threads of XLA: devices that wait for others would leave none to them.
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  processes = [subprocess.Popen([*command, str(i)], env=its, **pipes) for i in range(2)]
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  return outputs


def tables_of(path):
  """Lines and rows, without times."""
  tables = map(pd.DataFrame, folder.read(path)[:2])
  return [table.drop(columns=TIMES, errors="ignore") for table in tables]


def check_two_do_what_one_does(module, config, path, *, rtol=1e-4):
  """Two processes of two devices each, stopped and resumed, have what ``config`` has measured."""
  options = [*config.flags().split(), "--output-dir", path]
  outputs = run_two(__name__, module.__name__, *options, devices_each=2)
  assert ["results.csv and pictures are in" in output for output in outputs] == [True, False]
  for mine, of_one in zip(tables_of(path), tables_of(config.output_dir), strict=True):
    if "method" in of_one:
      of_one = of_one[of_one["method"].isin(config.methods)].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, of_one, rtol=rtol, atol=1e-5)
  [first, second] = pd.read_json(path / folder.CONFIG, typ="series")["runs"]
  assert (first["num_processes"], second["num_devices"]) == (2, 4)


@programs_kept()
def stop_and_resume(module, config):
  """A run that is stopped at its last line, and the rest of it."""
  module.make_small(setattr)
  with stopped_after(module.NUM_LINES):
    module.run(config)
  return module.run(config.but(resume=True))


if __name__ == "__main__":
  small = importlib.import_module(sys.argv.pop(1))
  study.main(small.Config, functools.partial(stop_and_resume, small), None)
