"""The engine: prompts in, text out, for one prompt or a batch of unequal lengths."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.engine.programs import MAX_LOGPROBS, Output, Programs, State, new_state
from q4jax.engine.sampling import SamplingArrays, SamplingParams
from q4jax.engine.text import TextAssembler
from q4jax.errors import ConfigError, PromptError
from q4jax.kv.cache import CompressedKV, KVUsage
from q4jax.kv.config import KVConfig
from q4jax.model.caches import Compressed, Recording
from q4jax.model.model import Model

Prompt = str | Sequence[int]

# A batch's stop tokens are padded to a multiple of this with ids that no token has.
_STOP_BUCKET = 8


@dataclass(frozen=True)
class TokenLogprobs:
  """Log-probabilities under the model, before penalties and temperature.

  Attributes:
    token: the sampled token; logprob: its natural-log probability.
    top: the likeliest (token, logprob) pairs, best first, as many as were asked for.
  """

  token: int
  logprob: float
  top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chunk:
  """One sampled token of one sequence, and the text that it completed.

  Attributes:
    index: which prompt of the batch.
    token: its id; None in a closing chunk that only carries held-back text.
    text: new text, never half a UTF-8 character nor part of a stop string.
    finish_reason: None, or on the last chunk "stop" (a stop token or string) or "length".
  """

  index: int
  token: int | None
  text: str
  logprobs: TokenLogprobs | None = None
  finish_reason: str | None = None


@dataclass
class Timing:
  """Where one call's time went. Seconds; tokens of all sequences together."""

  prompt_tokens: int = 0
  prefill_s: float = 0.0
  first_token_s: float = 0.0
  decoded_tokens: int = 0
  decode_s: float = 0.0
  kv: KVUsage | None = None  # what a compressed cache held in the end

  @property
  def prefill_rate(self) -> float:
    """Prompt tokens a second."""
    return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

  @property
  def decode_rate(self) -> float:
    """Tokens a second after the first of each sequence."""
    return self.decoded_tokens / self.decode_s if self.decode_s else 0.0


@dataclass
class Completion:
  """What one prompt was answered with.

  Attributes:
    text: without the prompt, the stop token or the stop string.
    tokens: every sampled token, the stop token included.
    finish_reason: "stop" or "length".
  """

  text: str
  tokens: list[int]
  finish_reason: str
  prompt_tokens: int
  timing: Timing
  logprobs: list[TokenLogprobs] = field(default_factory=list)


class Engine:
  """Generates text with one model.

  Args:
    model: from `q4jax.load`.
    max_context: most tokens a sequence may have, prompt and output; the model's own limit if None.
    kv_dtype: the KV cache's type, "f16", "bf16" or "f32"; None takes f16 on a CPU, else bf16.
    kv: how the cache is compressed when the prompts have been read; not at all if None. While they
      are read it is dense.
    prefill_chunk: most prompt tokens of a sequence in one program call; a longer prompt takes
      several. A power of two.

  Programs compile on first use, once per bucket: the batch, the chunk and the cache are padded to
  powers of two. Nothing compiles while decoding, nor between prompts of the same buckets.
  """

  def __init__(
    self,
    model: Model,
    *,
    max_context: int | None = None,
    kv_dtype: str | None = None,
    kv: KVConfig | None = None,
    prefill_chunk: int = 512,
  ) -> None:
    limit = model.config.context_length
    self.max_context = limit if max_context is None else max_context
    if not 1 <= self.max_context <= limit:
      raise ConfigError(f"max_context is {max_context}; this model's range is 1..{limit}.")
    if prefill_chunk < 1 or prefill_chunk & (prefill_chunk - 1):
      raise ConfigError(f"prefill_chunk is {prefill_chunk}; expected a power of two.")
    dtypes = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32}
    self._device = next(iter(model.leaves[0].devices()))
    name = kv_dtype or ("f16" if self._device.platform == "cpu" else "bf16")
    if name not in dtypes:
      raise ConfigError(f"kv_dtype is '{name}'; expected one of {', '.join(dtypes)}.")
    if kv is not None:
      kv.check(model.config)
      if name == "bf16" and self._device.platform == "cpu":
        raise ConfigError("kv_dtype 'bf16' cannot be compressed on a CPU; use 'f16' or 'f32'.")
    self.model, self.kv = model, kv
    self.kv_dtype = dtypes[name]
    self.prefill_chunk = prefill_chunk

  def generate(
    self,
    prompt: Prompt | Sequence[Prompt],
    *,
    max_tokens: int = 128,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    logprobs: int | None = None,
  ) -> Completion | list[Completion]:
    """Completes one prompt, or each of a list of prompts as one batch.

    Args:
      prompt: text (encoded with the special tokens the model wants) or token ids (taken as they
        are); or a list of such.
      max_tokens: most tokens to sample for each prompt; fewer if the context is full before.
      temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingParams`.
      seed: prompt i of a list uses seed + i, so that it gets what it would get alone.
      stop: strings that end a completion; they do not appear in its text.
      logprobs: with each token, its log-probability and this many alternatives (0 to 20).

    Raises:
      PromptError: an empty prompt, ids outside the vocabulary, or no room in the context.
      ConfigError: a parameter out of range.
    """
    prompts, single = _as_list(prompt)
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    timing = Timing()
    done = [Completion("", [], "length", 0, timing) for _ in prompts]
    ids = self._encode(prompts)
    for row, completion in zip(ids, done, strict=True):
      completion.prompt_tokens = len(row)
    for chunk in self._run(ids, params, max_tokens, _stops(stop), logprobs, timing):
      completion = done[chunk.index]
      completion.text += chunk.text
      if chunk.token is not None:
        completion.tokens.append(chunk.token)
      if chunk.logprobs is not None:
        completion.logprobs.append(chunk.logprobs)
      completion.finish_reason = chunk.finish_reason or completion.finish_reason
    return done[0] if single else done

  def stream(
    self,
    prompt: Prompt | Sequence[Prompt],
    *,
    max_tokens: int = 128,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    logprobs: int | None = None,
    timing: Timing | None = None,
  ) -> Iterator[Chunk]:
    """Like `generate`, a chunk at a time; `timing` is filled in as it goes.

    Arguments are checked now, before the first chunk is asked for. Closing the iterator stops.
    """
    prompts, _ = _as_list(prompt)
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    ids = self._encode(prompts)
    return self._run(ids, params, max_tokens, _stops(stop), logprobs, timing or Timing())

  def _encode(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    if not prompts:
      raise PromptError("the list of prompts is empty; give at least one.")
    encoded = []
    for i, prompt in enumerate(prompts):
      ids = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
      row = np.asarray(ids)
      if row.size == 0:
        raise PromptError(f"prompt {i} has no tokens; give at least one (a BOS token will do).")
      if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise PromptError(f"prompt {i} must be text or a flat list of token ids.")
      self.model.check_ids(row)
      if len(row) >= self.max_context:
        raise PromptError(
          f"prompt {i} has {len(row)} tokens; the context of {self.max_context} must hold it and "
          "at least one new token. Shorten the prompt, or raise max_context if the model allows."
        )
      encoded.append(row.astype(np.int32))
    return encoded

  def _run(
    self,
    ids: list[np.ndarray],
    params: SamplingParams,
    max_tokens: int,
    stops: tuple[str, ...],
    logprobs: int | None,
    timing: Timing,
  ) -> Iterator[Chunk]:
    if max_tokens < 1:
      raise ConfigError(f"max_tokens is {max_tokens}; expected at least 1.")
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
      raise ConfigError(f"logprobs is {logprobs}; expected 0 to {MAX_LOGPROBS}, or None.")
    return self._generate(ids, params, max_tokens, stops, logprobs, timing)

  def _generate(
    self,
    ids: list[np.ndarray],
    params: SamplingParams,
    max_tokens: int,
    stops: tuple[str, ...],
    logprobs: int | None,
    timing: Timing,
  ) -> Iterator[Chunk]:
    began = time.perf_counter()
    batch = _bucket(len(ids))
    limits = [min(max_tokens, self.max_context - len(row)) for row in ids]
    slots = _bucket(max(len(r) + n for r, n in zip(ids, limits, strict=True)), least=256)
    programs = Programs.of(self.model, logprobs=logprobs is not None)
    leaves = self.model.leaves
    rows = [replace(params, seed=(params.seed + i) % 2**32) for i in range(batch)]
    arrays = SamplingArrays.of(rows)
    stop_ids = self._stop_ids()
    limit = jnp.asarray(limits + [0] * (batch - len(ids)), jnp.int32)

    state, hidden = self._prefill(programs, ids, batch, slots)
    lengths = [len(row) for row in ids] + [0] * (batch - len(ids))
    compressed = None
    if self.kv is not None:
      room = np.array(limits + [0] * (batch - len(ids)))
      compressed = self.compress(state, np.array(lengths), room)
      state = replace(state, cache=compressed.state)
      timing.kv = compressed.usage
    state, output = programs.first(leaves, state, hidden, arrays, limit, stop_ids)
    output.token.block_until_ready()
    timing.prompt_tokens = sum(map(len, ids))
    timing.prefill_s = timing.first_token_s = time.perf_counter() - began

    texts = [TextAssembler(self.model.tokenizer, stops) for _ in ids]
    open_rows = set(range(len(ids)))
    began = time.perf_counter()
    for step in range(max(limits)):
      # The next step is under way while this one's token is read and turned into text.
      ahead, running = None, np.zeros(batch, bool)
      if step + 1 < max(limits):
        if compressed is not None:
          assert isinstance(state.cache, Compressed)
          running = np.array([b in open_rows and step + 1 < limits[b] for b in range(batch)])
          state = replace(state, cache=compressed.before_step(state.cache, state.length, running))
        state, ahead = programs.decode(leaves, state, arrays, stop_ids)
      tokens = np.asarray(output.token)
      if compressed is not None:
        compressed.take_back(running & np.isin(tokens, list(self.model.tokenizer.stop_ids)))
        timing.kv = compressed.usage
      for row in sorted(open_rows):
        chunk = self._chunk(row, int(tokens[row]), output, texts[row], step, limits[row], logprobs)
        if chunk.finish_reason is not None:
          open_rows.discard(row)
        if step:
          timing.decoded_tokens += 1
          timing.decode_s = time.perf_counter() - began
        yield chunk
      if not open_rows or ahead is None:
        return
      output = ahead

  def _prefill(
    self, programs: Programs, ids: list[np.ndarray], batch: int, slots: int
  ) -> tuple[State, jax.Array]:
    """Runs all prompts through, in chunks; returns the state and each prompt's last hidden."""
    config = self.model.config
    window = 0 if self.kv is None else self.kv.window(slots)
    # Placed where the programs' results will be: else the second call would compile again.
    state, hidden = jax.device_put(
      (
        new_state(config, batch, slots, self.kv_dtype, window),
        jnp.zeros((batch, config.d_model), jnp.float32),
      ),
      self._device,
    )
    longest = max(map(len, ids))
    for begin in range(0, longest, self.prefill_chunk):
      width = min(self.prefill_chunk, _bucket(longest - begin, least=16))
      tokens = np.zeros((batch, width), np.int32)
      count = np.zeros(batch, np.int32)
      for b, row in enumerate(ids):
        part = row[begin : begin + width]
        tokens[b, : len(part)], count[b] = part, len(part)
      state, hidden = programs.prefill(self.model.leaves, state, tokens, count, hidden)
    return state, hidden

  def compress(self, state: State, lengths: np.ndarray, room: np.ndarray) -> CompressedKV:
    """What a prefilled state holds, compressed as `kv` says; `room` tokens a row are to come."""
    assert self.kv is not None
    cache, queries = state.cache, None
    if isinstance(cache, Recording):
      queries, cache = cache.queries, cache.cache
    assert isinstance(cache, tuple)
    return CompressedKV(self.kv, self.model.config, cache, queries, lengths, room)

  def _chunk(
    self,
    row: int,
    token: int,
    output: Output,
    text: TextAssembler,
    step: int,
    limit: int,
    logprobs: int | None,
  ) -> Chunk:
    stopped = token in self.model.tokenizer.stop_ids
    new = "" if stopped else text.push(token)
    reason = "stop" if stopped or text.stopped else "length" if step + 1 >= limit else None
    if reason is not None and not text.stopped:
      new += text.flush()
      # A stop string may be completed by what was held back.
      reason = "stop" if text.stopped else reason
    report = None if logprobs is None else _logprobs(output, row, token, logprobs)
    return Chunk(row, token, new, report, reason)

  def _stop_ids(self) -> jax.Array:
    stops = sorted(self.model.tokenizer.stop_ids)
    padding = [-1] * (-len(stops) % _STOP_BUCKET or (0 if stops else _STOP_BUCKET))
    return jnp.asarray(stops + padding, jnp.int32)


def _logprobs(output: Output, row: int, token: int, count: int) -> TokenLogprobs:
  assert output.logprob is not None and output.top_ids is not None
  assert output.top_logprobs is not None
  ids, values = np.asarray(output.top_ids[row]), np.asarray(output.top_logprobs[row])
  top = tuple((int(i), float(v)) for i, v in zip(ids[:count], values[:count], strict=True))
  return TokenLogprobs(token, float(output.logprob[row]), top)


def _as_list(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
  """The prompts, and whether it was a single one."""
  if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int | np.integer)):
    return [cast(Prompt, prompt)], True
  return list(cast(Sequence[Prompt], prompt)), False


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
  stops = (stop,) if isinstance(stop, str) else tuple(stop)
  if any(not isinstance(s, str) or not s for s in stops):
    raise ConfigError(f"stop is {stop!r}; expected one or more non-empty strings.")
  return stops


def _bucket(n: int, least: int = 1) -> int:
  """The smallest power of two that is at least n and `least`."""
  return max(least, 1 << (n - 1).bit_length())
