"""Seconds to the first result: the programs run, and a full cache is read."""

import pytest

from benchmarks import first_result

pytestmark = pytest.mark.slow


def test_a_program_runs_with_a_cache_that_it_fills(tmp_path):
  command = [first_result.sys.executable, "-c", first_result.PROGRAMS["import optax"]]
  assert first_result.seconds(command, None) > 0
  program = "import jax; print(jax.jit(lambda x: x + 1)(1.0))"
  assert first_result.seconds([command[0], "-c", program], str(tmp_path)) > 0
  filled = {path.name for path in tmp_path.iterdir() if not path.name.endswith("-atime")}
  assert filled
  first_result.seconds([command[0], "-c", program], str(tmp_path))
  again = {path.name for path in tmp_path.iterdir() if not path.name.endswith("-atime")}
  assert again == filled  # Nothing was compiled that is not there.


def test_a_program_that_fails_is_not_timed():
  with pytest.raises(first_result.subprocess.CalledProcessError):
    first_result.seconds([first_result.sys.executable, "-c", "raise ValueError"], None)
