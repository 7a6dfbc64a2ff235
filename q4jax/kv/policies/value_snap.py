"""SnapKV weighted by the values' norms, as VATP weights H2O (arXiv 2406.12335)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv.policies.snapkv import SnapKV
from q4jax.kv.policy import Needs, ScoreContext, register


@register("value_snap")
@dataclass(frozen=True)
class ValueSnap(SnapKV):
  """Pooled attention of the last queries times ||v||: what a slot adds to the output."""

  @property
  def needs(self) -> Needs:
    return Needs(attn="window", window=self.window, values=True)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.v is not None
    return super().score(c) * jnp.linalg.norm(c.v, axis=-1)
