"""What has been freed is given back when a program has been compiled, or found in the cache."""

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


def test_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(memory, "_trim", None)
  memory.give_back()
