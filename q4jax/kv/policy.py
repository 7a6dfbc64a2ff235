"""How important is each slot of the KV cache: the contract between the cache and a policy.

A policy is a formula: from what one layer holds, a score for every slot and KV head. Which slots
stay is decided elsewhere (`select.py`), as is which may not be touched (`protect.py`). To write
one, see `docs/examples/my_policy.py`; `q4jax.testing.check_policy` holds it to this contract.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from q4jax.errors import ConfigError
from q4jax.kv import checks
from q4jax.kv.registry import Registry


@dataclass(frozen=True)
class Needs:
  """What a policy must be given; the rest of its `ScoreContext` is None.

  Attributes:
    attn: "window" for the probabilities of the last `window` queries, "cumulative" for `mass` and
      `visits`, or "none".
    window: how many of the last queries `attn` and `queries` hold.
    keys, values, queries: whether `k`, `v`, `queries` are needed.
  """

  attn: Literal["none", "window", "cumulative"] = "none"
  window: int = 32
  keys: bool = False
  values: bool = False
  queries: bool = False

  def __post_init__(self) -> None:
    checks.one_of(self, "attn", ("none", "window", "cumulative"))
    checks.whole(self, "window", at_least=1)
    for name in ("keys", "values", "queries"):
      checks.flag(self, name)

  @property
  def arrays(self) -> tuple[str, ...]:
    """The fields of `ScoreContext` that are needed, beside those that are always there."""
    wanted = {
      "k": self.keys,
      "v": self.values,
      "attn": self.attn == "window",
      "queries": self.queries,
      "mass": self.attn == "cumulative",
      "visits": self.attn == "cumulative",
    }
    return tuple(name for name, needed in wanted.items() if needed)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreContext:
  """What a policy may know of one layer. Slots of a row lie in the order of their positions.

  B rows, S slots, K KV heads, N query heads (N / K adjacent ones share a KV head), H head size.

  Attributes:
    pos: int32[B, S], the position in the text each slot was written for; evicted ones are missing.
    valid: bool[B, S], slots that are filled. `Policy.__call__` sets all else of the others to 0.
    length: int32[B], tokens seen so far, evicted ones too: the position of the next token.
    kv_heads: K, static.
    k, v: float[B, K, S, H], RoPE applied.
    attn: float32[B, N, W, S], softmax probabilities of the last W queries; the last row is the
      newest query. Rows of queries that do not exist are all 0.
    queries: float[B, N, W, H], the same queries, RoPE applied; 0 where they do not exist.
    mass: float32[B, K, S], attention each slot has received, summed over queries (perhaps with
      decay), averaged over the query heads of its group.
    visits: float32[B, S], how many queries could have seen the slot, with the same decay.
  """

  pos: jax.Array
  valid: jax.Array
  length: jax.Array
  kv_heads: int = dataclasses.field(metadata={"static": True})
  k: jax.Array | None = None
  v: jax.Array | None = None
  attn: jax.Array | None = None
  queries: jax.Array | None = None
  mass: jax.Array | None = None
  visits: jax.Array | None = None

  @property
  def shape(self) -> tuple[int, int, int]:
    """(B, K, S), the shape of a score."""
    return (self.valid.shape[0], self.kv_heads, self.valid.shape[1])

  @property
  def valid_heads(self) -> jax.Array:
    """`valid` for each head, bool[B, 1, S]: it broadcasts against a score."""
    return self.valid[:, None, :]

  @property
  def order(self) -> jax.Array:
    """int32[B, S]: a valid slot's index among the valid ones of its row."""
    return jnp.cumsum(self.valid, axis=-1, dtype=jnp.int32) - 1

  def group_mean(self, x: jax.Array) -> jax.Array:
    """Mean over the query heads of each KV head: [B, N, ...] -> [B, K, ...]."""
    b, n, *rest = x.shape
    return jnp.mean(x.reshape(b, self.kv_heads, n // self.kv_heads, *rest), axis=2)

  def window_rows(self) -> jax.Array:
    """Which of the W last queries exist, bool[B, W]."""
    if self.attn is not None:  # Probabilities of a query that exists are not 0 in any head.
      return jnp.any(self.attn[:, 0] != 0, axis=-1)
    if self.queries is None:
      raise ConfigError("window_rows() needs attn='window' or queries=True in the policy's needs.")
    return jnp.any(self.queries != 0, axis=(1, 3))

  def window_mean(self, x: jax.Array) -> jax.Array:
    """Mean over the queries of the window that exist, then over heads: [B, N, W, S] -> [B, K, S].

    Slots inside the window are seen by only some of its queries and score low; protect at least
    that many recent slots.
    """
    rows = self.window_rows()[:, None, :, None]
    count = jnp.maximum(jnp.sum(rows, axis=2), 1)
    return self.group_mean(jnp.sum(jnp.where(rows, x, 0.0), axis=2) / count)

  def mean_mass(self) -> jax.Array:
    """Attention received per query that could have seen the slot, [B, K, S]; 0 if none could."""
    if self.mass is None or self.visits is None:
      raise ConfigError("mean_mass() needs attn='cumulative' in the policy's needs.")
    visits = self.visits[:, None, :]
    return jnp.where(visits > 0, self.mass / jnp.where(visits > 0, visits, 1.0), 0.0)

  def given(self, needs: Needs) -> "ScoreContext":
    """This context as a policy with these needs sees it.

    What it does not need is None, what it needs is float32, 0 in slots that are not filled, and
    of the last `needs.window` queries only. ConfigError if something needed is absent.
    """
    slots = {
      "k": self.valid[:, None, :, None],
      "v": self.valid[:, None, :, None],
      "attn": self.valid[:, None, None, :],
      "mass": self.valid[:, None, :],
      "visits": self.valid,
    }
    arrays: dict[str, Any] = dict.fromkeys(("k", "v", "attn", "queries", "mass", "visits"))
    for name in needs.arrays:
      x = getattr(self, name)
      if x is None:
        raise ConfigError(f"The policy needs {name}, which this ScoreContext lacks.")
      if name in ("attn", "queries"):
        if x.shape[2] < needs.window:
          raise ConfigError(
            f"The policy needs the last {needs.window} queries; {name} of shape {x.shape} holds "
            f"{x.shape[2]}. Hand over window={needs.window}, rows of 0 where there are no queries."
          )
        x = x[:, :, -needs.window :]
      x = x.astype(jnp.float32)
      # Slots never written may hold anything, NaN included, and 0 * NaN is NaN.
      arrays[name] = jnp.where(slots[name], x, 0.0) if name in slots else x
    return dataclasses.replace(self, pos=jnp.where(self.valid, self.pos, 0), **arrays)


@dataclass(frozen=True)
class Policy:
  """Scores slots. Subclasses are frozen dataclasses, so that a policy may be static under jit.

  Attributes:
    nonnegative: whether scores are amounts, 0 or more, of which shares and logarithms make sense.
  """

  nonnegative: ClassVar[bool] = False

  @property
  def needs(self) -> Needs:
    """What `score` reads. A subclass may also write `needs = Needs(...)`."""
    return Needs()

  def score(self, c: ScoreContext) -> jax.Array:
    """The formula: float32[B, K, S], higher is more important. Invalid slots may get anything.

    Rows of the batch must not influence each other, nor invalid slots the others.
    """
    raise NotImplementedError(f"{type(self).__name__} defines no score(c).")

  def __call__(self, c: ScoreContext) -> jax.Array:
    """`score` on what the policy needs, -inf in invalid slots. ConfigError on a wrong shape."""
    score = self.score(c.given(self.needs))
    if score.shape != c.shape or score.dtype != jnp.float32:
      raise ConfigError(
        f"{type(self).__name__}.score returned {score.dtype}{list(score.shape)}; expected "
        f"float32{list(c.shape)}, one number for each row, KV head and slot."
      )
    return jnp.where(c.valid_heads, score, -jnp.inf)


_POLICIES: Registry[Policy] = Registry("policy", folder="q4jax.kv.policies")
register = _POLICIES.register


def get_policy(name: str, **options: Any) -> Policy:
  """The policy of that name, e.g. `get_policy("snapkv", window=64)`.

  ConfigError names the nearest names or options there are, or the rule an option breaks.
  """
  return _POLICIES.get(name, **options)


def policy_names() -> list[str]:
  """All names `get_policy` knows, aliases among them."""
  return _POLICIES.names()
