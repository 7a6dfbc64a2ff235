"""The two compiled programs of generation, prefill and decode, and the state they pass on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp

from q4jax.config import LlamaConfig
from q4jax.engine.sampling import SamplingArrays, sample
from q4jax.kv.config import KVConfig
from q4jax.model.caches import KVCache, Span
from q4jax.model.llama import Llama
from q4jax.model.model import Model

# Alternatives reported with each token where log-probabilities are asked for (OpenAI's limit).
MAX_LOGPROBS = 20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
  """Everything that changes from step to step; donated to each call.

  Attributes:
    cache: of all layers.
    length: int32[B], tokens in the cache.
    token: int32[B], the last token sampled, not yet in the cache.
    remaining: int32[B], tokens still to be sampled; 0 once a row has stopped, and its cache and
      length then stay as they are.
    seen: bool[B, V], tokens of the prompt and the output.
  """

  cache: KVCache
  length: jax.Array
  token: jax.Array
  remaining: jax.Array
  seen: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
  """One sampled token of each row; the log-probabilities only where they were asked for.

  Attributes:
    token: int32[B]; -1 where the row had stopped before.
    logprob: float32[B], of the token under the model (before penalties and temperature).
    top_ids, top_logprobs: [B, MAX_LOGPROBS], the likeliest tokens.
  """

  token: jax.Array
  logprob: jax.Array | None = None
  top_ids: jax.Array | None = None
  top_logprobs: jax.Array | None = None


def new_state(
  config: LlamaConfig, batch: int, slots: int, dtype: jnp.dtype, kv: KVConfig | None = None
) -> State:
  """An empty state for `batch` sequences of up to `slots` tokens, that are to be compressed so."""
  shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
  zeros = jnp.zeros((batch,), jnp.int32)
  # Keys and values are separate buffers: each is donated and updated in place.
  dense = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
  return State(
    cache=dense if kv is None else kv.recording(dense, config.num_heads),
    length=zeros,
    token=zeros + 0,
    remaining=zeros + 0,
    seen=jnp.zeros((batch, config.vocab_size), bool),
  )


@dataclass(frozen=True)
class Programs:
  """The compiled functions of one model. Each compiles once per shape of its arguments.

  Attributes:
    prefill: (leaves, state, tokens int32[B, T], count int32[B], hidden float32[B, D]) -> (state,
      hidden). Appends `count[b]` tokens; the new `hidden` is the last one's, or the one passed in
      where count is 0.
    first: (leaves, state, hidden, params, limit, stop_ids) -> (state, output). Samples the first
      token from the end of the prompt.
    decode: (leaves, state, params, stop_ids) -> (state, output). Appends the last token, samples
      the next.
  """

  prefill: Callable
  first: Callable
  decode: Callable

  @classmethod
  def of(cls, model: Model, logprobs: bool) -> "Programs":
    """The model's programs: made once, so that all its engines share what they compile."""
    known = _PROGRAMS.setdefault(model, {})
    if logprobs not in known:
      other = known.get(not logprobs)  # Its prefill is the same.
      known[logprobs] = cls(
        prefill=other.prefill if other else model.jit(_prefill, donate_argnums=(1, 4)),
        first=model.jit(partial(_sample, logprobs=logprobs), donate_argnums=1),
        decode=model.jit(partial(decode, logprobs=logprobs), donate_argnums=1),
      )
    return known[logprobs]


_PROGRAMS: WeakKeyDictionary[Model, dict[bool, Programs]] = WeakKeyDictionary()


def _prefill(
  module: Llama, state: State, tokens: jax.Array, count: jax.Array, hidden: jax.Array
) -> tuple[State, jax.Array]:
  batch, width = tokens.shape
  x, cache = module.hidden(tokens, state.cache, Span(state.length, count))
  last = jnp.maximum(count - 1, 0).reshape(batch, 1, 1)
  mine = jnp.take_along_axis(x, last, axis=1)[:, 0]
  real = jnp.arange(width).reshape(1, width) < count.reshape(batch, 1)
  rows = jnp.arange(batch).reshape(batch, 1)
  # Padding marks no token: it is sent past the vocabulary and dropped.
  seen = state.seen.at[rows, jnp.where(real, tokens, state.seen.shape[1])].set(True, mode="drop")
  state = State(cache, state.length + count, state.token, state.remaining, seen)
  return state, jnp.where(count.reshape(batch, 1) > 0, mine, hidden)


def decode(
  module: Llama,
  state: State,
  params: SamplingArrays,
  stop_ids: jax.Array,
  *,
  logprobs: bool,
) -> tuple[State, Output]:
  """What `Programs.decode` compiles: one step of all rows."""
  active = (state.remaining > 0).astype(jnp.int32)
  x, cache = module.hidden(state.token[:, None], state.cache, Span(state.length, active))
  state = State(cache, state.length + active, state.token, state.remaining, state.seen)
  return _sample(module, state, x[:, 0], params, state.remaining, stop_ids, logprobs=logprobs)


def _sample(
  module: Llama,
  state: State,
  hidden: jax.Array,
  params: SamplingArrays,
  limit: jax.Array,
  stop_ids: jax.Array,
  *,
  logprobs: bool,
) -> tuple[State, Output]:
  """Samples one token for each row that may still have one (`limit` > 0)."""
  logits = module.unembed(hidden)
  token = sample(logits, params, state.seen, state.length)
  active = limit > 0
  stopped = jnp.any(token[:, None] == stop_ids[None, :], axis=-1)
  rows = jnp.arange(token.shape[0])
  new = State(
    cache=state.cache,
    length=state.length,
    token=jnp.where(active, token, state.token),
    remaining=jnp.where(active & ~stopped, limit - 1, 0),
    seen=state.seen.at[rows, token].max(active),
  )
  output = jnp.where(active, token, -1)
  if not logprobs:
    return new, Output(output)
  logp = jax.nn.log_softmax(logits, axis=-1)
  top, ids = jax.lax.top_k(logp, min(MAX_LOGPROBS, logp.shape[-1]))
  return new, Output(output, jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0], ids, top)
