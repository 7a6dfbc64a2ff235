"""The embedded model as it is trained: `Llama`, with dropout and a choice of attention."""

import sys
from typing import Literal

import jax
import jax.numpy as jnp

from q4jax.config import LlamaConfig
from q4jax.model.layers import Attention as AttentionLayer
from q4jax.model.layers import Matmul
from q4jax.model.llama import Llama, random_params
from q4jax.model.rope import cos_sin, rotate
from q4jax_kernels.attention import causal_attention

Params = dict[str, jax.Array]
Attention = Literal["xla", "cudnn"]  # Implementations of jax.nn.dot_product_attention.


def initial_params(config: LlamaConfig, seed: int) -> Params:
  """Every parameter by its GGUF name."""
  params: Params = {}
  make = random_params(config, jax.random.key(seed))

  def record(name: str, shape: tuple[int, ...]) -> jax.Array:
    params[name] = make(name, shape)  # type: ignore[assignment]
    return params[name]

  Llama(config, record)
  return params


def forward(
  params: Params,
  config: LlamaConfig,
  tokens: jax.Array,
  dtype: jnp.dtype,
  attention: Attention = "xla",
  key: jax.Array | None = None,
  rate: float = 0.0,
) -> jax.Array:
  """Logits float32[B, T, V] as `Llama.__call__` gives them, but for dropout where a key is given.

  Args:
    params: every parameter by its GGUF name.
    tokens: int32[B, T].
    dtype: of the matmuls.
    rate: of dropout.
  """
  model = Llama(config, lambda name, shape: params[name], Matmul(dtype))
  positions = jnp.arange(tokens.shape[1], dtype=jnp.int32).reshape(1, -1)
  cos, sin = cos_sin(positions, config, None)

  def drop(x: jax.Array, place: int) -> jax.Array:
    if key is None:
      return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)

  x = drop(model.embedding(tokens), 0)
  for i, block in enumerate(model.blocks):
    x = x + drop(_attend(block.attn, block.attn_norm(x), cos, sin, attention), 2 * i + 1)
    x = x + drop(block.ffn(block.ffn_norm(x)), 2 * i + 2)
  return model.unembed(model.output_norm(x))


def _attend(
  attn: AttentionLayer, x: jax.Array, cos: jax.Array, sin: jax.Array, implementation: Attention
) -> jax.Array:
  """`Attention.__call__` without a cache, with a choice of implementation."""
  c, (b, t, _) = attn.config, x.shape
  q, k, v = (y.reshape(b, t, -1, c.head_dim) for y in attn.matmul(x, [attn.q, attn.k, attn.v]))
  q, k = rotate(q, cos, sin), rotate(k, cos, sin)
  q, k, v = (y.astype(attn.matmul.dtype) for y in (q, k, v))
  if implementation == "cudnn":
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
  else:
    y = _blockwise_attention(q, k, v)
  return attn.matmul(y.astype(x.dtype).reshape(b, t, -1), [attn.output])[0]


def _blockwise_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Causal attention a quarter of the queries at a time, without the keys that come after them.

  That is 5/8 of the products and of the memory that the whole square would take.
  """
  size = -(-q.shape[1] // 4)
  starts = range(0, q.shape[1], size)
  blocks = [
    causal_attention(q[:, i : i + size], k[:, : i + size], v[:, : i + size]) for i in starts
  ]
  return jnp.concatenate(blocks, axis=1)


def pick_attention(name: str) -> Attention:
  """The implementation to use; "auto" tries cuDNN's flash attention and says if it is not there."""
  if name == "xla":
    return "xla"
  if name == "cudnn":
    return "cudnn"
  x = jnp.ones((1, 256, 4, 128), jnp.bfloat16)

  def total(x: jax.Array) -> jax.Array:
    kv = x[:, :, :2]
    return jax.nn.dot_product_attention(x, kv, kv, is_causal=True, implementation="cudnn").sum()

  try:
    jax.block_until_ready(jax.jit(jax.grad(total))(x))
    return "cudnn"
  except Exception as error:  # Whatever cuDNN or XLA raise where it is missing.
    print(f"no cuDNN attention ({str(error)[:100]!r}); using XLA's, slower", file=sys.stderr)
    return "xla"
