"""Pages run as users write: operands may broadcast, which the library's own code may not."""

import jax
import pytest


@pytest.fixture(autouse=True)
def as_users_write():
  """Allows operands of different ranks."""
  with jax.numpy_rank_promotion("allow"):
    yield
