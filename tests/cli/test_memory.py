"""What has been freed is given back when a program has been compiled, or found in the cache."""

import ctypes
import os
import runpy

import jax
import jax.numpy as jnp
import pytest

from q4jax.cli import memory


def test_after_every_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
  times: list[int] = []
  monkeypatch.setattr(memory, "_trim", times.append)
  for _ in range(3):  # as commands in one process do
    memory.give_back_after_compiling()
  twice = jax.jit(lambda x: 2 * x + 17)
  x = jnp.ones(3)
  before = len(times)
  twice(x)
  assert len(times) == before + 1 and set(times) == {0}
  twice(x)
  assert len(times) == before + 1


@pytest.mark.parametrize("system", ["posix", "nt"])
def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
  opened: list[object] = []
  monkeypatch.setattr(os, "name", system)
  monkeypatch.setattr(ctypes, "CDLL", opened.append)
  found = runpy.run_path(memory.__file__)
  assert found["_trim"] is None and len(opened) == (system == "posix")
  found["give_back"]()
