"""Plants small errors in the library, one after the other, and reports which the tests overlook.

A mutation is an entry of ``mutations.toml``, which lies beside this file::

  [[mutation]]
  file = "jaxbo/_tree.py"
  old = "jnp.sqrt(vdot(tree, tree))"  # must stand in the file exactly once
  new = "vdot(tree, tree)"
  tests = "tests/test_tree.py -k inner_products"  # what guards it: arguments of pytest

Every mutation is written into a copy of the repository in a temporary folder, never into the
repository itself; then pytest runs its tests until the first failure. Tests that fail have *killed*
the mutation; a mutation whose tests pass has *survived*: it is an error that nobody would see. The
tests are also run without any mutation first, since a test that fails anyway kills nothing.

Compiled programs are kept in JAX's persistent cache, so that a mutation costs what it changes. All
of them take some ten minutes on one quiet core::

  python -m tests.tools.mutate results.json              # all
  python -m tests.tools.mutate results.json -k dro       # those whose file or tests contain "dro"
  python -m tests.tools.mutate results.json --check      # does every mutation fit the sources?

Use it before and after a change of the tests: no more mutations may survive than before. The exit
status is 1 if one survived or does not fit.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import time
import tomllib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
# Every run is a fork of a process that has imported what does not change, and finds the programs
# that were compiled before: tests/conftest.py keeps them in the temporary folder, here one for
# mutations alone.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "jax", "optax", "chex", "flax.linen", "scipy.stats"])
TEMPORARY = pathlib.Path(tempfile.gettempdir()) / f"jaxbo_mutations_{os.getuid()}"


class Mutation(NamedTuple):
  """An entry of ``mutations.toml``; see the top of this file."""

  file: str
  old: str
  new: str
  tests: str

  @property
  def title(self) -> str:
    """The file and what is put there, in one line."""
    return f"{self.file}: {' '.join(self.old.split())} -> {' '.join(self.new.split()) or 'nothing'}"


def load(path: pathlib.Path, keyword: str = "") -> list[Mutation]:
  """The mutations of a file whose text contains ``keyword``."""
  entries = [Mutation(**entry) for entry in tomllib.loads(path.read_text())["mutation"]]
  return [entry for entry in entries if keyword in " ".join(entry)]


def misfits(mutations: list[Mutation], root: pathlib.Path) -> list[str]:
  """What is wrong with mutations: text that is not in its file exactly once, or no change."""
  errors = []
  for mutation in mutations:
    count = (root / mutation.file).read_text().count(mutation.old)
    if count != 1:
      errors.append(f"{mutation.title}: the old text stands there {count} times, not once")
    if mutation.old == mutation.new:
      errors.append(f"{mutation.title}: changes nothing")
    for path in mutation.tests.split(" -")[0].split():
      if not (root / path).exists():
        errors.append(f"{mutation.title}: there is no {path}")
  return errors


def _run_pytest(root: pathlib.Path, tests: str, output: pathlib.Path) -> None:
  """What a fork does; its exit status is that of pytest."""
  import pytest

  with output.open("w") as file:
    for descriptor in (1, 2):
      os.dup2(file.fileno(), descriptor)
  os.chdir(root)
  # Bytecode is found by the time and the size of a source, which a mutation may leave as they were.
  sys.dont_write_bytecode = True
  sys.path[:0] = [str(root), str(root / "models")]
  for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
    del sys.modules[name]  # This file is in a package of the repository; the copy has its own.
  options = ["-x", "-q", "--no-header", "--numprocesses=0", "-p", "no:cacheprovider"]
  status = int(pytest.main([*options, *shlex.split(tests)]))
  sys.stdout.flush()
  os._exit(status)


def run_tests(root: pathlib.Path, tests: str, timeout: float) -> tuple[str, str]:
  """Runs pytest; returns ``passed``, ``failed``, ``timeout`` or ``broken``, and its last lines."""
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / "output"
    process = FORKS.Process(target=_run_pytest, args=(root, tests, output))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
      process.kill()
      process.join()
      return "timeout", f"no end after {timeout:g} s"
    lines = output.read_text().splitlines()
  # An error of collection (2) is a failure: the library could not even be imported.
  outcome = {0: "passed", 1: "failed", 2: "failed"}.get(process.exitcode, "broken")
  return outcome, "\n".join([x for x in lines if x.startswith(("FAILED", "ERROR"))] or lines[-3:])


def try_one(mutation: Mutation, root: pathlib.Path, timeout: float) -> dict[str, object]:
  """Plants a mutation in the copy, runs its tests, and restores the file."""
  path, begin = root / mutation.file, time.monotonic()
  original = path.read_text()
  path.write_text(original.replace(mutation.old, mutation.new))
  try:
    outcome, last_lines = run_tests(root, mutation.tests, timeout)
  finally:
    path.write_text(original)
  verdict = {"passed": "survived", "broken": "broken"}.get(outcome, "killed")
  seconds = round(time.monotonic() - begin, 1)
  return {"verdict": verdict, "seconds": seconds, "by": last_lines, **mutation._asdict()}


def main(arguments: list[str] | None = None) -> int:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("results", type=pathlib.Path, help="a JSON file to write")
  parser.add_argument("-k", default="", metavar="TEXT", help="only mutations that contain TEXT")
  parser.add_argument("--check", action="store_true", help="run nothing, look at the sources")
  parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="the repository to copy")
  parser.add_argument("--no-first-run", action="store_true", help="the tests pass, I know")
  parser.add_argument("--timeout", type=float, default=180.0, help="seconds for a mutation's tests")
  parser.add_argument(
    "--mutations", type=pathlib.Path, default=pathlib.Path(__file__).with_name("mutations.toml")
  )
  options = parser.parse_args(arguments)
  mutations = load(options.mutations, options.k)
  if errors := misfits(mutations, options.root):
    print("\n".join(errors))
    return 1
  if options.check:
    return 0

  rows = []
  TEMPORARY.mkdir(mode=0o700, exist_ok=True)
  os.environ["TMPDIR"] = str(TEMPORARY)
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / "jaxbo"
    ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "_build", ".*_cache")
    shutil.copytree(options.root, copy, ignore=ignore)
    failing = {}
    selections = () if options.no_first_run else dict.fromkeys(m.tests for m in mutations)
    for tests in selections:
      outcome, last_lines = run_tests(copy, tests, 10 * options.timeout)
      if outcome != "passed":
        failing[tests] = last_lines
        print(f"{outcome} without a mutation: {tests}\n{last_lines}", flush=True)
    for number, mutation in enumerate(mutations, 1):
      row = {"verdict": "broken", "by": failing.get(mutation.tests), **mutation._asdict()}
      if mutation.tests not in failing:
        row = try_one(mutation, copy, options.timeout)
      rows.append(row)
      print(f"{number}/{len(mutations)} {row['verdict']}: {mutation.title}", flush=True)
      options.results.write_text(json.dumps(rows, indent=1) + "\n")
  counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
  print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
  return int(counts["killed"] < len(rows))


VERDICTS = ("killed", "survived", "broken")

if __name__ == "__main__":
  sys.exit(main())
