"""What holds for every test: the backend, strict shapes, and hypothesis' manners."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Before jax is imported; child processes inherit it.

import hypothesis
import jax
import pytest

# A shape that fits only by implicit broadcasting is a bug more often than not.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Skips, saying so, the tests whose device is not here."""
  backend = jax.default_backend()
  for item in items:
    for device in ("gpu", "tpu"):
      if item.get_closest_marker(device) and backend != device:
        item.add_marker(pytest.mark.skip(reason=f"needs a {device}; jax runs on {backend}"))
