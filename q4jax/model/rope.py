"""Rotary position embedding, half-split: dimension i rotates with dimension i + H/2."""

import jax
import jax.numpy as jnp

from q4jax.config import LlamaConfig


def cos_sin(
  positions: jax.Array, config: LlamaConfig, factors: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """The rotation of each position: two float32[B, T, 1, H/2].

  Source: RoFormer (arXiv 2104.09864). `factors` float32[H/2] divide the frequencies; a GGUF of
  Llama 3 stores its scaling that way (`rope_freqs.weight`).

  Args:
    positions: int32[B, T], the true position of each token.
  """
  half = config.head_dim // 2
  exponent = jnp.arange(half, dtype=jnp.float32) / half
  freqs = jnp.float32(config.rope_theta) ** -exponent / config.rope_scale
  if factors is not None:
    freqs = freqs / factors
  angle = positions.astype(jnp.float32)[..., None, None] * freqs.reshape(1, 1, 1, half)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates x [B, T, heads, H]; computed in float32, returned in x's dtype."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
