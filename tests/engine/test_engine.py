"""The engine: what it says does not depend on how the work is cut up, and nothing recompiles."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.engine import Chunk, Completion, Engine, Timing
from q4jax.engine.programs import Programs, new_state
from q4jax.engine.sampling import SamplingArrays, SamplingParams
from q4jax.errors import ConfigError, PromptError
from q4jax.model.model import Model

PROMPT = [1, *range(20, 57)]


def one(engine: Engine, prompt: Any, **settings: Any) -> Completion:
  result = engine.generate(prompt, **settings)
  assert isinstance(result, Completion)
  return result


def many(engine: Engine, prompts: Any, **settings: Any) -> list[Completion]:
  result = engine.generate(prompts, **settings)
  assert isinstance(result, list)
  return result


@pytest.fixture(scope="module")
def engine(model: Model) -> Engine:
  return Engine(model)


def test_greedy_tokens_are_the_argmax_of_the_uncached_logits(float_model: Model) -> None:
  engine = Engine(float_model, kv_dtype="f32")
  tokens = one(engine, PROMPT, max_tokens=12, temperature=0).tokens
  logits = np.asarray(float_model.logits([*PROMPT, *tokens]))[0]
  assert tokens == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_chunking_changes_nothing(
  model: Model, engine: Engine, temperature: float, chunk: int
) -> None:
  want = one(engine, PROMPT, max_tokens=16, temperature=temperature, seed=3).tokens
  chunked = Engine(model, prefill_chunk=chunk)
  assert one(chunked, PROMPT, max_tokens=16, temperature=temperature, seed=3).tokens == want


def test_the_cache_bucket_changes_nothing(engine: Engine) -> None:
  short = one(engine, PROMPT, max_tokens=16, temperature=0).tokens
  # Room for 400 more tokens takes a cache of 512 slots instead of 256.
  assert one(engine, PROMPT, max_tokens=400, temperature=0).tokens[:16] == short


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_unequal_lengths_gives_what_each_gets_alone(
  engine: Engine, temperature: float
) -> None:
  prompts = [PROMPT[:n] for n in (1, 5, 38, 17, 2)]
  settings: dict[str, Any] = {"max_tokens": 12, "temperature": temperature, "top_p": 0.9}
  together = many(engine, prompts, seed=5, **settings)
  for i, (prompt, got) in enumerate(zip(prompts, together, strict=True)):
    alone = one(engine, prompt, seed=5 + i, **settings)
    assert got.tokens == alone.tokens
    assert got.text == alone.text
    assert got.prompt_tokens == len(prompt)


def test_the_last_hidden_state_is_the_same_bits_however_the_prompt_is_cut(model: Model) -> None:
  programs = Programs.of(model, logprobs=False)

  def hidden(cuts: list[int], batch: int, width: int) -> np.ndarray:
    state = new_state(model.config, batch, 256, jnp.float16)
    out = jnp.zeros((batch, model.config.d_model), jnp.float32)
    begin = 0
    for end in cuts:
      tokens = np.zeros((batch, width), np.int32)
      tokens[0, : end - begin] = PROMPT[begin:end]
      count = np.array([end - begin] + [0] * (batch - 1), np.int32)
      state, out = programs.prefill(model.leaves, state, tokens, count, out)
      begin = end
    return np.asarray(out[0])

  want = hidden([38], 1, 64)
  assert np.isfinite(want).all()
  for cuts, batch, width in [([38], 4, 64), ([16, 32, 38], 1, 16), ([1, 2, 38], 2, 64)]:
    np.testing.assert_array_equal(hidden(cuts, batch, width), want)


def test_nothing_compiles_between_prompts_and_settings_that_share_a_bucket(model: Model) -> None:
  fresh = Model(model.module, model.tokenizer, {}, "fresh")  # Nothing is compiled for it yet.
  engine, programs = Engine(fresh), Programs.of(fresh, logprobs=False)
  one(engine, PROMPT[:3], max_tokens=5)
  sizes = {f.name: getattr(programs, f.name)._cache_size() for f in dataclasses.fields(programs)}
  assert sizes == {"prefill": 1, "first": 1, "decode": 1}
  one(engine, PROMPT[:16], max_tokens=40, temperature=0.0)
  one(engine, PROMPT[:9], max_tokens=9, temperature=1.3, top_k=4, top_p=0.5, min_p=0.1, seed=9)
  one(Engine(fresh), PROMPT[:1], max_tokens=9, repetition_penalty=1.2, stop="x")
  assert {f: getattr(programs, f)._cache_size() for f in sizes} == sizes


def test_a_prompt_of_several_chunks_compiles_one_prefill(model: Model) -> None:
  fresh = Model(model.module, model.tokenizer, {}, "fresh")
  one(Engine(fresh, prefill_chunk=16), PROMPT[:32], max_tokens=3)
  assert Programs.of(fresh, logprobs=False).prefill._cache_size() == 1


def test_few_arrays_cross_the_jit_boundary(model: Model) -> None:
  """Each costs time at every token: the matrices, all vectors in one, one pair of caches."""
  matrices = 7 * model.config.num_layers + (1 if model.config.tied else 2)
  assert len(model.leaves) == 1 + matrices
  state = new_state(model.config, 1, 256, jnp.float16)
  assert len(jax.tree.leaves(state)) == 6


def test_decoding_updates_the_cache_in_place(model: Model) -> None:
  programs = Programs.of(model, logprobs=False)
  params = SamplingArrays.of([SamplingParams(0.0)])
  stops = jnp.full((8,), -1, jnp.int32)
  state = new_state(model.config, 1, 256, jnp.float16)
  hidden = jnp.zeros((1, model.config.d_model), jnp.float32)
  tokens = np.array([PROMPT[:16]], np.int32)
  state, hidden = programs.prefill(model.leaves, state, tokens, np.array([16], np.int32), hidden)
  state, _ = programs.first(model.leaves, state, hidden, params, jnp.array([9]), stops)
  before = [a.unsafe_buffer_pointer() for a in state.cache]
  state, _ = programs.decode(model.leaves, state, params, stops)
  assert [a.unsafe_buffer_pointer() for a in state.cache] == before
  assert state.length.tolist() == [17]
  assert state.remaining.tolist() == [7]


def test_streaming_says_what_generate_says(engine: Engine) -> None:
  settings: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 11}
  whole = many(engine, [PROMPT, PROMPT[:4]], **settings)
  timing = Timing()
  chunks: list[Chunk] = list(engine.stream([PROMPT, PROMPT[:4]], timing=timing, **settings))
  for i, completion in enumerate(whole):
    mine = [c for c in chunks if c.index == i]
    assert "".join(c.text for c in mine) == completion.text
    assert [c.token for c in mine] == completion.tokens
    assert [c.finish_reason for c in mine][:-1] == [None] * (len(mine) - 1)
    assert mine[-1].finish_reason == completion.finish_reason
    # Random bytes: every chunk is whole characters all the same.
    assert completion.text == engine.model.tokenizer.decode(completion.tokens, continues=True)
  assert timing.prompt_tokens == 42
  assert timing.decoded_tokens == sum(len(c.tokens) - 1 for c in whole)
  assert timing.first_token_s > 0


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
  whole = one(engine, PROMPT, max_tokens=30, temperature=1.0, seed=2)
  stop = whole.text[4:7]
  at = whole.text.find(stop)
  for stops in (stop, ["never there", stop]):
    cut = one(engine, PROMPT, max_tokens=30, temperature=1.0, seed=2, stop=stops)
    assert cut.text == whole.text[:at]
    assert cut.finish_reason == "stop"
    assert len(cut.tokens) < 30
  chunks = list(engine.stream(PROMPT, max_tokens=30, temperature=1.0, seed=2, stop=stop))
  assert "".join(c.text for c in chunks) == whole.text[:at]


def test_a_stop_string_that_never_completes_is_shown(engine: Engine) -> None:
  whole = one(engine, PROMPT, max_tokens=20, temperature=1.0, seed=2)
  stop = whole.text[-1] + "\u2603 no"
  same = one(engine, PROMPT, max_tokens=20, temperature=1.0, seed=2, stop=stop)
  assert same.text == whole.text
  assert same.finish_reason == "length"


def test_a_stop_token_ends_its_row_and_no_other(model: Model) -> None:
  engine = Engine(model)
  free = many(engine, [PROMPT, PROMPT[:5]], max_tokens=12, temperature=0)
  ends = free[0].tokens[3]
  at = free[0].tokens.index(ends)
  stopping = _with_stop(model, ends)
  got = many(Engine(stopping), [PROMPT, PROMPT[:5]], max_tokens=12, temperature=0)
  assert got[0].tokens == free[0].tokens[: at + 1]
  assert got[0].finish_reason == "stop"
  assert got[0].text == engine.model.tokenizer.decode(free[0].tokens[:at], continues=True)
  other = free[1].tokens
  assert got[1].tokens == (other[: other.index(ends) + 1] if ends in other else other)


def _with_stop(model: Model, token: int) -> Model:
  class Stopping:
    stop_ids = frozenset({token})

    def __getattr__(self, name: str) -> Any:
      return getattr(model.tokenizer, name)

  return Model(model.module, Stopping(), {}, "stopping")  # type: ignore[arg-type]


def test_logprobs_are_those_of_the_model(float_model: Model) -> None:
  engine = Engine(float_model, kv_dtype="f32")
  settings: dict[str, Any] = {"max_tokens": 6, "temperature": 0.8, "top_k": 3, "seed": 1}
  got = one(engine, PROMPT, logprobs=4, **settings)
  assert got.tokens == one(engine, PROMPT, **settings).tokens
  logits = float_model.logits([*PROMPT, *got.tokens])[0, len(PROMPT) - 1 : -1]
  want = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  for step, report in enumerate(got.logprobs):
    assert report.token == got.tokens[step]
    np.testing.assert_allclose(report.logprob, want[step, report.token], atol=2e-4)
    assert [i for i, _ in report.top] == np.argsort(-want[step])[:4].tolist()
    np.testing.assert_allclose([v for _, v in report.top], np.sort(want[step])[::-1][:4], atol=2e-4)


def test_the_context_bounds_a_completion(model: Model) -> None:
  engine = Engine(model, max_context=40)
  got = one(engine, PROMPT, max_tokens=100, temperature=0)
  assert len(got.tokens) == 2
  assert got.finish_reason == "length"


@pytest.mark.parametrize(
  ("prompt", "message"),
  [
    ([], "empty"),
    ([[]], "no tokens"),
    ([[1, 2], [3, 999]], "token id 999 is outside the vocabulary"),
    ([-1], "token id -1"),
    ([[1.5, 2.0]], "text or a flat list"),
    (list(range(3, 203)) * 3, "600 tokens; the context of 512"),
  ],
)
def test_a_bad_prompt_is_named(engine: Engine, prompt: Any, message: str) -> None:
  with pytest.raises(PromptError, match=message):
    engine.generate(prompt)
  with pytest.raises(PromptError, match=message):
    engine.stream(prompt)  # At once, not at the first chunk.


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": [""]}, "stop"),
    ({"temperature": -1.0}, "temperature"),
  ],
)
def test_a_bad_setting_is_named(engine: Engine, settings: dict[str, Any], message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    engine.generate(PROMPT, **settings)


@pytest.mark.parametrize(
  "settings",
  [{"max_context": 513}, {"max_context": 0}, {"kv_dtype": "int4"}, {"prefill_chunk": 48}],
)
def test_a_bad_engine_setting_is_named(model: Model, settings: dict[str, Any]) -> None:
  with pytest.raises(ConfigError, match=next(iter(settings))):
    Engine(model, **settings)


def test_logits_checks_its_tokens(model: Model) -> None:
  for bad in ([], [[[1]]], [1.5], [999]):
    with pytest.raises(PromptError):
      model.logits(bad)
