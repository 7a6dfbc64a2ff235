"""Where tests find the real models, texts and vocabularies that live outside the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("Q4JAX_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def shared(name: str) -> Path:
  """The path of a shared data file; the test is skipped, saying so, where it is absent."""
  path = ROOT / name
  if not path.exists():
    pytest.skip(f"shared data file {name} is not here (looked in {ROOT})")
  return path
