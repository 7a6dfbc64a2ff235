"""TOVA, token omission via attention: Oren et al. 2024, arXiv 2401.06104."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("tova")
@dataclass(frozen=True)
class TOVA(Policy):
  """Attention of the last query, averaged over all heads of the layer: one score for all heads."""

  nonnegative = True
  needs = Needs(attn="window", window=1)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.attn is not None
    return jnp.broadcast_to(jnp.mean(c.attn[:, :, -1], axis=1, keepdims=True), c.shape)
