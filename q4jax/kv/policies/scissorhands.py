"""Scissorhands: Liu et al. 2023, arXiv 2305.17118."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv import checks
from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("scissorhands")
@dataclass(frozen=True)
class Scissorhands(Policy):
  """How many of the last queries found a slot pivotal: gave it more than 1 / (slots they saw).

  The paper counts this per head; heads of a group are averaged here.
  """

  nonnegative = True
  window: int = 32

  def __post_init__(self) -> None:
    checks.whole(self, "window", at_least=1)

  @property
  def needs(self) -> Needs:
    return Needs(attn="window", window=self.window)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.attn is not None
    query = c.length[:, None] + jnp.arange(-self.window, 0, dtype=jnp.int32)[None]  # [B, W]
    seen = c.valid[:, None, :] & (c.pos[:, None, :] <= query[:, :, None])
    count = jnp.maximum(jnp.sum(seen, axis=-1), 1)[:, None, :, None]
    return c.window_mean((c.attn * count > 1).astype(jnp.float32))
