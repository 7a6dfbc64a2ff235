"""Which slots stay: score, protect and select, put together: what the cache calls."""

import jax

from q4jax.errors import ConfigError
from q4jax.kv.policy import Policy, ScoreContext
from q4jax.kv.protect import Protect
from q4jax.kv.select import Select


def keep_mask(
  policy: Policy,
  select: Select,
  protect: Protect,
  context: ScoreContext,
  may_go: jax.Array | None = None,
) -> jax.Array:
  """bool[B, S], True for the slots of one layer that stay: pure, and static but for the arrays.

  Of `may_go` bool[B, S], where given, the others stay whatever their score, and count as kept.

  ConfigError if the context lacks what the policy needs, or if `select` needs amounts (scores of 0
  or more) and the policy's are not.
  """
  if select.amounts and not policy.nonnegative:
    raise ConfigError(
      f"{type(select).__name__} needs scores of 0 or more, and {type(policy).__name__} does not "
      "promise them (`nonnegative = True`). Choose UnionRank, TopK, MedianStd or Quantile, or a "
      "policy on attention."
    )
  protected = protect(context.pos, context.length, context.valid)
  eligible = context.valid & ~protected
  if may_go is not None:
    eligible = eligible & may_go
  return select(policy(context), eligible, context.valid, context.length)
