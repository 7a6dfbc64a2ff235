"""A Llama small enough to train in a test, as a float checkpoint."""

import jax
import numpy as np
import pytest

from q4jax.config import LlamaConfig
from q4jax.formats.checkpoint import Tensor
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.model.llama import Llama, random_params
from shared_data import ROOT


@pytest.fixture(scope="session")
def small() -> MemoryCheckpoint:
  """Random weights of std 0.2 with the vocabulary of `tiny`."""
  config = LlamaConfig(
    architecture="llama", vocab_size=4096, context_length=64, d_model=64, d_ffn=96, num_layers=2,
    num_heads=2, num_kv_heads=1, head_dim=32, tied=True,
  )  # fmt: skip
  with GGUFCheckpoint.open(ROOT / "experiments" / "tiny" / "tiny.f16.gguf") as tiny:
    memory = MemoryCheckpoint(config, tiny.metadata)
  draw = random_params(config, jax.random.key(0), 0.2)

  def make(name: str, shape: tuple[int, ...]) -> jax.Array:
    value = draw(name, shape)
    rows = np.asarray(value, np.float32).reshape(-1, shape[-1])
    memory.write(Tensor(name, shape, "f32"), rows.view(np.uint8))
    return value

  Llama(config, make)
  return memory


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
  """int32[8, 33]."""
  return np.random.default_rng(0).integers(1, 4096, (8, 33)).astype(np.int32)
