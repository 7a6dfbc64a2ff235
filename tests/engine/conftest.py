"""A small random model with a byte-level SPM vocabulary, quantised as a Q4_K_M file would be."""

import dataclasses

import jax
import numpy as np
import pytest

from q4jax.config import LlamaConfig
from q4jax.model.llama import Llama, Make
from q4jax.model.model import Model
from q4jax.quant.kquants import quantize
from q4jax.text.tokenizer import Tokenizer
from q4jax_kernels import ffi
from q4jax_kernels.block_array import ROWS, BlockArray, interleave_tile

# <unk>, <s>, </s>, then one token for each byte.
VOCAB = 3 + 256
CONFIG = LlamaConfig(
  architecture="llama",
  vocab_size=VOCAB,
  context_length=512,
  d_model=256,
  d_ffn=256,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  tied=True,
)


def tokenizer() -> Tokenizer:
  return Tokenizer.from_gguf_metadata(
    {
      "tokenizer.ggml.model": "llama",
      "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)],
      "tokenizer.ggml.scores": np.zeros(VOCAB, np.float32),
      "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256, np.int32),
      "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2,
      "tokenizer.ggml.unknown_token_id": 0,
    }
  )


def random_weights(seed: int, quantized: bool = True) -> Make:
  """Matrices in Q4_K (Q6_K for the embedding) or f32, in the layout of this machine's kernels."""
  rng = np.random.default_rng(seed)

  def make(name: str, shape: tuple[int, ...]) -> jax.Array | BlockArray:
    if len(shape) == 1:
      return jax.numpy.ones(shape, jax.numpy.float32)
    values = rng.normal(0, 0.15, shape).astype(np.float32)
    format = "q6_k" if name == "token_embd.weight" else "q4_k"
    format = format if quantized else "f32"
    rows = quantize(values, format) if quantized else values.view(np.uint8)
    if not ffi.available():
      return BlockArray(jax.numpy.asarray(rows), format, shape[0])
    tiles = np.zeros((-(-shape[0] // ROWS), ROWS * rows.shape[1]), np.uint8)
    for i, tile in enumerate(tiles):
      interleave_tile(rows[i * ROWS : (i + 1) * ROWS], format, tile)
    return BlockArray(jax.numpy.asarray(tiles), format, shape[0], "x16")

  return make


@pytest.fixture(scope="session")
def float_model() -> Model:
  """Float weights: no activation is rounded to int8, so that two ways of computing agree closely.

  With rounding, a difference in the last bit can flip an int8 and move a logit by a percent.
  """
  return Model(Llama(CONFIG, random_weights(0, quantized=False)), tokenizer(), {}, "random")


@pytest.fixture(scope="session")
def long_model() -> Model:
  """One layer and one head, but 8192 tokens."""
  config = dataclasses.replace(
    CONFIG, context_length=8192, d_model=64, d_ffn=64, num_layers=1, num_heads=1, num_kv_heads=1
  )
  return Model(Llama(config, random_weights(0, quantized=False)), tokenizer(), {}, "random")


@pytest.fixture(scope="session")
def model() -> Model:
  return Model(Llama(CONFIG, random_weights(0)), tokenizer(), {}, "random")
