"""Eight virtual devices, fast compilation, and jax at its strictest, for every test."""

import os

import jaxlib

flags = [
  os.environ.get("XLA_FLAGS", ""),
  "--xla_force_host_platform_device_count=8",
  # Compilation is most of the time of the tests; the code that it makes hardly runs.
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
]
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):  # Gone in later versions.
  flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ["MPLBACKEND"] = "Agg"

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.hookimpl(tryfirst=True)  # Before xdist reads the marks.
def pytest_collection_modifyitems(items):
  """Keeps the tests of a file on one worker: what one has compiled, the next one finds."""
  for item in items:
    if item.get_closest_marker("xdist_group") is None:
      item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(item.config.rootpath))))


@pytest.fixture
def x64():
  """Runs the test in double precision."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def as_users_run():
  """Switches the runtime type checks off, as they are outside of the tests.

  For tests of our own messages about arguments of the wrong type.
  """
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)
