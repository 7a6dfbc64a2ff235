"""Llama (and Qwen 2 / 3) as one Flax module: tokens in, logits out, with or without a KV cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.config import LlamaConfig
from q4jax.model.caches import KVCache, Span
from q4jax.model.calib import PLAIN, Plain, Slots
from q4jax.model.layers import (
  FLOAT32,
  Attention,
  Embedding,
  FeedForward,
  Make,
  Matmul,
  Quantized,
  RMSNorm,
  variable,
)
from q4jax.model.rope import cos_sin


class Block(nnx.Module):
  """One transformer layer: x + attention(norm(x)), then x + ffn(norm(x))."""

  def __init__(self, config: LlamaConfig, make: Make, index: int, matmul: Matmul):
    prefix = f"blk.{index}."
    self.attn_norm = RMSNorm(make(f"{prefix}attn_norm.weight", (config.d_model,)), config.norm_eps)
    self.attn = Attention(config, make, index, matmul)
    self.ffn_norm = RMSNorm(make(f"{prefix}ffn_norm.weight", (config.d_model,)), config.norm_eps)
    self.ffn = FeedForward(config, make, prefix, matmul)

  def __call__(
    self,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: KVCache | None = None,
    span: Span | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    y, cache = self.attn(self.attn_norm(x), cos, sin, cache, span)
    x = x + y
    return x + self.ffn(self.ffn_norm(x)), cache


class Llama(nnx.Module):
  """A decoder-only transformer in the family of Llama.

  Weights are asked for by their GGUF names, so one constructor serves random initialisation,
  loading and abstract shapes. Matrices are [outputs, inputs], applied as `x @ W.T`.

  Args:
    config: dimensions and constants.
    make: `make(name, shape)` returns the parameter: a float array, or a quantised matrix.
    matmul: how matrices are multiplied. The residual stream is float32.
  """

  def __init__(self, config: LlamaConfig, make: Make, matmul: Matmul = FLOAT32):
    self.config, self.matmul = config, matmul
    self.slots: Slots | Plain = PLAIN
    self.embedding = Embedding(make("token_embd.weight", (config.vocab_size, config.d_model)))
    self.rope_factors = (
      variable(make("rope_freqs.weight", (config.head_dim // 2,))) if config.rope_factors else None
    )
    self.blocks = nnx.List(Block(config, make, i, matmul) for i in range(config.num_layers))
    self.output_norm = RMSNorm(make("output_norm.weight", (config.d_model,)), config.norm_eps)
    self.output = (
      None if config.tied else variable(make("output.weight", (config.vocab_size, config.d_model)))
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Causal logits without a cache: int32[B, T] -> float32[B, T, V]. Differentiable."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32).reshape(1, -1)
    cos, sin = self._rope(positions)
    x = self.embedding(tokens)
    for block in self.blocks:
      x, _ = block(x, cos, sin)
    return self.unembed(self.output_norm(x))

  def hidden(self, tokens: jax.Array, cache: KVCache, span: Span) -> tuple[jax.Array, KVCache]:
    """The normalised last hidden state, float32[B, T, D], and the updated cache.

    Args:
      tokens: int32[B, T]; row b holds `span.length[b]` real tokens, the rest is padding, neither
        stored nor attended to.
      cache: of all layers.
      span: where the tokens lie.
    """
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32).reshape(1, -1)
    cos, sin = self._rope(positions + span.start.reshape(-1, 1))
    x = self.embedding(tokens)
    for block in self.blocks:
      x, new = block(x, cos, sin, cache, span)
      assert new is not None
      cache = new
    return self.output_norm(x), cache

  def _rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    # They are constants of the model, not parameters: no gradient.
    factors = (
      None if self.rope_factors is None else jax.lax.stop_gradient(self.rope_factors.get_value())
    )
    return cos_sin(positions, self.config, factors)

  def unembed(self, x: jax.Array) -> jax.Array:
    """Logits float32[..., V] of normalised hidden states [..., D]."""
    head = self.embedding.weight if self.output is None else self.output
    return self.matmul(self.slots.input("output", x), [head])[0].astype(jnp.float32)


def random_params(config: LlamaConfig, key: jax.Array, std: float = 0.02) -> Make:
  """A `make` that draws matrices from N(0, std^2), output layers scaled by 1/sqrt(2 L) as in GPT-2.

  Norms are ones, biases zeros. Each parameter's draw depends only on the key and its name.
  """

  def make(name: str, shape: tuple[int, ...]) -> jax.Array:
    if name == "rope_freqs.weight" or "norm" in name:
      return jnp.ones(shape, jnp.float32)
    if name.endswith(".bias"):
      return jnp.zeros(shape, jnp.float32)
    residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
    scale = std / (2 * config.num_layers) ** 0.5 if residual else std
    seed = jax.random.fold_in(key, sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
    return scale * jax.random.normal(seed, shape, jnp.float32)

  return make


def num_params(model: Llama) -> int:
  """The number of weights, quantised ones counted as values rather than bytes."""
  leaves = jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, Quantized))
  return sum(int(jnp.prod(jnp.array(leaf.shape))) for leaf in leaves)
