"""VATP, value-aware token pruning: Guo et al. 2024, arXiv 2406.12335."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("vatp", "value_h2o")
@dataclass(frozen=True)
class VATP(Policy):
  """Attention received per visit, times the L1 norm of the value."""

  nonnegative = True
  needs = Needs(attn="cumulative", values=True)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.v is not None
    return c.mean_mass() * jnp.sum(jnp.abs(c.v), axis=-1)
