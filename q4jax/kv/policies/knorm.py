"""L2 norm of keys: Devoto et al. 2024, arXiv 2406.11430."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("knorm")
@dataclass(frozen=True)
class KNorm(Policy):
  """-||k||: keys of small norm are those that attention goes to."""

  needs = Needs(keys=True)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.k is not None
    return -jnp.linalg.norm(c.k, axis=-1)
