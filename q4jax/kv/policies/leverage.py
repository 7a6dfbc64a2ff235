"""Leverage of keys, Compactor's query-free score: Chari and Van Durme 2025, arXiv 2507.08143."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

from q4jax.kv import checks
from q4jax.kv.policy import Needs, Policy, ScoreContext, register


@register("leverage")
@dataclass(frozen=True)
class Leverage(Policy):
  """diag(X (X'X + lambda I)^-1 X'), X the centred keys: how hard a key is to make from the others.

  lambda is `ridge` times the mean of X'X's diagonal. Simplified: exact where the paper sketches,
  and on keys with RoPE, which are the ones that the cache holds.
  """

  nonnegative = True
  needs = Needs(keys=True)
  ridge: float = 0.01

  def __post_init__(self) -> None:
    checks.finite(self, "ridge", at_least=1e-4)  # below, float32 cannot factor singular X'X

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.k is not None
    filled = c.valid[:, None, :, None]
    count = jnp.maximum(jnp.sum(filled, axis=2, keepdims=True), 1)
    x = jnp.where(filled, c.k - jnp.sum(c.k, axis=2, keepdims=True) / count, 0.0)
    gram = jnp.einsum("bksh,bksi->bkhi", x, x)
    scale = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / x.shape[-1]
    eye = jnp.eye(x.shape[-1])[None, None]
    # Divided by its scale, so that neither a large nor an all-zero X'X is hard to factor.
    scaled = gram / jnp.where(scale > 0, scale, 1.0) + self.ridge * eye
    solved = cho_solve(cho_factor(scaled), x.swapaxes(-1, -2)).swapaxes(-1, -2)
    return jnp.sum(x * solved, axis=-1) / jnp.where(scale > 0, scale, 1.0)[..., 0]
