"""CurDKV, approximate CUR leverage of keys and values: arXiv 2509.15038."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv import checks
from q4jax.kv.parts import pick, reduce
from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("cur")
@dataclass(frozen=True)
class CUR(Policy):
  """||k||^2 ||v||^2, each as a share of its sum over a part of `local` consecutive filled slots."""

  nonnegative = True
  needs = Needs(keys=True, values=True)
  local: int = 16

  def __post_init__(self) -> None:
    checks.whole(self, "local", at_least=1)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.k is not None and c.v is not None
    part = jnp.where(c.valid, c.order // self.local, -1)
    parts = c.shape[2] // self.local + 1

    def share(x: jax.Array) -> jax.Array:
      square = jnp.sum(x * x, axis=-1)
      total = pick(reduce(jax.ops.segment_sum, square, part, parts), part)
      return square / jnp.where(total > 0, total, 1.0)

    return share(c.k) * share(c.v)
