"""The layers of a Llama as Flax modules: a weight is a float array or a quantised matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from q4jax.config import LlamaConfig
from q4jax.model.caches import KVCache, Span, attend
from q4jax.model.calib import PLAIN, Plain, Slots
from q4jax.model.rope import rotate
from q4jax_kernels.attention import causal_attention
from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.int4_matmul import int4_matmul, take_rows
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.q4_array import Q4Array
from q4jax_kernels.row_planar_array import RowPlanarArray

Quantized = BlockArray | Q4Array | PlanarArray | RowPlanarArray
Weight = jax.Array | Quantized
# Supplies the parameter of a GGUF name, e.g. ("blk.0.attn_q.weight", (N * H, D)).
Make = Callable[[str, tuple[int, ...]], Weight]


class QWeight(nnx.Variable):
  """A frozen quantised matrix: saved and listed, never trained."""


def variable(value: Weight) -> nnx.Variable:
  """Wraps a parameter in the variable kind that says whether it can be trained."""
  return QWeight(value) if isinstance(value, Quantized) else nnx.Param(value)


@dataclass(frozen=True)
class Matmul:
  """How a model multiplies with its matrices.

  Attributes:
    dtype: of the operands where the matrix is of floats; sums are float32.
    implementation: of the int4 matmul where it is quantised; None takes the best there is.
  """

  dtype: DTypeLike = jnp.float32
  implementation: str | None = None

  def __call__(self, x: jax.Array, weights: list[nnx.Variable]) -> list[jax.Array]:
    """x [..., K] times the transpose of each weight [N, K]: a list of [..., N] in x's dtype.

    Quantised weights go through one call of the int4 matmul, which reads x once for all of them.
    """
    values = [w.get_value() for w in weights]
    if all(isinstance(w, Quantized) for w in values):
      return int4_matmul(x, values, self.implementation)
    return [self._one(x, w) for w in values]

  def _one(self, x: jax.Array, w: Weight) -> jax.Array:
    if isinstance(w, Quantized):
      return int4_matmul(x, [w], self.implementation)[0]
    return mixed_matmul(x, w, self.dtype).astype(x.dtype)

  def attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention without a cache: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]."""
    return causal_attention(q.astype(self.dtype), k.astype(self.dtype), v.astype(self.dtype))


FLOAT32 = Matmul()


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def mixed_matmul(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
  """x [..., K] times the transpose of w [N, K]: operands in `dtype`, float32 sums and result.

  The gradient's products take their operands in `dtype` too; JAX's own rule would multiply the
  float32 cotangent with them, which no matrix unit does.
  """
  return _dot("...k,nk->...n", x, w, dtype)


def _mixed_forward(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, tuple]:
  return mixed_matmul(x, w, dtype), (x, w)


def _mixed_backward(dtype: DTypeLike, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  dx = _dot("...n,nk->...k", dy, w, dtype).astype(x.dtype)
  dw = _dot("mn,mk->nk", dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), dtype)
  return dx, dw.astype(w.dtype)


mixed_matmul.defvjp(_mixed_forward, _mixed_backward)


def _dot(equation: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
  return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
  """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32."""

  def __init__(self, weight: Weight, eps: float):
    self.weight = variable(weight)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    weight = self.weight.get_value().astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(variance + self.eps) * weight.reshape((1,) * (x.ndim - 1) + (-1,))
    return y.astype(x.dtype)


class Attention(nnx.Module):
  """Grouped-query attention with RoPE; biases and q/k norms where the config has them."""

  def __init__(self, config: LlamaConfig, make: Make, layer: int, matmul: Matmul):
    c, prefix = config, f"blk.{layer}."
    q_dim, kv_dim = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    self.config, self.layer, self.matmul = config, layer, matmul
    self.slots: Slots | Plain = PLAIN
    self.q = variable(make(f"{prefix}attn_q.weight", (q_dim, c.d_model)))
    self.k = variable(make(f"{prefix}attn_k.weight", (kv_dim, c.d_model)))
    self.v = variable(make(f"{prefix}attn_v.weight", (kv_dim, c.d_model)))
    self.output = variable(make(f"{prefix}attn_output.weight", (c.d_model, q_dim)))
    if c.qkv_bias:
      self.q_bias = variable(make(f"{prefix}attn_q.bias", (q_dim,)))
      self.k_bias = variable(make(f"{prefix}attn_k.bias", (kv_dim,)))
      self.v_bias = variable(make(f"{prefix}attn_v.bias", (kv_dim,)))
    if c.qk_norm:
      self.q_norm = RMSNorm(make(f"{prefix}attn_q_norm.weight", (c.head_dim,)), c.norm_eps)
      self.k_norm = RMSNorm(make(f"{prefix}attn_k_norm.weight", (c.head_dim,)), c.norm_eps)

  def __call__(
    self,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: KVCache | None = None,
    span: Span | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """x [B, T, D] -> (y [B, T, D], cache). Without a cache, plain causal attention over T."""
    c, (b, t, _) = self.config, x.shape
    q, k, v = self.matmul(self.slots.input("attn_q", x), [self.q, self.k, self.v])
    if c.qkv_bias:
      q, k, v = (
        a + bias.get_value().astype(a.dtype).reshape(1, 1, -1)
        for a, bias in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
      )
    q = q.reshape(b, t, c.num_heads, c.head_dim)
    k = k.reshape(b, t, c.num_kv_heads, c.head_dim)
    v = v.reshape(b, t, c.num_kv_heads, c.head_dim)
    if c.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = self.slots.heads("key", k), self.slots.heads("value", v)
    if cache is None or span is None:
      out = self.matmul.attention(q, k, v)
    else:
      out, cache = attend(q, k, v, cache, span, self.layer)
    out = out.astype(x.dtype).reshape(b, t, c.num_heads * c.head_dim)
    return self.matmul(self.slots.input("attn_output", out), [self.output])[0], cache


class FeedForward(nnx.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  def __init__(self, config: LlamaConfig, make: Make, prefix: str, matmul: Matmul):
    self.matmul = matmul
    self.slots: Slots | Plain = PLAIN
    self.gate = variable(make(f"{prefix}ffn_gate.weight", (config.d_ffn, config.d_model)))
    self.up = variable(make(f"{prefix}ffn_up.weight", (config.d_ffn, config.d_model)))
    self.down = variable(make(f"{prefix}ffn_down.weight", (config.d_model, config.d_ffn)))

  def __call__(self, x: jax.Array) -> jax.Array:
    gate, up = self.matmul(self.slots.input("ffn_gate", x), [self.gate, self.up])
    return self.matmul(self.slots.input("ffn_down", jax.nn.silu(gate) * up), [self.down])[0]


class Embedding(nnx.Module):
  """Rows of the embedding table, and the output projection when it is tied."""

  def __init__(self, weight: Weight):
    self.weight = variable(weight)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """int32[B, T] -> float32[B, T, D]."""
    return take_rows(self.weight.get_value(), tokens)
