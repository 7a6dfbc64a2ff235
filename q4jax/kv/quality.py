"""What a compressed cache costs: a text read token by token through it, beside the dense cache.

A teacher-forced pass over the whole text would hide the loss, for its attention never sees what
the cache has become. So the prompt is read densely, compressed, and every further token is a decode
step of its own, as when generating; the dense cache decodes the same token in the same step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.errors import ConfigError
from q4jax.kv.cache import CompressedKV, KVUsage
from q4jax.kv.config import KVConfig
from q4jax.model.caches import Compressed, KVCache, Recording, Span
from q4jax.model.llama import Llama
from q4jax.model.model import Model
from q4jax_kernels.attention import Cache


@dataclass(frozen=True)
class Quality:
  """Means over all scored tokens; nats.

  Attributes:
    ppl, dense_ppl: perplexity with the compressed and with the dense cache.
    ratio_stderr: standard error of ppl / dense_ppl, from the paired differences of sequences.
    kl: of the compressed prediction from the dense one.
    top1: share of tokens whose likeliest successor is the same.
    tokens: tokens scored.
    usage: what the cache held in the end.
    by_sequence: of each sequence, the mean of its tokens' losses minus the dense cache's; the mean
      of these is ln(ratio).
  """

  ppl: float
  dense_ppl: float
  ratio_stderr: float
  kl: float
  top1: float
  tokens: int
  usage: KVUsage
  by_sequence: tuple[float, ...]

  @property
  def ratio(self) -> float:
    return self.ppl / self.dense_ppl


def stepped_quality(
  model: Model,
  tokens: np.ndarray,
  prompt: int,
  kv: KVConfig,
  kv_dtype: jnp.dtype = jnp.float32,
) -> Quality:
  """Reads int[B, T] with `prompt` tokens as the prompt and steps through the others.

  Args:
    kv_dtype: of the dense cache, and of the compressed one's dense part.

  Raises:
    ConfigError: fewer than one token to score, or a cache that the model cannot have.
  """
  kv.check(model.config)
  batch, total = tokens.shape
  if not 1 <= prompt <= total - 2:
    raise ConfigError(
      f"prompt is {prompt} of {total} tokens; expected 1 to {total - 2}, for the token after it is "
      "stepped through and the next one scored."
    )
  model.check_ids(tokens)
  programs = _PROGRAMS.setdefault(model, _Programs(model))
  slots = -(-total // 64) * 64
  read = programs.prefill(model.leaves, jnp.asarray(tokens[:, :prompt]), slots, kv, kv_dtype)
  dense = read.cache
  length = np.full(batch, prompt)
  compressed = CompressedKV(kv, model.config, read, length, np.full(batch, total - prompt))
  cache, running = compressed.state, np.ones(batch, bool)
  parts = []
  for at in range(prompt, total - 1):
    now = jnp.full(batch, at, jnp.int32)
    cache = compressed.before_step(cache, now, running)
    inputs, targets = (jnp.asarray(tokens[:, i], jnp.int32) for i in (at, at + 1))
    dense, cache, scores = programs.step(model.leaves, dense, cache, now, inputs, targets)
    parts.append(scores)
  scored = np.asarray(jnp.stack(parts), np.float64)  # [steps, 4, B]
  nll, dense_nll, kl, same = scored.swapaxes(0, 1)
  ratio = math.exp((nll - dense_nll).mean())
  by_sequence = (nll - dense_nll).mean(axis=0)
  spread = by_sequence.std(ddof=1) / math.sqrt(batch) if batch > 1 else math.nan
  return Quality(
    ppl=math.exp(nll.mean()),
    dense_ppl=math.exp(dense_nll.mean()),
    ratio_stderr=ratio * spread,
    kl=float(kl.mean()),
    top1=float(same.mean()),
    tokens=nll.size,
    usage=compressed.usage,
    by_sequence=tuple(by_sequence.tolist()),
  )


class _Programs:
  def __init__(self, model: Model) -> None:
    self.prefill: Callable = model.jit(_prefill, static_argnums=(2, 3, 4))
    self.step: Callable = model.jit(_step, donate_argnums=(1, 2))


_PROGRAMS: WeakKeyDictionary[Model, _Programs] = WeakKeyDictionary()


def _prefill(
  module: Llama, tokens: jax.Array, slots: int, kv: KVConfig, dtype: jnp.dtype
) -> Recording:
  c, (batch, count) = module.config, tokens.shape
  shape = (c.num_layers, batch, c.num_kv_heads, slots, c.head_dim)
  cache = kv.recording((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), c.num_heads)
  zeros = jnp.zeros(batch, jnp.int32)
  _, read = module.hidden(tokens, cache, Span(zeros, zeros + count))
  assert isinstance(read, Recording)
  return read


def _step(
  module: Llama,
  dense: Cache,
  cache: Compressed,
  at: jax.Array,
  inputs: jax.Array,
  targets: jax.Array,
) -> tuple[KVCache, KVCache, jax.Array]:
  """One token of each row through both caches: nll, dense nll, KL and agreement, float32[4, B]."""
  span = Span(at, jnp.ones_like(at))
  outputs: list[jax.Array] = []
  caches: list[KVCache] = []
  for one in (cache, dense):
    hidden, new = module.hidden(inputs[:, None], one, span)
    outputs.append(jax.nn.log_softmax(module.unembed(hidden[:, 0]), axis=-1))
    caches.append(new)
  logp, dense_logp = outputs
  rows = jnp.arange(len(at))
  kl = jnp.sum(jnp.exp(dense_logp) * (dense_logp - logp), axis=-1)
  same = (logp.argmax(-1) == dense_logp.argmax(-1)).astype(jnp.float32)
  scores = jnp.stack([-logp[rows, targets], -dense_logp[rows, targets], kl, same])
  return caches[1], caches[0], scores
