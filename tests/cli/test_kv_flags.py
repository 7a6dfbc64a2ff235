"""What the flags of the compressed cache describe."""

import pytest
from absl import flags as absl_flags

from kv_steps import dims
from q4jax.cli import kv
from q4jax.cli.parsing import UsageError
from q4jax.errors import ConfigError
from q4jax.kv.config import KVConfig
from q4jax.kv.policies.snapkv import SnapKV
from q4jax.kv.select import MedianStd, UnionRank


def parsed(*words: str) -> KVConfig | None:
  flags = absl_flags.FlagValues()
  kv.define(flags)
  flags(["q4jax", *words])
  return kv.config(flags)


def test_eviction() -> None:
  once = parsed("--keep=0.6")
  assert once is not None and once.evict_every == 0
  again = parsed("--keep=0.6", "--kv_evict_every=128")
  assert again is not None and again.evict_every == 128
  assert (again.policy, again.select) == (SnapKV(), UnionRank(0.6))
  rule = parsed("--kv_select=median_std", "--kv_alpha=1", "--kv_evict_every=64")
  assert rule is not None and (rule.select, rule.evict_every) == (MedianStd(1.0), 64)
  assert parsed() is None


def test_pool() -> None:
  flags = absl_flags.FlagValues()
  kv.define(flags)
  kv.define_pool(flags)
  flags(["q4jax", "--kv_bits=4", "--kv_pool_tokens=4096", "--kv_share_prefixes"])
  assert kv.pool(flags) == {"kv_pool_tokens": 4096, "share_prefixes": True}


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--kv_pool_tokens=64"], "--kv_pool_tokens is for a compressed cache"),
    (["--kv_bits=4", "--kv_share_prefixes"], "needs --kv_pool_tokens"),
    (["--keep=0.5", "--kv_pool_tokens=64", "--kv_share_prefixes"], "no --keep"),
  ],
)
def test_pool_misuse(words: list[str], said: str) -> None:
  flags = absl_flags.FlagValues()
  kv.define(flags)
  kv.define_pool(flags)
  flags(["q4jax", *words])
  with pytest.raises(UsageError, match=said):
    kv.pool(flags)


def test_misuse() -> None:
  with pytest.raises(UsageError, match="--kv_evict_every needs --keep=SHARE or --kv_select"):
    parsed("--kv_bits=4", "--kv_evict_every=64")
  odd = parsed("--keep=0.6", "--kv_evict_every=100")
  assert odd is not None
  with pytest.raises(ConfigError, match="evict_every is 100; expected 0 .* block_size of 32"):
    odd.check(dims())
