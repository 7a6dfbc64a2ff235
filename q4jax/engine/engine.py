"""The engine: prompts in, text out, for one prompt or a batch of unequal lengths."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.buckets import bucket
from q4jax.engine.prefill import prefill
from q4jax.engine.programs import MAX_LOGPROBS, Output, Programs, State
from q4jax.engine.results import Chunk, Completion, Timing, logprobs_of
from q4jax.engine.sampling import SamplingArrays, SamplingParams
from q4jax.engine.text import TextAssembler
from q4jax.errors import ConfigError, PoolExhaustedError, PromptError
from q4jax.kv.cache import CompressedKV, blocks_for
from q4jax.kv.config import KVConfig
from q4jax.kv.stats import PoolStats
from q4jax.kv.store import KVStore, Prefixes
from q4jax.model.caches import Compressed, Recording
from q4jax.model.model import Model

Prompt = str | Sequence[int]

# A batch's stop tokens are padded to a multiple of this with ids that no token has.
_STOP_BUCKET = 8


class Engine:
  """Generates text with one model.

  Args:
    model: from `q4jax.load`.
    max_context: most tokens a sequence may have, prompt and output; the model's own limit if None.
    kv_dtype: the KV cache's type, "f16", "bf16" or "f32"; None takes f16 on a CPU, else bf16.
    kv: how the cache is compressed when the prompts have been read; not at all if None. While they
      are read it is dense.
    kv_pool_tokens: room in the blocks of the compressed cache, in tokens of all layers, for all
      prompts of a call together; those that do not fit wait for others to finish. Blocks stay
      allocated between calls. None takes what each call can need, for as long as it runs.
    share_prefixes: keep prompts and answers in the pool, while there is room, and read only the
      rest of prompts that begin alike; prompts of one call share blocks too. What is found there
      has been rounded as `kv` says. Only without eviction.
    prefix_ttl_s: seconds after which an unused prefix is forgotten; None for no limit.
    prefill_chunk: most prompt tokens of a sequence in one program call; a longer prompt takes
      several. A power of two; None takes 256 on a CPU, where more only takes memory, else 512.

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
    kv_pool_tokens: int | None = None,
    share_prefixes: bool = False,
    prefix_ttl_s: float | None = None,
    prefill_chunk: int | None = None,
  ) -> None:
    limit = model.config.context_length
    self.max_context = limit if max_context is None else max_context
    if not 1 <= self.max_context <= limit:
      raise ConfigError(f"max_context is {max_context}; this model's range is 1..{limit}.")
    dtypes = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32}
    self._device = next(iter(model.leaves[0].devices()))
    on_cpu = self._device.platform == "cpu"
    if prefill_chunk is None:
      prefill_chunk = 256 if on_cpu else 512
    if prefill_chunk < 1 or prefill_chunk & (prefill_chunk - 1):
      raise ConfigError(f"prefill_chunk is {prefill_chunk}; expected a power of two.")
    name = kv_dtype or ("f16" if on_cpu else "bf16")
    if name not in dtypes:
      raise ConfigError(f"kv_dtype is '{name}'; expected one of {', '.join(dtypes)}.")
    if kv is not None:
      kv.check(model.config)
      if name == "bf16" and on_cpu:
        raise ConfigError("kv_dtype 'bf16' cannot be compressed on a CPU; use 'f16' or 'f32'.")
    self.model, self.kv = model, kv
    self.kv_dtype = dtypes[name]
    self.prefill_chunk = prefill_chunk
    self.share_prefixes = share_prefixes
    self._store: KVStore | None = None
    if kv_pool_tokens is not None and kv is not None:
      blocks = -(-kv_pool_tokens // kv.block_size) * model.config.num_layers
      self._store = KVStore(kv, model.config, blocks + 1, self._device, prefix_ttl_s)
    elif kv_pool_tokens is not None:
      raise ConfigError("kv_pool_tokens is for a compressed cache; give kv too.")
    if share_prefixes and (self._store is None or kv is None or kv.policy is not None):
      raise ConfigError(
        "share_prefixes needs kv_pool_tokens, and a kv without a policy: what eviction leaves of a "
        "prompt depends on what follows."
      )

  @property
  def pool_stats(self) -> PoolStats | None:
    """What is in the pool that `kv_pool_tokens` made."""
    return None if self._store is None else self._store.pool.stats()

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
    limits = [min(max_tokens, self.max_context - len(row)) for row in ids]
    for rows in self._turns(ids, limits):
      some = [ids[i] for i in rows], [limits[i] for i in rows]
      seeds = [(params.seed + i) % 2**32 for i in rows]
      with nullcontext() if self._store is None else self._store.borrowed():
        for chunk in self._batch(*some, params, seeds, stops, logprobs, timing):
          yield replace(chunk, index=rows[chunk.index])

  def _turns(self, ids: list[np.ndarray], limits: list[int]) -> list[range]:
    """Which prompts run side by side: all of them, or as many as the pool has room for."""
    if self._store is None or self.kv is None:
      return [range(len(ids))]
    lengths = np.array([len(row) for row in ids])
    most = blocks_for(self.kv, lengths, np.array(limits)) * self.model.config.num_layers
    total = self._store.num_blocks - 1
    turns, begin = [], 0
    for i, needed in enumerate(most):
      if needed > total:
        raise PoolExhaustedError(
          f"prompt {i} of {lengths[i]} tokens, with {limits[i]} to come, may need {needed} KV "
          f"blocks; the pool has {total}. Make kv_pool_tokens larger, or ask for fewer tokens."
        )
      if most[begin : i + 1].sum() > total:
        turns.append(range(begin, i))
        begin = i
    return [*turns, range(begin, len(ids))]

  def _batch(
    self,
    ids: list[np.ndarray],
    limits: list[int],
    params: SamplingParams,
    seeds: list[int],
    stops: tuple[str, ...],
    logprobs: int | None,
    timing: Timing,
  ) -> Iterator[Chunk]:
    began = time.perf_counter()
    batch = bucket(len(ids))
    padding = batch - len(ids)
    slots = bucket(max(len(r) + n for r, n in zip(ids, limits, strict=True)), least=256)
    programs = Programs.of(self.model, logprobs=logprobs is not None)
    rows = [replace(params, seed=seed) for seed in seeds + [0] * padding]
    arrays = SamplingArrays.of(rows)
    stop_ids = self._stop_ids()
    room = np.array(limits + [0] * padding)

    prefixes = self._store.prefixes(ids) if self._store and self.share_prefixes else None
    try:
      state, hidden = prefill(self, programs, ids, batch, slots, prefixes, self._store)
    except BaseException:
      if self._store and prefixes:
        self._store.pool.release(prefixes.references)
      raise
    lengths = np.array([len(row) for row in ids] + [0] * padding)
    compressed = None
    if self.kv is not None:
      compressed = self.compress(state, lengths, room, self._store, prefixes)
      state = replace(state, cache=compressed.state)
      timing.kv = compressed.usage
    limit = jnp.asarray(room, jnp.int32)
    state, output = programs.first(self.model.leaves, state, hidden, arrays, limit, stop_ids)
    output.token.block_until_ready()
    known = 0 if prefixes is None else int(prefixes.tokens.sum())
    timing.prefilled(sum(map(len, ids)), known, time.perf_counter() - began)

    texts = [TextAssembler(self.model.tokenizer, stops) for _ in ids]
    said: list[list[int]] = [[] for _ in ids]
    open_rows = set(range(len(ids)))
    before, began = timing.decode_s, time.perf_counter()
    try:
      for step in range(max(limits)):
        # The next step is under way while this one's token is read and turned into text.
        ahead, running = None, np.zeros(batch, bool)
        if step + 1 < max(limits):
          if compressed is not None:
            assert isinstance(state.cache, Compressed)
            running = np.array([b in open_rows and step + 1 < room[b] for b in range(batch)])
            state = replace(state, cache=compressed.before_step(state.cache, state.length, running))
          # Asked for anew each time: a calibration may be injected between two tokens.
          state, ahead = programs.decode(self.model.leaves, state, arrays, stop_ids)
        tokens = np.asarray(output.token)
        if compressed is not None:
          compressed.take_back(running & np.isin(tokens, list(self.model.tokenizer.stop_ids)))
        for row in sorted(open_rows):
          token = int(tokens[row])
          said[row].append(token)
          chunk = self._chunk(row, token, output, texts[row], step, limits[row], logprobs)
          if chunk.finish_reason is not None:
            open_rows.discard(row)
          if step:
            timing.decoded_tokens += 1
            timing.decode_s = before + time.perf_counter() - began
          yield chunk
        if not open_rows or ahead is None:
          return
        output = ahead
    finally:
      if compressed is not None:
        timing.kv = compressed.usage
        if self._store is not None:
          assert isinstance(state.cache, Compressed)
          heard = [np.array(row, np.int32) for row in said]
          whole = [np.concatenate(row) for row in zip(ids, heard, strict=True)]
          compressed.close(state.cache, whole if self.share_prefixes else ())

  def compress(
    self,
    state: State,
    lengths: np.ndarray,
    room: np.ndarray,
    store: KVStore | None = None,
    prefixes: Prefixes | None = None,
  ) -> CompressedKV:
    """What a prefilled state holds, compressed as `kv` says; `room` tokens a row are to come."""
    assert self.kv is not None
    assert isinstance(state.cache, Recording)
    config = self.model.config
    return CompressedKV(self.kv, config, state.cache, lengths, room, store, prefixes)

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
    report = None if logprobs is None else logprobs_of(output, row, token, logprobs)
    return Chunk(row, token, new, report, reason)

  def _stop_ids(self) -> jax.Array:
    stops = sorted(self.model.tokenizer.stop_ids)
    padding = [-1] * (-len(stops) % _STOP_BUCKET or (0 if stops else _STOP_BUCKET))
    return jnp.asarray(stops + padding, jnp.int32)


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
