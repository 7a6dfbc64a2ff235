"""A whole model's prefill and decode for TPUs: by kernels; no matrix of floats, no scores."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from aot.devices import figures, float_sizes, on
from aot.weights import blocks
from q4jax.config import LlamaConfig
from q4jax.engine.programs import Programs, new_state
from q4jax.engine.sampling import SamplingArrays, SamplingParams
from q4jax.model.layers import Matmul
from q4jax.model.llama import Llama
from q4jax.model.model import Model
from q4jax_kernels.block_array import BlockArray, block_shape
from q4jax_kernels.planar_array import PlanarArray

# Llama 3.2 1B, with an output matrix of its own and fewer layers: all are alike.
CONFIG = LlamaConfig(
  architecture="llama",
  vocab_size=128256,
  context_length=131072,
  d_model=2048,
  d_ffn=8192,
  num_layers=2,
  num_heads=32,
  num_kv_heads=8,
  head_dim=64,
  rope_theta=500_000.0,
)
MATRICES = 7 * CONFIG.num_layers + 1
BATCH, SLOTS, CHUNK = 1, 768, 64  # A cache of another size than any weight.


def make(name: str, shape: tuple[int, ...]) -> jax.Array | BlockArray | PlanarArray:
  """A parameter, matrices without values, in the types of a Q4_K_M file."""
  if len(shape) == 1:
    return jnp.ones(shape, jnp.float32)
  n, k = shape
  if name == "token_embd.weight":  # only ever read by rows
    size, nbytes = block_shape("q6_k")
    return BlockArray(jax.ShapeDtypeStruct((n, k // size * nbytes), jnp.uint8), "q6_k", n)
  last = name in ("output.weight",) or name.endswith(("attn_v.weight", "ffn_down.weight"))
  return blocks("q6_k" if last else "q4_k", k, n)


@pytest.fixture(scope="module")
def model() -> Model:
  return Model(Llama(CONFIG, make, Matmul(jnp.bfloat16)), None, {}, "abstract")


def shape(dims: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(dims, dtype)


def arguments(program: str) -> tuple:
  """The program's arguments after the leaves, without values."""
  state = jax.eval_shape(lambda: new_state(CONFIG, BATCH, SLOTS, jnp.bfloat16))
  if program == "prefill":
    hidden = shape((BATCH, CONFIG.d_model), jnp.float32)
    return state, shape((BATCH, CHUNK), jnp.int32), shape((BATCH,), jnp.int32), hidden
  params = jax.eval_shape(lambda: SamplingArrays.of([SamplingParams()] * BATCH))
  return state, params, shape((2,), jnp.int32)


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_step(model: Model, program: str, record_property: Callable) -> None:
  function = getattr(Programs.of(model, logprobs=False), program)
  compiled = function.lower(*on((model.leaves, *arguments(program)), "v5e")).compile()
  found = figures(compiled)
  # Prefill samples nothing, so the output matrix is not part of it; each layer has its attention.
  expected = MATRICES - (program == "prefill") + CONFIG.num_layers
  assert compiled.as_text().count("tpu_custom_call") == expected
  weights = {(CONFIG.d_model, n) for n in (512, 2048, 8192, 128256)}
  assert not float_sizes(compiled) & {n * k for n, k in weights}, "a float copy of a weight"
  scores = BATCH * CONFIG.num_heads * (CHUNK if program == "prefill" else 1) * SLOTS
  assert scores not in float_sizes(compiled), "a matrix of scores"
  tokens = CHUNK if program == "prefill" else BATCH
  row = {"TPU": "v5e", "program": program, "layers": CONFIG.num_layers, "tokens": tokens}
  record_property("aot", row | found)
