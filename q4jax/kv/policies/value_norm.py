"""The values' half of value-aware scores (VATP, arXiv 2406.12335), alone, as an ablation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("value_norm")
@dataclass(frozen=True)
class ValueNorm(Policy):
  """||v||: how much a slot can add to the output, whoever attends to it."""

  nonnegative = True
  needs = Needs(values=True)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.v is not None
    return jnp.linalg.norm(c.v, axis=-1)
