"""What tests of damage and of faults share."""

import pytest

from tests.scripts.common.sums import files_of, play


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
  """The files of a run that nothing disturbed."""
  path = tmp_path_factory.mktemp("whole")
  assert play(path) == 0
  return files_of(path)
