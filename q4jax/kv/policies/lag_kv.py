"""LagKV: Liang et al. 2025, arXiv 2504.04704."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv import checks, masked
from q4jax.kv.parts import pick, reduce
from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("lag_kv")
@dataclass(frozen=True)
class LagKV(Policy):
  """How unevenly a token's channels lie in the range of the next `lag` tokens, keys and values.

  Filled slots after the first `sink` are cut into parts of `lag`. In each part every channel is
  scaled to [0, 1] by its minimum and maximum in the next part; a token's deviation over channels
  goes through a softmax over its part; keys' and values' are averaged; the score is the rank in the
  part, in [0, 1). Sinks and the parts without a full next part have no reference: they score
  1 to 2, newer ones higher.
  """

  nonnegative = True
  needs = Needs(keys=True, values=True)
  lag: int = 128
  sink: int = 4

  def __post_init__(self) -> None:
    checks.whole(self, "lag", at_least=1)
    checks.whole(self, "sink", at_least=0)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.k is not None and c.v is not None
    count = jnp.sum(c.valid, axis=-1, keepdims=True)
    index = c.order - self.sink
    part = jnp.where(c.valid & (index >= 0), index // self.lag, -1)  # [B, S]
    judged = (part >= 0) & (part < (count - self.sink) // self.lag - 1)

    parts = c.shape[2] // self.lag + 1

    def uneven(x: jax.Array) -> jax.Array:
      channels = jnp.moveaxis(x, -1, 1)  # [B, H, K, S]
      low = pick(reduce(jax.ops.segment_min, channels, part, parts), part + 1)
      high = pick(reduce(jax.ops.segment_max, channels, part, parts), part + 1)
      scaled = (channels - low) / jnp.where(high > low, high - low, 1.0)
      deviation = jnp.where(judged[:, None, :], jnp.std(scaled, axis=1), 0.0)
      e = jnp.exp(deviation - pick(reduce(jax.ops.segment_max, deviation, part, parts), part))
      return e / pick(reduce(jax.ops.segment_sum, e, part, parts), part)

    both = (uneven(c.k) + uneven(c.v)) / 2
    within = masked.smaller_in_part(both, jnp.broadcast_to(part[:, None, :], both.shape))
    newness = 1 + c.order / jnp.maximum(count, 1)
    return jnp.where(judged[:, None, :], within / self.lag, newness[:, None, :])
