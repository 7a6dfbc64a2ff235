"""No program of generation holds a float copy of a quantised weight: read from what XLA compiled."""

import re
from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp
import pytest

import q4jax
from q4jax.engine.programs import Programs, new_state
from q4jax.engine.sampling import SamplingArrays, SamplingParams
from q4jax.model.model import Model
from q4jax_kernels import ffi
from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.int4_matmul import cpu

BATCH, SLOTS, WIDTH = 3, 48, 16


@pytest.fixture(scope="module")
def tiny() -> Model:
  if not ffi.available():
    pytest.skip("without the native kernels XLA dequantises: that is what the library is for")
  return q4jax.load("tiny")


def weight_sizes(model: Model) -> set[int]:
  """Elements of each quantised matrix, with and without the padding of its last tile."""
  import flax.nnx as nnx

  found = jax.tree.leaves(
    nnx.state(model.module), is_leaf=lambda leaf: isinstance(leaf, BlockArray)
  )
  arrays = [leaf for leaf in found if isinstance(leaf, BlockArray) and leaf.format != "f32"]
  assert len(arrays) >= 8
  return {
    n * k for w in arrays for k in [w.shape[1]] for n in (w.num_rows, -(-w.num_rows // 16) * 16)
  }


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


def float_copies(hlo: str, sizes: Sequence[int] | set[int]) -> list[str]:
  """The float types in a program's text that have as many elements as a weight."""
  shapes = set(re.findall(r"\b(?:f64|f32|bf16|f16)\[[\d,]+\]", hlo))
  return sorted(s for s in shapes if prod(map(int, s[s.index("[") + 1 : -1].split(","))) in sizes)


def test_programs_hold_no_float_copy(tiny: Model) -> None:
  sizes = weight_sizes(tiny)
  for name, program in compile_all(tiny).items():
    assert float_copies(program.as_text(), sizes) == [], name
    analysis = program.memory_analysis()
    assert analysis is not None
    # Activations alone: less than the smallest matrix would take as bfloat16.
    budget = 4 * BATCH * (WIDTH if name == "prefill" else 1)
    width = 4 * tiny.config.d_model + 4 * tiny.config.d_ffn + 4 * tiny.config.vocab_size
    assert analysis.temp_size_in_bytes <= budget * width, name


def test_the_search_finds_what_xla_makes(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(cpu, "supports", lambda ws: False)
  program = compile_all(tiny)["decode"]
  assert float_copies(program.as_text(), weight_sizes(tiny))
