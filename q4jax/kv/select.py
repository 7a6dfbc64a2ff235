"""From scores to one mask a layer and sequence: which slots stay.

Heads share their slots, so a slot stays if any head wants it (the union). Statistics are taken
over eligible slots only: a sink holds half of all attention, and would lift any threshold above
everything else. Protected slots, valid but not eligible, always stay.

NaN counts as -inf. Scores that are not finite stay out of means, medians and deviations: -inf is
below every threshold, +inf above. Of equally good slots the earlier one stays.
"""

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.kv import checks, masked
from q4jax.kv.registry import Registry

_Array = TypeVar("_Array", jax.Array, np.ndarray)

_SELECTS: Registry["Select"] = Registry("select")
register = _SELECTS.register


@dataclass(frozen=True)
class Select:
  """Chooses slots by score. Subclasses are frozen dataclasses that define `choose`.

  Attributes:
    amounts: whether scores must be 0 or more; `keep_mask` holds the policy to it.
  """

  @property
  def amounts(self) -> bool:
    return False

  def choose(
    self, score: jax.Array, eligible: jax.Array, protected: jax.Array, seen: jax.Array
  ) -> jax.Array:
    """bool[B, S]: slots worth keeping. What it says of slots that are not eligible is ignored.

    Args:
      score: float32[B, K, S] without NaN.
      eligible, protected: bool[B, 1, S], disjoint; a slot in neither is not filled.
      seen: int32[B], as in `__call__`.
    """
    raise NotImplementedError(f"{type(self).__name__} defines no choose(...).")

  def most(self, seen: np.ndarray) -> np.ndarray | None:
    """Known beforehand: no more slots than this stay, int[...], unless more are protected.

    It must not fall as `seen`, int[...], grows: caches are made as large as it says. None where
    it depends on the scores.
    """
    return None

  def __call__(
    self, score: jax.Array, eligible: jax.Array, valid: jax.Array, seen: jax.Array
  ) -> jax.Array:
    """keep bool[B, S] from score float32[B, K, S], eligible and valid bool[B, S].

    Args:
      seen: int32[B], tokens of each row that there have been, whether or not they were evicted
        before: shares are of these, or evicting again and again would leave ever less.
    """
    eligible = eligible & valid
    protected = valid & ~eligible
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    chosen = self.choose(score, eligible[:, None, :], protected[:, None, :], seen)
    return (chosen & eligible) | protected


def get_select(name: str, **options: Any) -> Select:
  """The rule of that name, e.g. `get_select("union_rank", keep=0.6)`; ConfigError as get_policy."""
  return _SELECTS.get(name, **options)


def select_names() -> list[str]:
  """All names `get_select` knows."""
  return _SELECTS.names()


@register("median_std")
@dataclass(frozen=True)
class MedianStd(Select):
  """Slots that any head finds above its median + alpha * standard deviation (population).

  How many that is depends on the scores' distribution; `UnionRank` is the same rule with the alpha
  that keeps a given share.
  """

  alpha: float = 0.5

  def __post_init__(self) -> None:
    checks.finite(self, "alpha")

  def choose(
    self, score: jax.Array, eligible: jax.Array, protected: jax.Array, seen: jax.Array
  ) -> jax.Array:
    counted = eligible & jnp.isfinite(score)
    tau = masked.median(score, counted) + self.alpha * masked.std(score, counted)
    return jnp.any(score > tau, axis=1)


@register("log_z")
@dataclass(frozen=True)
class LogZ(Select):
  """Slots whose log score any head finds more than alpha standard deviations above its mean.

  Attention spreads over more slots as a text grows; the spread of its logarithms stays. A score of
  0 is below any threshold.
  """

  alpha: float = 0.0

  def __post_init__(self) -> None:
    checks.finite(self, "alpha")

  @property
  def amounts(self) -> bool:
    return True

  def choose(
    self, score: jax.Array, eligible: jax.Array, protected: jax.Array, seen: jax.Array
  ) -> jax.Array:
    log, counted = _logarithm(score, eligible)
    tau = masked.mean(log, counted) + self.alpha * masked.std(log, counted)
    return jnp.any(log > tau, axis=1)


@register("quantile")
@dataclass(frozen=True)
class Quantile(Select):
  """Slots that any head finds above its quantile q (linear between order statistics, as NumPy's).

  K independent heads keep 1 - q^K of the slots; `UnionRank(by="rank")` is the same rule with the q
  that keeps a given share.
  """

  q: float = 0.75

  def __post_init__(self) -> None:
    checks.share(self, "q", one=False)

  def choose(
    self, score: jax.Array, eligible: jax.Array, protected: jax.Array, seen: jax.Array
  ) -> jax.Array:
    # The quantile lies at or after order statistic floor(q * (n - 1)) and before the next, so
    # above it are those with more slots below them than that. Integers: no tie is lost to rounding.
    last = jnp.maximum(jnp.sum(eligible, axis=(1, 2), dtype=jnp.int32) - 1, 0)
    return jnp.max(masked.smaller(score, eligible), axis=1) > _times(self.q, last)[:, None]


@register("top_p")
@dataclass(frozen=True)
class TopP(Select):
  """For each head the fewest slots that hold the share p of its eligible scores; their union.

  A head whose eligible scores are all 0 asks for nothing.
  """

  p: float = 0.95

  def __post_init__(self) -> None:
    checks.share(self, "p", one=True)

  @property
  def amounts(self) -> bool:
    return True

  def choose(
    self, score: jax.Array, eligible: jax.Array, protected: jax.Array, seen: jax.Array
  ) -> jax.Array:
    amount = jnp.where(eligible & (score > 0), score, 0.0)
    if self.p == 1:
      return jnp.any(amount > 0, axis=1)
    place = masked.first_in_order(amount, jnp.broadcast_to(eligible, amount.shape))
    _, ordered = jax.lax.sort((place, amount), dimension=-1, num_keys=1)
    # Held by the slots ahead of each.
    before = jnp.pad(jnp.cumsum(ordered, axis=-1)[..., :-1], ((0, 0), (0, 0), (1, 0)))
    count = jnp.sum(
      (before < self.p * jnp.sum(amount, axis=-1, keepdims=True)) & (ordered > 0),
      axis=-1,
      keepdims=True,
    )
    return jnp.any(place < count, axis=1)


By = Literal["zscore", "logz", "rank"]


@dataclass(frozen=True)
class _Best(Select):
  """The best slots by the head that likes each most, up to a number that `total` gives.

  zscore: u_j = max_h (a_hj - median_h) / std_h, so that u_j > alpha is "any head above tau".
  logz: the same with mean and deviation of log scores.
  rank: r_j = max_h (share of slots below a_hj), so that r_j > q is "any head above its quantile".
  """

  by: By = dataclasses.field(default="zscore", kw_only=True)

  def __post_init__(self) -> None:
    checks.one_of(self, "by", get_args(By))

  @property
  def amounts(self) -> bool:
    return self.by == "logz"

  def total(self, seen: _Array) -> _Array:
    """How many slots stay in all, int[...], of `seen` tokens int[...]; it never falls."""
    raise NotImplementedError

  def most(self, seen: np.ndarray) -> np.ndarray | None:
    return self.total(seen)

  def choose(
    self, score: jax.Array, eligible: jax.Array, protected: jax.Array, seen: jax.Array
  ) -> jax.Array:
    eligible, protected = eligible[:, 0], protected[:, 0]
    kept = jnp.sum(protected, axis=-1, dtype=jnp.int32)
    count = self.total(seen) - kept
    return masked.first_in_order(self._best(score, eligible), eligible) < count[:, None]

  def _best(self, score: jax.Array, eligible: jax.Array) -> jax.Array:
    eligible = eligible[:, None, :]
    if self.by == "rank":
      return jnp.max(masked.smaller(score, eligible), axis=1).astype(jnp.float32)
    if self.by == "logz":
      score, counted = _logarithm(score, eligible)
      centre = masked.mean(score, counted)
    else:
      counted = eligible & jnp.isfinite(score)
      centre = masked.median(score, counted)
    spread = masked.std(score, counted)
    # A head that likes all slots alike has no say.
    return jnp.max((score - centre) / jnp.where(spread > 0, spread, 1.0), axis=1)


@register("union_rank")
@dataclass(frozen=True)
class UnionRank(_Best):
  """Exactly ceil(keep * n) slots of a row that has seen n tokens, protected ones among them.

  `keep` is taken as the nearest fraction of a denominator up to 46340: 0.6 is 3/5, so 60 of 100
  slots stay, never 61. More stay only if more are protected, fewer if there are fewer. `by` as in
  `_Best`.
  """

  keep: float = 0.6

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.share(self, "keep", one=True)

  def total(self, seen: _Array) -> _Array:
    return _times(self.keep, seen, up=True)


@register("top_k")
@dataclass(frozen=True)
class TopK(_Best):
  """Exactly k slots of a row, protected ones among them; all of them if there are fewer."""

  k: int = 1024

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.whole(self, "k", at_least=1)

  def total(self, seen: _Array) -> _Array:
    return seen.clip(max=self.k)


def _logarithm(score: jax.Array, eligible: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logarithms, -inf of what is not above 0, and the slots whose logarithms are counted."""
  log = jnp.where(score > 0, jnp.log(jnp.where(score > 0, score, 1.0)), -jnp.inf)
  return log, eligible & jnp.isfinite(log)


def _times(share: float, n: _Array, up: bool = False) -> _Array:
  """floor(share * n), or ceil if `up`, exactly: n int, share a decimal such as 0.6."""
  # Denominators below 2^15.5 keep every product below 2^31.
  fraction = Fraction(str(float(share))).limit_denominator(46340)
  top, bottom = fraction.numerator, fraction.denominator
  return top * (n // bottom) + (top * (n % bottom) + (bottom - 1 if up else 0)) // bottom
