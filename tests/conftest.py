"""What holds for every test: the backend, strict shapes, shared programs, hypothesis' manners."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Before jax is imported; child processes inherit it.

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

# A shape that fits only by implicit broadcasting is a bug more often than not.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

# Folders whose tests compare bits or rounding: XLA compiles there as for users. Elsewhere it
# hurries: most of a test's time is compilation.
OPTIMIZED = ("aot", "calibrated", "kernels", "oracles", "qat", "quant")

# Every compiled program keeps some memory maps, and Linux ends a process's compilations, and so the
# process, at 65,530 of them (vm.max_map_count). Tests of drawn shapes get there in minutes.
MOST_MAPS = 16_000


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """Compiled programs are kept for the other workers of this run, and for child processes."""
  base = tmp_path_factory.getbasetemp()
  folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
  options = {
    "jax_compilation_cache_dir": str(folder / "programs"),
    "jax_persistent_cache_min_compile_time_secs": 0.05,  # Below, a file costs more than it saves.
  }
  with pytest.MonkeyPatch.context() as patch:
    for name, value in options.items():
      patch.setenv(name.upper(), str(value))
      jax.config.update(name, value)
    # Commands that run in this process would leave it behind, and every compilation pay for it.
    patch.setattr("q4jax.cli.memory._trim", None)
    yield


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
  """Without most optimisations, in child processes too, but for the modules of `OPTIMIZED`."""
  name = "jax_disable_most_optimizations"
  hurry = request.path.relative_to(Path(__file__).parent).parts[0] not in OPTIMIZED
  if jax.config.values[name] != hurry:
    jax.clear_caches()  # No program of the other kind is used again.
  jax.config.update(name, hurry)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(name.upper(), str(hurry))
    yield


def pytest_runtest_logfinish() -> None:
  """Forgets the compiled programs of this process before their memory maps run out."""
  if _maps() > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


def _maps() -> int:
  """The memory maps of this process; 0 where the system does not list them."""
  maps = Path("/proc/self/maps")
  return maps.read_bytes().count(b"\n") if maps.exists() else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Skips, saying so, the tests whose device is not here."""
  backend = jax.default_backend()
  for item in items:
    for device in ("gpu", "tpu"):
      if item.get_closest_marker(device) and backend != device:
        item.add_marker(pytest.mark.skip(reason=f"needs a {device}; jax runs on {backend}"))
