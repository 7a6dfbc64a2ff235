"""An eviction policy of one's own: one formula, checked against the contract.

  python docs/examples/my_policy.py

In a file of `q4jax/kv/policies/` it is found by its name; anywhere else, once it is imported.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv.policy import Needs, Policy, ScoreContext, register
from q4jax.testing import check_policy


@register("last_and_large")
@dataclass(frozen=True)
class LastAndLarge(Policy):
  """The attention of the last `window` queries, where the value is large enough to matter."""

  nonnegative = True  # an amount: shares and logarithms of it make sense
  window: int = 8
  power: float = 0.5

  @property
  def needs(self) -> Needs:
    return Needs(attn="window", window=self.window, values=True)

  def score(self, c: ScoreContext) -> jax.Array:  # float32[B, K, S], higher is more important
    return c.window_mean(c.attn) * jnp.linalg.norm(c.v, axis=-1) ** self.power


if __name__ == "__main__":
  check_policy(LastAndLarge())
  print("LastAndLarge keeps the contract.")
