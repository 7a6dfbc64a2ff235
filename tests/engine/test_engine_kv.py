"""The engine over a compressed cache: it says the same however the work is cut up."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from q4jax.engine import Completion, Engine, Timing
from q4jax.engine.programs import Programs
from q4jax.errors import ConfigError
from q4jax.kv import cache as kv_cache
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import TopP, UnionRank
from q4jax.model.model import Model
from q4jax_kernels.kv_format import KVFormat

FLOAT = KVFormat(32)
PLAIN = KVConfig(FLOAT, FLOAT, protect=Protect(sink=4, recent=8, grace=0), block_size=16)
EVICT = KVConfig(
  KVFormat(8, 32),
  KVFormat(4, 32),
  rotate=True,
  policy=get_policy("snapkv", window=8),
  select=UnionRank(0.5),
  protect=Protect(sink=4, recent=8, grace=0),
  block_size=16,
)
PROMPTS = [[1, *range(60, 60 + n)] for n in (1, 37, 90)]  # one is shorter than the sinks
TOKENS = 40  # two spills


def tokens_of(completion: Any) -> list[list[int]]:
  assert all(isinstance(c, Completion) for c in completion)
  return [c.tokens for c in completion]


@pytest.fixture(scope="module")
def engine(float_model: Model) -> Engine:
  return Engine(float_model, kv_dtype="f32", kv=EVICT)


@pytest.fixture(scope="module")
def batch(engine: Engine) -> list[Completion]:
  result = engine.generate(PROMPTS, max_tokens=TOKENS, temperature=0)
  assert isinstance(result, list)
  return result


def test_floats_without_a_policy_say_what_the_dense_cache_says(float_model: Model) -> None:
  said = [
    tokens_of(
      Engine(float_model, kv_dtype="f32", kv=kv).generate(PROMPTS, max_tokens=TOKENS, temperature=0)
    )
    for kv in (PLAIN, None)
  ]
  assert said[0] == said[1]


def test_alone_as_in_a_batch(engine: Engine, batch: list[Completion]) -> None:
  (alone,) = engine.generate(PROMPTS[2:], max_tokens=TOKENS, temperature=0)
  assert alone.tokens == batch[2].tokens


def test_eviction_shows(float_model: Model, batch: list[Completion]) -> None:
  dense = Engine(float_model, kv_dtype="f32").generate(PROMPTS, max_tokens=TOKENS, temperature=0)
  assert tokens_of(dense)[2] != batch[2].tokens


def test_chunks_of_prefill_change_nothing(float_model: Model, batch: list[Completion]) -> None:
  """The window of queries spans chunks."""
  chunked = Engine(float_model, kv_dtype="f32", kv=EVICT, prefill_chunk=32)
  said = chunked.generate(PROMPTS, max_tokens=TOKENS, temperature=0)
  assert tokens_of(said) == [c.tokens for c in batch]


def test_streaming_is_generating(engine: Engine, batch: list[Completion]) -> None:
  timing = Timing()
  tokens: list[list[int]] = [[] for _ in PROMPTS]
  for chunk in engine.stream(PROMPTS, max_tokens=TOKENS, temperature=0, timing=timing):
    if chunk.token is not None:
      tokens[chunk.index].append(chunk.token)
    assert timing.kv is not None
  assert tokens == [c.tokens for c in batch]
  assert timing.kv == batch[0].timing.kv


def test_usage(batch: list[Completion]) -> None:
  use = batch[0].timing.kv
  assert use is not None
  # The last token of each is sampled, and never stored.
  end = [len(p) + len(c.tokens) - 1 for p, c in zip(PROMPTS, batch, strict=True)]
  assert [len(c.tokens) for c in batch] == [TOKENS] * 3, "none has stopped"
  assert use.seen == sum(end)
  # Half of 91; of 38 the 22 that do not leave the dense part; of 2 all.
  kept = 46 + 22 + 2
  assert use.kept == kept + 3 * (TOKENS - 1)
  assert use.blocks * 16 >= 2 * (use.kept - 3 * (4 + 8 + 16))
  assert use.keep_ratio < 1 and use.compression > 1


def test_usage_of_rows_that_end_before_others(float_model: Model) -> None:
  engine = Engine(float_model, kv_dtype="f32", kv=EVICT, max_context=100)
  said = engine.generate(PROMPTS, max_tokens=TOKENS, temperature=0)
  assert [len(c.tokens) for c in said] == [TOKENS, TOKENS, 9]
  assert said[0].timing.kv is not None
  assert said[0].timing.kv.seen == 2 + 38 + 91 + 39 + 39 + 8


class Stopping:
  """A tokenizer with other stop tokens."""

  def __init__(self, tokenizer: Any, *stop_ids: int) -> None:
    self.stop_ids, self._tokenizer = frozenset(stop_ids), tokenizer

  def __getattr__(self, name: str) -> Any:
    return getattr(self._tokenizer, name)


def test_usage_of_a_row_that_a_stop_token_ends(
  engine: Engine, batch: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
  """The stop token is sampled, and never stored."""
  says = batch[2].tokens
  end = next(t for t in says[8:] if t not in batch[0].tokens + batch[1].tokens)
  stopping = Stopping(engine.model.tokenizer, end)
  monkeypatch.setattr(engine.model, "tokenizer", stopping)
  said = engine.generate(PROMPTS, max_tokens=TOKENS, temperature=0)
  assert [len(c.tokens) for c in said] == [TOKENS, TOKENS, says.index(end) + 1]
  assert said[0].timing.kv is not None
  assert said[0].timing.kv.seen == 2 + 38 + 91 + 39 + 39 + says.index(end)
  (alone,) = engine.generate(PROMPTS[2:], max_tokens=TOKENS, temperature=0)
  assert alone.timing.kv is not None and alone.timing.kv.seen == 91 + says.index(end)


def test_one_token(engine: Engine, batch: list[Completion]) -> None:
  said = engine.generate(PROMPTS, max_tokens=1, temperature=0)
  assert tokens_of(said) == [c.tokens[:1] for c in batch]
  use = said[0].timing.kv
  assert use is not None and use.seen == sum(map(len, PROMPTS))


def test_a_closed_stream_and_the_next_call(engine: Engine, batch: list[Completion]) -> None:
  stream = engine.stream(PROMPTS, max_tokens=TOKENS, temperature=0)
  next(stream)
  stream.close()
  (again,) = engine.generate(PROMPTS[2:], max_tokens=TOKENS, temperature=0)
  assert again.tokens == batch[2].tokens


def test_nothing_compiles_whatever_is_evicted(float_model: Model) -> None:
  fresh = Model(float_model.module, float_model.tokenizer, {}, "fresh")
  compiled = []
  for seed in range(2):
    # Other prompts of other lengths, so other tokens go; the policies take turns.
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 250, n - 3 * seed).tolist() for n in (60, 90)]
    kv = replace(EVICT, policy=get_policy(("snapkv", "threshold")[seed], window=8))
    Engine(fresh, kv=kv).generate(prompts, max_tokens=TOKENS, temperature=0)
    programs = Programs.of(fresh, logprobs=False)
    all_programs = (programs.prefill, programs.first, programs.decode, kv_cache._spill)
    compiled.append([f._cache_size() for f in all_programs])
  assert compiled[0] == compiled[1] and compiled[0][:3] == [1, 1, 1]


def test_evicting_while_decoding(float_model: Model) -> None:
  """The prompt and what was said alike; and nothing compiles, whatever goes."""
  endless: Any = Stopping(float_model.tokenizer)
  fresh = Model(float_model.module, endless, {}, "fresh")
  engine = Engine(fresh, kv=replace(EVICT, policy=get_policy("vatp"), evict_every=32))
  compiled = []
  for seed in range(2):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 250, n - 3 * seed).tolist() for n in (70, 100)]
    said = engine.generate(prompts, max_tokens=1 + 3 * 32, temperature=0)
    # Turns are before tokens 33 and 65 that come after the prompt.
    use = said[0].timing.kv
    kept = sum(-(-(len(p) + 64) // 2) + 32 for p in prompts)
    assert use is not None and use.seen == sum(len(p) + 96 for p in prompts)
    assert use.kept == kept
    programs = Programs.of(fresh, logprobs=False)
    host = (kv_cache._spill, kv_cache._choose, kv_cache._compact)
    compiled.append([f._cache_size() for f in (programs.first, programs.decode, *host)])
  assert compiled[0] == compiled[1] and compiled[0][:2] == [1, 1]


@pytest.mark.parametrize(
  ("kv", "dtype", "message"),
  [
    (PLAIN, "bf16", "kv_dtype 'bf16' cannot be compressed on a CPU; use 'f16' or 'f32'"),
    (KVConfig(key=KVFormat(4, 48)), None, "group_size=48 does not divide head_dim=64"),
    (KVConfig(block_size=20), None, "block_size is 20"),
    (KVConfig(policy=get_policy("knorm"), select=TopP()), None, "TopP needs scores of 0 or more"),
  ],
)
def test_misuse(model: Model, kv: KVConfig, dtype: str | None, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    Engine(model, kv=kv, kv_dtype=dtype)
