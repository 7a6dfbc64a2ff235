"""A small model with float weights, its file, and a calibration of it."""

from pathlib import Path

import numpy as np
import pytest

import gguf_model
import q4jax
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.model.model import Model
from q4jax.offline.calibrate import Options, calibrate
from q4jax.quant.grid import Grid

SPEC = gguf_model.ModelSpec(d_model=64, d_ffn=96, layers=2, heads=4, kv_heads=2, head_dim=16)


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return gguf_model.write(tmp_path_factory.mktemp("model") / "small.gguf", SPEC)


@pytest.fixture(scope="session")
def model(file: Path) -> Model:
  return q4jax.load(file)


@pytest.fixture(scope="session")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Inputs with zero points in 8 bits, keys and values in 4, and records of weights besides."""
  out = tmp_path_factory.mktemp("calibration")
  tokens = np.random.default_rng(0).integers(3, 290, (4, 32), dtype=np.int32)
  with GGUFCheckpoint.open(file) as source:
    options = Options(symmetric=False, kv_bits=4, grid=Grid(4, 32, "signed"))
    calibrate(source, tokens, out, options)
  return out
