"""Eight virtual devices, fast compilation, and jax at its strictest, for every test."""

import ctypes
import gc
import os
import pathlib
import tempfile

import jaxlib

flags = [
  os.environ.get("XLA_FLAGS", ""),
  "--xla_force_host_platform_device_count=8",
  # Compilation is most of the time of the tests; the code that it makes hardly runs.
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",  # The workers share the cores; a fifth less to do.
]
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):  # Gone in later versions.
  flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ["MPLBACKEND"] = "Agg"

import jax
import jaxtyping
import pytest

gc.set_threshold(100_000, 20, 100)  # Traces make objects by the million: a twentieth of the time.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# Compiled programs are kept for the other workers and for later runs, in the user's own folder,
# since what is found there is executed. JAX's keys hold versions and flags, and its events count a
# program that is found as a compilation. Not set by the environment: what tests start shall run as
# users run it.
programs = pathlib.Path(tempfile.gettempdir()) / f"jaxbo_tests_{os.getuid()}_{jaxlib.__version__}"
programs.mkdir(mode=0o700, exist_ok=True)
if programs.stat().st_uid == os.getuid():
  jax.config.update("jax_compilation_cache_dir", str(programs))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)  # Before xdist reads the marks.
def pytest_collection_modifyitems(items):
  """Keeps the tests of a file on one worker: what one has compiled, the next one finds."""
  for item in items:
    if item.get_closest_marker("xdist_group") is None:
      item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(item.config.rootpath))))


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
  """Gives memory back when a file has ended and the programs have become many.

  Until then other files find them, above all the small ones of single operations.
  """
  yield
  if memory() > 1.2 * 2**30:  # The largest file adds half a GiB, and a worker gets 2 GiB at most.
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # of the GNU library
    trim(0)


def memory():
  """How many bytes of memory this process has; endless where the system does not say."""
  pages = pathlib.Path("/proc/self/statm")
  return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 2**63


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
