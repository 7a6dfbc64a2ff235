"""No program of generation holds a float copy of a quantised weight: what XLA compiled says so."""

import re
from math import prod

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import q4jax
from q4jax.engine.programs import Programs, new_state
from q4jax.engine.sampling import SamplingArrays, SamplingParams
from q4jax.model.model import Model
from q4jax_kernels import ffi
from q4jax_kernels.block_array import ROWS, BlockArray
from q4jax_kernels.int4_matmul import int4_matmul

BATCH, SLOTS, WIDTH = 3, 48, 16


@pytest.fixture(scope="module")
def tiny() -> Model:
  if not ffi.available():
    pytest.skip("without the native kernels XLA dequantises: that is what the library is for")
  return q4jax.load("tiny")


def weight_sizes(model: Model) -> set[int]:
  """Elements of each quantised matrix, with and without the padding of its last tile."""
  leaves = jax.tree.leaves(
    nnx.state(model.module), is_leaf=lambda leaf: isinstance(leaf, BlockArray)
  )
  shapes = [leaf.shape for leaf in leaves if isinstance(leaf, BlockArray)]
  assert len(shapes) >= 8
  return {rows * k for n, k in shapes for rows in (n, -(-n // ROWS) * ROWS)}


def compile_all(model: Model) -> dict[str, jax.stages.Compiled]:
  fresh = Programs.of(Model(model.module, model.tokenizer, {}, "copy"), logprobs=False)
  state = new_state(model.config, BATCH, SLOTS, jnp.float16)
  hidden = jnp.zeros((BATCH, model.config.d_model), jnp.float32)
  tokens, count = jnp.zeros((BATCH, WIDTH), jnp.int32), jnp.full(BATCH, WIDTH, jnp.int32)
  params = SamplingArrays.of([SamplingParams()] * BATCH)
  stop_ids = jnp.zeros(1, jnp.int32)
  return {
    "prefill": fresh.prefill.lower(model.leaves, state, tokens, count, hidden).compile(),
    "decode": fresh.decode.lower(model.leaves, state, params, stop_ids).compile(),
  }


def float_copies(hlo: str, sizes: set[int]) -> list[str]:
  """The float types in a program's text that have as many elements as a weight."""
  shapes = set(re.findall(r"\b(?:f64|f32|bf16|f16)\[[\d,]+\]", hlo))
  return sorted(s for s in shapes if prod(map(int, s[s.index("[") + 1 : -1].split(","))) in sizes)


def test_programs_hold_no_float_copy(tiny: Model) -> None:
  sizes = weight_sizes(tiny)
  for name, program in compile_all(tiny).items():
    assert float_copies(program.as_text(), sizes) == [], name
    analysis = program.memory_analysis()
    assert analysis is not None
    # Activations, and the vocabulary sorted for sampling: less than the embedding as bfloat16.
    assert analysis.temp_size_in_bytes < 2 * max(sizes), name


def test_the_search_finds_what_xla_makes(tiny: Model) -> None:
  module = tiny.module.blocks[0]
  leaves = jax.tree.leaves(nnx.state(module), is_leaf=lambda leaf: isinstance(leaf, BlockArray))
  w = next(leaf for leaf in leaves if isinstance(leaf, BlockArray))
  x = jnp.zeros((1, w.shape[1]))
  program = jax.jit(lambda x, w: int4_matmul(x, [w], "xla")).lower(x, w).compile()
  assert float_copies(program.as_text(), {w.shape[0] * w.shape[1]})
