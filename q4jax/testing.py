"""Holds a policy of one's own to the contract: `check_policy(MyPolicy())`.

`random_context` makes what a policy is given, for tests of its values.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.errors import Q4JaxError
from q4jax.kv.policy import Needs, Policy, ScoreContext

Scorer = Callable[[ScoreContext], jax.Array]


class ContractError(Q4JaxError, AssertionError):
  """A policy breaks the contract of `q4jax.kv.policy`; the message says which part, and how."""


def check_policy(policy: Policy, rtol: float = 1e-4) -> None:
  """Checks that a policy may be handed to the cache; ContractError says what it breaks.

  It must be hashable and equal to its copies; give float32[B, K, S] without NaN, 0 or more if it
  says `nonnegative`; be the same compiled, and compile once; read only what its needs declare;
  be deterministic; and score a row alike whatever other rows and empty slots are beside it. It runs
  with several query heads for each KV head and with one, on rows of one slot, and on rows from
  which slots were evicted.

  Args:
    rtol: by how much scores that should be equal may differ, of the row's largest.
  """
  _check_static(policy)
  window = policy.needs.window
  c = random_context([12, 7, 1], slots=12, window=window, seed=1)
  score = _check_score(policy, policy, c)
  jitted = _check_compiled(policy, c, score, rtol)
  _check_score(policy, jitted, random_context([12, 7, 1], 12, heads=2, window=window, seed=2))
  _check_score(policy, jitted, random_context([1], slots=1, window=window, seed=3))
  _check_rows(policy, jitted, c, score, rtol)
  for slots, garbage in ((12, 1e4), (17, 0.0)):
    padded = random_context([12, 7, 1], slots, window=window, seed=1, garbage=garbage)
    what = f"with {slots - 12} more empty slots and {garbage} in all of them"
    _same(policy, what, score, _score(policy, jitted, padded)[:, :, :12], c, rtol)


def random_context(
  filled: Sequence[int],
  slots: int,
  *,
  heads: int = 4,
  kv_heads: int = 2,
  head_dim: int = 8,
  window: int = 4,
  seed: int = 0,
  garbage: float = float("nan"),
) -> ScoreContext:
  """A layer after a few evictions, with everything a policy may ask for.

  Args:
    filled: how many slots each row holds. Every second row has lost up to four tokens between its
      first and its last.
    garbage: what stands in slots that are not filled.
  """
  rng = np.random.default_rng(seed)
  rows = [_row(rng, n, i % 2, slots, heads, kv_heads, head_dim, window, garbage)
          for i, n in enumerate(filled)]  # fmt: skip
  arrays = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
  return ScoreContext(kv_heads=kv_heads, **arrays)


def _row(
  rng: np.random.Generator,
  n: int,
  holes: int,
  slots: int,
  heads: int,
  kv_heads: int,
  head_dim: int,
  window: int,
  garbage: float,
) -> dict[str, np.ndarray]:
  lost = int(rng.integers(1, 5)) if holes and n > 1 else 0
  length = n + lost
  inside = 1 + rng.permutation(max(length - 2, 0))[: max(n - 2, 0)]
  pos = np.sort([*inside, *{0, length - 1}]).astype(np.int32)
  q = rng.normal(size=(heads, length, head_dim))
  k, v = rng.normal(size=(2, kv_heads, n, head_dim)) * rng.uniform(0.5, 2, (1, kv_heads, n, 1))
  logits = q @ np.repeat(k, heads // kv_heads, axis=0).swapaxes(1, 2) / head_dim**0.5
  logits[:, np.arange(length)[:, None] < pos] = -np.inf
  attn = np.exp(logits - logits.max(-1, keepdims=True))
  attn /= attn.sum(-1, keepdims=True)
  last = min(window, length)

  def fill(x: np.ndarray, axis: int, size: int, value: float, front: bool = False) -> np.ndarray:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (size - x.shape[axis], 0) if front else (0, size - x.shape[axis])
    return np.pad(x.astype(np.float32), pad, constant_values=value)

  return {
    "pos": np.pad(pos, (0, slots - n), constant_values=10**6),
    "valid": np.arange(slots) < n,
    "length": np.array(length, np.int32),
    "k": fill(k, 1, slots, garbage),
    "v": fill(v, 1, slots, garbage),
    "attn": fill(fill(attn[:, -last:], 1, window, 0, front=True), 2, slots, garbage),
    "queries": fill(q[:, -last:], 1, window, 0, front=True),
    "mass": fill(attn.reshape(kv_heads, -1, length, n).mean(1).sum(1), 1, slots, garbage),
    "visits": fill(length - pos, 0, slots, garbage),
  }


def _check_static(policy: Policy) -> None:
  if not isinstance(policy.needs, Needs):
    raise ContractError(f"{policy}.needs is {policy.needs!r}; expected q4jax.kv.policy.Needs.")
  parameters = vars(type(policy)).get("__dataclass_params__")
  if parameters is None or not parameters.eq:
    raise ContractError(
      f"{type(policy).__name__} must be decorated with @dataclass(frozen=True), `eq` left alone: "
      "it would equal others of its class with other options, and be served their programs."
    )
  try:
    hash(policy)
  except TypeError as error:
    raise ContractError(f"{policy} is not hashable: {error}. Use tuples and numbers.") from error


def _check_score(policy: Policy, scorer: Scorer, c: ScoreContext) -> np.ndarray:
  score = _score(policy, scorer, c)
  valid = np.broadcast_to(np.asarray(c.valid_heads), score.shape)
  if np.isnan(score[valid]).any():
    raise ContractError(f"{policy} scores {_where(np.isnan(score) & valid)} as NaN.")
  if policy.nonnegative and (score[valid] < 0).any():
    raise ContractError(
      f"{policy} says nonnegative = True and scores {_where((score < 0) & valid)} below 0."
    )
  if not np.array_equal(score, _score(policy, scorer, c)):
    raise ContractError(f"{policy} gave two scores for one context. Take randomness from a seed.")
  return score


def _check_compiled(policy: Policy, c: ScoreContext, score: np.ndarray, rtol: float) -> Scorer:
  """Returns the compiled policy: what follows need not compile again."""
  traces = 0

  def call(policy: Policy, c: ScoreContext) -> jax.Array:
    nonlocal traces
    traces += 1
    return policy(c)

  jitted = jax.jit(call, static_argnums=0)
  try:
    compiled = np.asarray(jitted(policy, c))
  except Exception as error:
    raise ContractError(f"{policy} runs, but not under jax.jit: {error}") from error
  _same(policy, "compiled by jax.jit", score, compiled, c, rtol)
  other = dataclasses.replace(c, valid=c.valid.at[0, -1].set(False), length=c.length - 1)
  jitted(dataclasses.replace(policy), other)
  if traces != 1:
    raise ContractError(f"{policy} was traced {traces} times for contexts of the same shapes.")
  return functools.partial(jitted, policy)


def _check_rows(
  policy: Policy, scorer: Scorer, c: ScoreContext, score: np.ndarray, rtol: float
) -> None:
  """Rows get other rows beside them: as it would be alone, but nothing compiles anew."""
  others = random_context([3, 10, 5], slots=12, window=policy.needs.window, seed=4)
  for row in range(len(score)):
    mixed = jax.tree.map(lambda x, y, row=row: y.at[row].set(x[row]), c, others)
    beside = score.copy()
    beside[row] = _score(policy, scorer, mixed)[row]
    _same(policy, "with other rows in the batch", score, beside, c, rtol)


def _score(policy: Policy, scorer: Scorer, c: ScoreContext) -> np.ndarray:
  try:
    return np.asarray(scorer(c))
  except Exception as error:
    hint = "; does it read what its needs do not declare?" if "NoneType" in str(error) else ""
    raise ContractError(f"{policy} failed: {type(error).__name__}: {error}{hint}") from error


def _same(
  policy: Policy, what: str, a: np.ndarray, b: np.ndarray, c: ScoreContext, rtol: float
) -> None:
  valid = np.broadcast_to(np.asarray(c.valid_heads), a.shape)
  x, y = np.where(valid, a, 0.0), np.where(valid, b, 0.0)
  scale = np.max(np.abs(x), axis=-1, keepdims=True, initial=0, where=np.isfinite(x))
  with np.errstate(invalid="ignore"):
    differs = ~((x == y) | (np.abs(x - y) <= rtol * scale))
  if differs.any():
    at = tuple(int(i) for i in np.argwhere(differs)[0])
    raise ContractError(f"{policy} scores {_where(differs)} {a[at]}, but {b[at]} {what}.")


def _where(bad: np.ndarray) -> str:
  row, head, slot = np.argwhere(bad)[0]
  return f"row {row}, KV head {head}, slot {slot}"
