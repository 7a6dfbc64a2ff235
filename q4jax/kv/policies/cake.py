"""The eviction indicator of CAKE: Qin et al. 2025, arXiv 2503.12491."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv import checks
from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("cake")
@dataclass(frozen=True)
class CAKE(Policy):
  """Mean plus gamma times the (population) variance of the attention of the last queries.

  Slots whose importance shifts over time get a bonus. The paper's budgets for each layer are no
  matter of scores and not part of this, nor is its average pooling.
  """

  nonnegative = True
  window: int = 32
  gamma: float = 200.0

  def __post_init__(self) -> None:
    checks.whole(self, "window", at_least=1)
    checks.finite(self, "gamma", at_least=0)

  @property
  def needs(self) -> Needs:
    return Needs(attn="window", window=self.window)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.attn is not None
    rows = c.window_rows()[:, None, :, None]
    count = jnp.maximum(jnp.sum(rows, axis=2, keepdims=True), 1)
    mean = jnp.sum(c.attn, axis=2, keepdims=True) / count
    return c.window_mean(mean + self.gamma * (c.attn - mean) ** 2)
