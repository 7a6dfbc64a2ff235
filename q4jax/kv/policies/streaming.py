"""StreamingLLM: Xiao et al. 2023, arXiv 2309.17453."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv.policy import Policy, ScoreContext, register


@register("streaming")
@dataclass(frozen=True)
class Streaming(Policy):
  """The newest slots stay; the first ones through `Protect.sink`.

  The paper numbers positions anew inside the cache; here slots keep their original ones.
  """

  nonnegative = True

  def score(self, c: ScoreContext) -> jax.Array:
    # Exact up to position 2^24.
    return jnp.broadcast_to(c.pos[:, None, :].astype(jnp.float32), c.shape)
