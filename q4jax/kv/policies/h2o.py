"""H2O, heavy hitters: Zhang et al. 2023, arXiv 2306.14048."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv import checks
from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("h2o", "observed_attention")
@dataclass(frozen=True)
class H2O(Policy):
  """Attention a slot has received, per query that could have seen it.

  The paper sums without dividing (`divide=False`), which favours old slots and evicts each new one
  at once. Divided, it is what kvpress calls ObservedAttention. A mean over few visits is noise:
  keep `Protect.grace` at 16 or more.
  """

  nonnegative = True
  needs = Needs(attn="cumulative")
  divide: bool = True

  def __post_init__(self) -> None:
    checks.flag(self, "divide")

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.mass is not None
    return c.mean_mass() if self.divide else jnp.maximum(c.mass, 0.0)
