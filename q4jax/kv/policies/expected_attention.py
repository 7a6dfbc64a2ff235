"""Expected Attention: Devoto et al. 2025, arXiv 2510.00636."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.kv import checks, masked
from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(Policy):
  """softmax_j(mu.k_j / sqrt(H) + k_j.Sigma.k_j / 2H) * ||v_j||: attention of a Gaussian query.

  mu and Sigma are mean and covariance of the queries, so this is log E[exp(q.k / sqrt(H))] for
  normal q. Averaged over the heads of a group, plus `epsilon`, before the values' norms.

  Simplified: the paper takes queries before RoPE and rotates their mean by the average of the next
  512 positions' rotations. Here the last `window` queries keep their own rotations, which stand in
  for those of the next positions. mu.k and k.Sigma.k are mean and variance of the queries' logits,
  so Sigma is never built.
  """

  nonnegative = True
  window: int = 64
  epsilon: float = 0.0

  def __post_init__(self) -> None:
    checks.whole(self, "window", at_least=1)
    checks.finite(self, "epsilon", at_least=0)

  @property
  def needs(self) -> Needs:
    return Needs(window=self.window, keys=True, values=True, queries=True)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.k is not None and c.v is not None and c.queries is not None
    q = c.queries.reshape(c.shape[0], c.kv_heads, -1, *c.queries.shape[2:])
    logits = jnp.einsum("bkgwh,bksh->bkgsw", q, c.k) * c.k.shape[-1] ** -0.5
    rows = c.window_rows()[:, None, None, None, :]
    expected = masked.mean(logits, rows) + masked.std(logits, rows) ** 2 / 2
    p = masked.softmax(expected[..., 0], c.valid_heads[:, :, None, :])
    return (jnp.mean(p, axis=2) + self.epsilon) * jnp.linalg.norm(c.v, axis=-1)
