"""Compiled programs that the tests of a module, and the processes they start, share."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest


@contextlib.contextmanager
def shared_programs(folder: Path) -> Iterator[None]:
  """Programs compiled inside, by child processes too, are kept in `folder` and found there."""
  options = {
    "jax_compilation_cache_dir": str(folder),
    "jax_persistent_cache_min_compile_time_secs": 0,
  }
  before = {name: jax.config.values[name] for name in options}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in options.items():
      patch.setenv(name.upper(), str(value))
      jax.config.update(name, value)
    yield
    for name, value in before.items():
      jax.config.update(name, value)
