"""check_policy passes every policy there is, and finds what is wrong with broken ones."""

import dataclasses
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.errors import ConfigError, Q4JaxError
from q4jax.kv.policy import Needs, Policy, ScoreContext, get_policy, policy_names
from q4jax.testing import ContractError, check_policy, random_context

ROOT = Path(__file__).parents[2]
DISTINCT = sorted({type(get_policy(name)): name for name in policy_names()}.values())


@pytest.fixture(autouse=True)
def compile_in_haste() -> Iterator[None]:
  """Many small programs, each run a few times."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("name", DISTINCT)
def test_every_policy_keeps_the_contract(name: str) -> None:
  check_policy(get_policy(name))


@dataclass(frozen=True)
class OneScoreForAllHeads(Policy):
  def score(self, c: ScoreContext) -> jax.Array:
    return c.pos.astype(jnp.float32)


@dataclass(frozen=True)
class HalfPrecision(Policy):
  needs = Needs(keys=True)

  def score(self, c: ScoreContext) -> jax.Array:
    return jnp.sum(c.k, axis=-1).astype(jnp.float16)


@dataclass(frozen=True)
class LooksAtValues(Policy):
  needs = Needs(keys=True)

  def score(self, c: ScoreContext) -> jax.Array:
    norm = jnp.linalg.norm(c.k, axis=-1)
    return norm if norm.max() > 0 else -norm


@dataclass(frozen=True)
class MixesRows(Policy):
  needs = Needs(keys=True)

  def score(self, c: ScoreContext) -> jax.Array:
    return -jnp.linalg.norm(c.k - jnp.mean(c.k, axis=0, keepdims=True), axis=-1)


@dataclass(frozen=True)
class CountsEmptySlots(Policy):
  needs = Needs(keys=True)

  def score(self, c: ScoreContext) -> jax.Array:
    return -jnp.linalg.norm(c.k - jnp.mean(c.k, axis=2, keepdims=True), axis=-1)


@dataclass(frozen=True)
class Dice(Policy):
  def score(self, c: ScoreContext) -> jax.Array:
    return jnp.asarray(np.random.default_rng().random(c.shape), jnp.float32)


@dataclass(frozen=True)
class DividesByZero(Policy):
  needs = Needs(attn="window", window=4)

  def score(self, c: ScoreContext) -> jax.Array:
    oldest = c.group_mean(c.attn[:, :, 0])  # 0 for slots that are newer
    return oldest / oldest


@dataclass(frozen=True)
class ReadsUndeclared(Policy):
  needs = Needs(keys=True)

  def score(self, c: ScoreContext) -> jax.Array:
    return jnp.linalg.norm(c.k, axis=-1) * jnp.sum(c.v * 1.0, axis=-1)


@dataclass(frozen=True)
class HoldsAList(Policy):
  weights: list[float] = dataclasses.field(default_factory=lambda: [1.0])

  def score(self, c: ScoreContext) -> jax.Array:
    return jnp.ones(c.shape, jnp.float32)


@dataclass(frozen=True, eq=False)
class EqualsOthers(Policy):
  factor: float = 1.0

  def score(self, c: ScoreContext) -> jax.Array:
    return jnp.full(c.shape, self.factor, jnp.float32)


class Undecorated(Policy):
  def score(self, c: ScoreContext) -> jax.Array:
    return jnp.ones(c.shape, jnp.float32)


@dataclass(frozen=True)
class NegativeAmount(Policy):
  nonnegative = True
  needs = Needs(keys=True)

  def score(self, c: ScoreContext) -> jax.Array:
    return -jnp.linalg.norm(c.k, axis=-1)


@dataclass(frozen=True)
class NoFormula(Policy):
  pass


@pytest.mark.parametrize(
  ("policy", "says"),
  [
    (OneScoreForAllHeads(), r"returned float32\[3, 12\]; expected float32\[3, 2, 12\]"),
    (HalfPrecision(), r"returned float16"),
    (LooksAtValues(), "not under jax.jit"),
    (MixesRows(), "row 0, KV head 0, slot 0 .* with other rows"),
    (CountsEmptySlots(), "with 5 more empty slots"),
    (Dice(), "two scores for one context"),
    (DividesByZero(), "row 0, KV head 0, slot 9 as NaN"),
    (ReadsUndeclared(), "what its needs do not declare"),
    (HoldsAList(), "not hashable"),
    (EqualsOthers(), "EqualsOthers must be decorated"),
    (Undecorated(), "Undecorated must be decorated"),
    (NegativeAmount(), "nonnegative = True and scores row 0, KV head 0, slot 0 below 0"),
    (NoFormula(), "defines no score"),
  ],
  ids=lambda x: type(x).__name__ if isinstance(x, Policy) else "",
)
def test_finds_what_is_broken(policy: Policy, says: str) -> None:
  with pytest.raises(ContractError, match=says) as caught:
    check_policy(policy)
  assert isinstance(caught.value, Q4JaxError) and isinstance(caught.value, AssertionError)


def test_context_is_what_it_says() -> None:
  c = random_context([9, 6, 1], slots=10, window=4, seed=3)
  attn = np.asarray(c.attn)
  for row, n in enumerate((9, 6, 1)):
    length, pos = int(c.length[row]), np.asarray(c.pos)[row, :n]
    assert list(pos) == sorted(set(pos)) and pos[0] == 0 and pos[-1] == length - 1
    assert (length > n) == (row == 1)  # the second row has lost tokens
    for w in range(4):
      query, p = length - 4 + w, attn[row, :, w, :n]
      np.testing.assert_allclose(p.sum(-1), float(query >= 0), rtol=1e-6)
      assert (p[:, pos > query] == 0).all()
    assert np.isnan(attn[row, :, :, n:]).all()


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
  runpy.run_path(str(ROOT / "docs/examples/my_policy.py"), run_name="__main__")
  assert "LastAndLarge keeps the contract." in capsys.readouterr().out
  assert "last_and_large" in policy_names()


def test_policy_is_not_given_less_than_it_needs() -> None:
  c = random_context([5], slots=6, window=4)
  with pytest.raises(ConfigError, match="last 32 queries; attn of shape .* holds 4"):
    get_policy("snapkv")(c)
  with pytest.raises(ConfigError, match="needs k, which this ScoreContext lacks"):
    get_policy("knorm")(dataclasses.replace(c, k=None))
