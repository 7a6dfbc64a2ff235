"""KeyDiff: Park et al. 2025, arXiv 2504.15364."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(Policy):
  """-cos(k, anchor), the anchor being the mean of the unit keys: keys unlike the others stay."""

  needs = Needs(keys=True)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.k is not None
    unit = _unit(c.k)  # 0 in slots that are not filled, so their sum is over the others
    # The mean differs from the sum by a factor only, and the cosine does not see it.
    anchor = _unit(jnp.sum(unit, axis=2, keepdims=True))
    return -jnp.sum(unit * anchor, axis=-1)


def _unit(x: jax.Array) -> jax.Array:
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.where(norm > 0, norm, 1.0)
