"""The baseline that knows nothing."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv import checks
from q4jax.kv.policy import Policy, ScoreContext, register


@register("random")
@dataclass(frozen=True)
class Random(Policy):
  """A number in [0, 1) that depends on the seed and a slot's position alone.

  The same at every call, in any batch, and in every head and layer: a token stays or goes whole.
  """

  nonnegative = True
  seed: int = 0

  def __post_init__(self) -> None:
    checks.whole(self, "seed", at_least=0)

  def score(self, c: ScoreContext) -> jax.Array:
    key = jax.random.key(self.seed % 2**32)
    draw = jax.vmap(jax.vmap(lambda pos: jax.random.uniform(jax.random.fold_in(key, pos))))
    return jnp.broadcast_to(draw(c.pos)[:, None, :], c.shape)
