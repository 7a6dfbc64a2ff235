"""A Llama small enough to train in a test, as a float checkpoint."""

from pathlib import Path

import jax
import numpy as np
import pytest

from q4jax.config import LlamaConfig
from q4jax.formats.checkpoint import Tensor
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.model.llama import Llama, random_params

ROOT = Path(__file__).parents[2]


def checkpoint() -> MemoryCheckpoint:
  """Random weights of std 0.2 with the vocabulary of `tiny`."""
  config = LlamaConfig(
    architecture="llama", vocab_size=4096, context_length=64, d_model=64, d_ffn=96, num_layers=2,
    num_heads=2, num_kv_heads=1, head_dim=32, norm_eps=9.999999747378752e-06, tied=True,
  )  # fmt: skip
  with GGUFCheckpoint.open(ROOT / "experiments" / "tiny" / "tiny.f16.gguf") as tiny:
    sizes = {
      "context_length": 64, "embedding_length": 64, "feed_forward_length": 96, "block_count": 2,
      "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 32,
      "attention.value_length": 32, "rope.dimension_count": 32,
    }  # fmt: skip
    metadata = {**tiny.metadata, **{f"llama.{k}": v for k, v in sizes.items()}}
    memory = MemoryCheckpoint(config, metadata)
  draw = random_params(config, jax.random.key(0), 0.2)

  def make(name: str, shape: tuple[int, ...]) -> jax.Array:
    value = draw(name, shape)
    rows = np.asarray(value, np.float32).reshape(-1, shape[-1])
    memory.write(Tensor(name, shape, "f32"), rows.view(np.uint8))
    return value

  Llama(config, make)
  return memory


@pytest.fixture(scope="session")
def small() -> MemoryCheckpoint:
  return checkpoint()


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
  """int32[8, 33]."""
  return np.random.default_rng(0).integers(1, 4096, (8, 33)).astype(np.int32)
