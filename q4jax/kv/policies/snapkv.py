"""SnapKV: Li et al. 2024, arXiv 2404.14469."""

from dataclasses import dataclass

import jax

from q4jax.kv import checks, masked
from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
  """Mean attention of the last queries, max-pooled over `kernel` slots so that neighbours stay too.

  Heads are averaged before pooling. The paper leaves the window itself out of the pooling, as its
  slots always stay; so does `Protect(recent=...)` of window + kernel // 2 and more.
  """

  nonnegative = True
  window: int = 32
  kernel: int = 5

  def __post_init__(self) -> None:
    checks.whole(self, "window", at_least=1)
    checks.odd(self, "kernel")

  @property
  def needs(self) -> Needs:
    return Needs(attn="window", window=self.window)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.attn is not None
    return masked.max_pool(c.window_mean(c.attn), c.valid_heads, self.kernel)
