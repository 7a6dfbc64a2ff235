"""MorphKV: Ghadia et al. 2025, arXiv 2503.00979."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv import checks
from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("morph")
@dataclass(frozen=True)
class Morph(Policy):
  """The most attention any of the last queries gave ("max fusion"; "sum fusion" is `threshold`)."""

  nonnegative = True
  window: int = 32

  def __post_init__(self) -> None:
    checks.whole(self, "window", at_least=1)

  @property
  def needs(self) -> Needs:
    return Needs(attn="window", window=self.window)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.attn is not None
    return c.group_mean(jnp.max(c.attn, axis=2))
