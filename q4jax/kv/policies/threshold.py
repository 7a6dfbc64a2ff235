"""The owner's score: softmax attention of the last queries, averaged."""

from dataclasses import dataclass

import jax

from q4jax.kv import checks
from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("threshold")
@dataclass(frozen=True)
class Threshold(Policy):
  """Mean attention of the last `window` queries: what a threshold is laid on.

  With `MedianStd(alpha)` or `Quantile(q)` this is the rule as first written down; with
  `UnionRank(keep)` the same at an exact share of slots.
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
    return c.window_mean(c.attn)
