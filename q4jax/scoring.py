"""Log-probabilities of given continuations, in batches, also through a compressed cache.

With a compressed cache, a context is read densely and compressed, and its continuation goes through
what is left of it, token by token, as when generating.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.buckets import bucket
from q4jax.engine import Engine
from q4jax.errors import ConfigError, PromptError
from q4jax.kv.cache import CompressedKV
from q4jax.kv.config import KVConfig
from q4jax.model.caches import KVCache, Recording, Span
from q4jax.model.llama import Llama
from q4jax.model.model import Model

# (context, continuation): token ids; the context is not empty.
Pair = tuple[list[int], list[int]]
# Positions whose logits exist at once.
_SLICE = 64


@dataclass(frozen=True)
class Score:
  """Log-probability of a continuation, nats, and whether each of its tokens is the likeliest."""

  logprob: float
  greedy: bool


class Scorer:
  """Scores continuations; `engine` generates with the same model and cache."""

  def __init__(
    self, model: Model, kv: KVConfig | None = None, batch: int = 8, max_length: int | None = None
  ) -> None:
    """Reads at most `max_length` tokens, the model's context if None: contexts lose their start.

    Raises:
      ConfigError: see `Engine`; or an empty batch.
    """
    if batch < 1:
      raise ConfigError(f"batch_size is {batch}; expected at least 1.")
    self.model, self.kv, self.batch = model, kv, batch
    self.engine = Engine(model, max_context=max_length, kv=kv)
    self.max_length = self.engine.max_context
    self._score = model.jit(_score)
    self._prefill = model.jit(_prefill, static_argnums=(3, 4))
    self._step = model.jit(_step, donate_argnums=1)

  def scores(self, pairs: Sequence[Pair]) -> list[Score]:
    """Of each continuation after its context; long contexts lose their start."""
    found: list[Score | None] = [None] * len(pairs)
    # Longest first: memory runs out at once or not at all, and a batch is of like lengths.
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    for begin in range(0, len(order), self.batch):
      some = order[begin : begin + self.batch]
      batch = [self._cut(pairs[i]) for i in some]
      batch += batch[:1] * (bucket(len(batch)) - len(batch))
      logprob, greedy = self._dense(batch) if self.kv is None else self._stepped(batch)
      for row, i in enumerate(some):
        n = len(pairs[i][1])
        found[i] = Score(float(logprob[row, :n].sum(dtype=np.float64)), bool(greedy[row, :n].all()))
    return [score for score in found if score is not None]

  def _cut(self, pair: Pair) -> Pair:
    context, continuation = pair
    room = self.max_length + 1 - len(continuation)
    if room < 1:
      raise PromptError(
        f"a continuation has {len(continuation)} tokens; the context of {self.max_length} cannot "
        "hold it. Raise max_length, if the model allows."
      )
    return context[-room:], continuation

  def _dense(self, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """logprob float32[B, C], greedy bool[B, C], in one pass."""
    length = np.array([len(a) + len(b) - 1 for a, b in pairs], np.int32)
    tokens = _padded([[*a, *b[:-1]] for a, b in pairs], bucket(int(length.max()), least=64))
    wide = -(-max(len(b) for _, b in pairs) // _SLICE) * _SLICE
    first = np.array([len(a) - 1 for a, _ in pairs], np.int32)
    at = np.minimum(first[:, None] + np.arange(wide, dtype=np.int32), length[:, None] - 1)
    targets = _padded([b for _, b in pairs], wide)
    logprob, greedy = self._score(self.model.leaves, tokens, length, at, targets)
    return np.asarray(logprob), np.asarray(greedy)

  def _stepped(self, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """The same, the continuation through the compressed cache."""
    assert self.kv is not None
    length = np.array([len(a) for a, _ in pairs], np.int32)
    count = np.array([len(b) for _, b in pairs], np.int32)
    tokens = _padded([a for a, _ in pairs], bucket(int(length.max()), least=64))
    targets = _padded([b for _, b in pairs], int(count.max()))
    dtype = self.engine.kv_dtype
    read, found = self._prefill(self.model.leaves, tokens, length, self.kv, dtype, targets[:, 0])
    parts = [_now(found)]
    if count.max() > 1:
      compressed = CompressedKV(self.kv, self.model.config, read, length, count)
      cache = compressed.state
      for step in range(int(count.max()) - 1):
        running = step + 1 < count
        at = jnp.asarray(length + np.minimum(step, count - 1), jnp.int32)
        cache = compressed.before_step(cache, at, running)
        cache, found = self._step(
          self.model.leaves, cache, at, running, targets[:, step], targets[:, step + 1]
        )
        parts.append(_now(found))
    logprob, greedy = (np.stack([p[i] for p in parts], axis=1) for i in range(2))
    return logprob, greedy


def _now(found: tuple[jax.Array, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
  return np.asarray(found[0]), np.asarray(found[1])


def _padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
  out = np.zeros((len(rows), width), np.int32)
  for row, ids in zip(out, rows, strict=True):
    row[: len(ids)] = ids
  return out


def _empty(module: Llama, shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
  c, (batch, slots) = module.config, shape
  whole = (c.num_layers, batch, c.num_kv_heads, slots, c.head_dim)
  return jnp.zeros(whole, dtype), jnp.zeros(whole, dtype)


def _chosen(module: Llama, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """hidden float32[R, D], targets int32[R] -> log-probability, and whether it is the largest."""
  logits = module.unembed(hidden)
  chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == targets


def _score(
  module: Llama, tokens: jax.Array, length: jax.Array, at: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """tokens int32[B, T], at and targets int32[B, C] -> [B, C]: targets after the positions `at`."""
  batch, wide = at.shape
  cache = _empty(module, tokens.shape, jnp.float32)
  hidden, _ = module.hidden(tokens, cache, Span(jnp.zeros_like(length), length))
  picked = jnp.take_along_axis(hidden, at[..., None], axis=1)  # [B, C, D]
  parts = (picked.reshape(-1, _SLICE, picked.shape[-1]), targets.reshape(-1, _SLICE))
  logprob, greedy = jax.lax.map(lambda part: _chosen(module, *part), parts)
  return logprob.reshape(batch, wide), greedy.reshape(batch, wide)


def _prefill(
  module: Llama, tokens: jax.Array, length: jax.Array, kv: KVConfig, dtype: Any, target: jax.Array
) -> tuple[Recording, tuple[jax.Array, jax.Array]]:
  """Reads contexts, and scores what comes first after them."""
  cache = kv.recording(_empty(module, tokens.shape, dtype), module.config.num_heads)
  hidden, read = module.hidden(tokens, cache, Span(jnp.zeros_like(length), length))
  assert isinstance(read, Recording)
  last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
  return read, _chosen(module, last, target)


def _step(
  module: Llama,
  cache: KVCache,
  at: jax.Array,
  running: jax.Array,
  inputs: jax.Array,
  targets: jax.Array,
) -> tuple[KVCache, tuple[jax.Array, jax.Array]]:
  """One token of each row that runs, and the score of the next."""
  hidden, cache = module.hidden(inputs[:, None], cache, Span(at, running.astype(jnp.int32)))
  return cache, _chosen(module, hidden[:, 0], targets)
