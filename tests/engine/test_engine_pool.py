"""A pool that an engine's calls share: what waits, what is found again, what harms no other."""

import threading
from typing import Any

import jax
import numpy as np
import pytest

from q4jax.engine import Completion, Engine
from q4jax.engine.prefill import _restore
from q4jax.engine.programs import Programs
from q4jax.errors import ConfigError, PoolExhaustedError
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import UnionRank
from q4jax.model.model import Model
from q4jax_kernels.kv_format import KVFormat

PROTECT = Protect(sink=4, recent=8, grace=0)
EXACT = KVConfig(KVFormat(32), KVFormat(32), protect=PROTECT, block_size=16)
CODED = KVConfig(KVFormat(8, 32), KVFormat(8, 32), rotate=True, protect=PROTECT, block_size=16)
TEXT = [1, *np.random.default_rng(5).integers(3, 250, 150).tolist()]
OPTIONS: dict[str, Any] = {"max_tokens": 24, "temperature": 0}


def engine(model: Model, kv: KVConfig = EXACT, tokens: int = 1024, **options: Any) -> Engine:
  return Engine(model, kv_dtype="f32", kv=kv, kv_pool_tokens=tokens, **options)


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
  done = engine.generate(prompts, **OPTIONS)
  assert isinstance(done, list)
  return [completion.tokens for completion in done]


def one(engine: Engine, prompt: list[int]) -> Completion:
  done = engine.generate(prompt, **OPTIONS)
  assert isinstance(done, Completion)
  return done


def in_use(engine: Engine) -> int:
  stats = engine.pool_stats
  assert stats is not None
  return stats.in_use


def test_a_prefix_is_read_once_and_says_the_same(float_model: Model) -> None:
  sharing, alone = engine(float_model, share_prefixes=True), Engine(float_model, kv_dtype="f32")
  for prompt, known in (
    (TEXT[:120], 0),
    (TEXT[:120], 4 + 96),  # what the 12 newest and the ring leave
    (TEXT[:90] + [7] * 20, 4 + 80),
    (TEXT, 4 + 112),  # decoding 24 tokens stored one more block of the first prompt
    ([2, *TEXT[1:]], 0),  # another sink: another text
    (TEXT[:20], 0),  # too short for a block
  ):
    done = one(sharing, prompt)
    assert done.timing.shared_tokens == known, len(prompt)
    assert done.tokens == one(alone, prompt).tokens
    assert in_use(sharing) == 0


def test_the_next_turn_finds_the_answer(float_model: Model) -> None:
  """A chat: each prompt is the one before, its answer, and something new."""
  sharing, alone = engine(float_model, share_prefixes=True), Engine(float_model, kv_dtype="f32")
  prompt, before = TEXT[:40], 0
  for new in ([9, 8], [7] * 30, []):
    done = one(sharing, prompt)
    assert done.timing.shared_tokens == before
    assert done.tokens == one(alone, prompt).tokens
    assert in_use(sharing) == 0
    # The last token was sampled and never read; 8 recent ones and a ring of up to 16 are floats.
    stored = len(prompt) + len(done.tokens) - 1
    before = 4 + (stored - 4 - 8) // 16 * 16
    prompt = [*prompt, *done.tokens, *new]
  assert before > 100


def test_answers_of_a_batch_are_found_again(float_model: Model) -> None:
  """Rows that stop early, two that are one text, one that is closed in the middle."""
  sharing = engine(float_model, share_prefixes=True)
  prompts = [TEXT[:40], [*TEXT[:70], 3], TEXT[:40]]
  said: list[list[int]] = [[], [], []]
  stream = sharing.stream(prompts, **{**OPTIONS, "max_tokens": 60})
  for chunk in stream:
    said[chunk.index].append(chunk.token)
    if len(said[2]) == 50:
      break
  stream.close()
  assert in_use(sharing) == 0
  alone = Engine(float_model, kv_dtype="f32")
  for prompt, answer in zip(prompts, said, strict=True):
    again = one(sharing, [*prompt, *answer, 5])
    assert again.timing.shared_tokens >= 4 + (len(prompt) + 48 - 4 - 8) // 16 * 16 - 16
    assert again.tokens == one(alone, [*prompt, *answer, 5]).tokens


def test_prompts_of_one_call_share_blocks(float_model: Model) -> None:
  prompts = [[*TEXT[:130], i] for i in (5, 6, 7)]
  sharing, apart = (engine(float_model, share_prefixes=share) for share in (True, False))
  assert answers(sharing, prompts) == answers(apart, prompts)
  blocks = []
  for each in (sharing, apart):
    done = each.generate(prompts, **{**OPTIONS, "max_tokens": 1})
    assert isinstance(done, list) and done[0].timing.kv is not None
    blocks.append(done[0].timing.kv.blocks)
  assert blocks[0] * 3 == blocks[1]


def test_what_is_found_has_been_rounded(float_model: Model) -> None:
  """Then the rest of the prompt reads rounded keys: near the exact logits, and not equal."""
  sharing = engine(float_model, CODED, share_prefixes=True)
  options = {**OPTIONS, "max_tokens": 1, "logprobs": 1}
  first, second, exact = (
    each.generate(TEXT, **options)
    for each in (sharing, sharing, Engine(float_model, kv_dtype="f32"))
  )
  assert isinstance(first, Completion) and isinstance(second, Completion)
  assert isinstance(exact, Completion)
  assert second.timing.shared_tokens > 100
  one, two, three = (c.logprobs[0].top[0][1] for c in (first, second, exact))
  assert one == pytest.approx(three, abs=1e-3)
  assert 0 < abs(one - two) < 0.1


def test_what_does_not_fit_waits(float_model: Model) -> None:
  prompts = [TEXT[: 60 + 13 * i] for i in range(5)]
  wide, tight = engine(float_model), engine(float_model, tokens=160)
  assert answers(tight, prompts) == answers(wide, prompts)
  assert in_use(tight) == 0
  chunks = list(tight.stream(prompts, **OPTIONS))
  assert {c.index for c in chunks if c.finish_reason} == set(range(5))
  with pytest.raises(PoolExhaustedError, match="prompt 1 of 151 tokens, with 60 to come"):
    tight.generate([TEXT[:60], TEXT], max_tokens=60)
  assert in_use(tight) == 0


def test_four_times_as_many_sequences_in_the_same_bytes(long_model: Model) -> None:
  """Of 4096 tokens: two in float16 fill a pool that takes eight in int4 of which 60% stay."""
  prompts = np.random.default_rng(0).integers(3, 250, (8, 4096)).tolist()
  protect = Protect(sink=4, recent=64)
  packed = KVConfig(
    KVFormat(4, 32), KVFormat(4, 32), policy=get_policy("snapkv"), select=UnionRank(0.6),
    protect=protect,
  )  # fmt: skip

  def pool(kv: KVConfig, tokens: int) -> tuple[Engine, int]:
    made = Engine(long_model, kv=kv, kv_pool_tokens=tokens)
    assert made._store is not None
    return made, sum(array.nbytes for array in jax.tree.leaves(made._store._zeros()))

  def together(each: Engine) -> int:
    """How many prompts have a token before any is finished."""
    stream, begun = each.stream(prompts, max_tokens=2, temperature=0), set()
    for chunk in stream:
      if chunk.finish_reason is not None:
        break
      begun.add(chunk.index)
    stream.close()  # type: ignore[attr-defined]
    return len(begun)

  floats, most = pool(KVConfig(protect=protect), 2 * 4096)
  codes, used = pool(packed, 2 * 4096 * 3)
  assert used <= most
  assert (together(floats), together(codes)) == (2, 8)


def test_nothing_compiles_for_prefixes_of_other_lengths(float_model: Model) -> None:
  sharing = engine(float_model, share_prefixes=True)
  for n in (120, 121, 135):
    one(sharing, TEXT[:n])
  programs = Programs.of(float_model, logprobs=False)
  counted = (programs.prefill, programs.decode, _restore)
  before = [p._cache_size() for p in counted]
  for n in (119, 136, 122, 137):
    assert one(sharing, TEXT[:n]).timing.shared_tokens > 0
  assert [p._cache_size() for p in counted] == before


def test_threads_take_turns(float_model: Model) -> None:
  sharing = engine(float_model, share_prefixes=True)
  expected = [one(sharing, TEXT[: 100 + i]).tokens for i in range(4)]
  found: dict[int, list[int]] = {}

  def run(i: int) -> None:
    found[i] = one(sharing, TEXT[: 100 + i]).tokens

  threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=120)
  assert [found[i] for i in range(4)] == expected and in_use(sharing) == 0


def test_an_unfinished_stream_is_named_not_waited_for(float_model: Model) -> None:
  each = engine(float_model)
  stream = each.stream(TEXT[:90], **OPTIONS)
  next(stream)
  with pytest.raises(ConfigError, match="unfinished in this thread"):
    one(each, TEXT[:90])
  stream.close()  # type: ignore[attr-defined]
  assert in_use(each) == 0
  assert len(one(each, TEXT[:90]).tokens) == 24


def test_a_step_that_fails_takes_what_was_shared_and_nothing_else(
  float_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
  sharing = engine(float_model, share_prefixes=True)
  expected = one(sharing, TEXT).tokens
  with monkeypatch.context() as patch:
    patch.setattr(
      "q4jax.kv.cache.CompressedKV.before_step",
      lambda self, cache, *_: [a.delete() for a in (cache.paged.slot_pos,)] and 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
      one(sharing, TEXT)
  again = one(sharing, TEXT)
  assert again.tokens == expected and again.timing.shared_tokens == 0
  assert one(sharing, TEXT).timing.shared_tokens > 0


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"kv": None}, "kv_pool_tokens"),
    ({"kv_pool_tokens": 0}, "num_blocks is 1"),
    ({"kv_pool_tokens": None}, "share_prefixes"),
    ({"kv": KVConfig(policy=get_policy("knorm"))}, "share_prefixes"),
    ({"prefix_ttl_s": -1.0}, "ttl_s"),
  ],
)
def test_misuse(float_model: Model, options: dict[str, Any], said: str) -> None:
  given = {"kv": EXACT, "kv_pool_tokens": 256, "share_prefixes": True, **options}
  with pytest.raises(ConfigError, match=said):
    Engine(float_model, **given)
