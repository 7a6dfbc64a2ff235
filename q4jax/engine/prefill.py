"""Reading prompts: in chunks, from where what a pool knows of them ends."""

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.buckets import bucket
from q4jax.engine.programs import Programs, State, new_state
from q4jax.kv.compress import restore
from q4jax.kv.store import KVStore, Prefixes
from q4jax.model.caches import Recording

if TYPE_CHECKING:
  from q4jax.engine.engine import Engine

_restore = jax.jit(restore, static_argnames="kv", donate_argnames="cache")


def prefill(
  engine: "Engine",
  programs: Programs,
  ids: list[np.ndarray],
  batch: int,
  slots: int,
  prefixes: Prefixes | None = None,
  store: KVStore | None = None,
) -> tuple[State, jax.Array]:
  """Runs all prompts through a new dense cache; the state, and each prompt's last hidden state.

  Args:
    batch, slots: of the cache; rows behind the prompts stay empty.
    prefixes: what `store` has of them, which is not read again.
  """
  config = engine.model.config
  # Placed where the programs' results will be: else the second call would compile again.
  state, hidden = jax.device_put(
    (
      new_state(config, batch, slots, engine.kv_dtype, engine.kv),
      jnp.zeros((batch, config.d_model), jnp.float32),
    ),
    next(iter(engine.model.leaves[0].devices())),
  )

  def read(
    state: State, hidden: jax.Array, begin: np.ndarray, end: np.ndarray
  ) -> tuple[State, jax.Array]:
    """Tokens begin[b] to end[b] - 1 of each row."""
    for at in range(0, int((end - begin).max()), engine.prefill_chunk):
      width = min(engine.prefill_chunk, bucket(int((end - begin).max()) - at, least=16))
      tokens, count = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
      for b, row in enumerate(ids):
        part = row[begin[b] + at : min(begin[b] + at + width, end[b])]
        tokens[b, : len(part)], count[b] = part, len(part)
      state, hidden = programs.prefill(engine.model.leaves, state, tokens, count, hidden)
    return state, hidden

  begin, end = np.zeros(batch, np.int64), np.array([len(row) for row in ids])
  end = np.pad(end, (0, batch - len(ids)))
  if prefixes is not None and store is not None and prefixes.tokens.any():
    begin[: len(ids)] = prefixes.tokens
    sinks = np.where(begin > 0, store.kv.protect.sink, 0)
    state, hidden = read(state, hidden, begin * 0, sinks)
    state = _restored(state, ids, begin, prefixes, store)
  return read(state, hidden, begin, end)


def _restored(
  state: State, ids: list[np.ndarray], begin: np.ndarray, prefixes: Prefixes, store: KVStore
) -> State:
  """The state with the known tokens behind the sinks in the dense cache."""
  kv = store.kv
  assert isinstance(state.cache, Recording)
  cache = state.cache.cache
  known = np.array([found.shape[1] for found in prefixes.blocks])
  slots = cache[0].shape[3]
  width = min(bucket(int(known.max())), (slots - kv.protect.sink) // kv.block_size)
  table = np.zeros((len(cache[0]), len(begin), width), np.int32)
  seen = np.zeros(state.seen.shape, bool)
  for b, found in enumerate(prefixes.blocks):
    table[:, b, : known[b]] = found
    seen[b, ids[b][: begin[b]]] = True
  arrays = store.take()
  cache = _restore(
    cache,
    *arrays[:2],
    jnp.asarray(table),
    jnp.asarray(np.pad(known, (0, len(begin) - len(known)))),
    kv=kv,
  )
  store.put(arrays, ())
  length = jnp.where(begin > 0, jnp.asarray(begin, jnp.int32), state.length)
  return _placed(state, Recording(cache), length, seen)


@partial(jax.jit, donate_argnums=(0, 1))
def _placed(state: State, cache: Recording, length: jax.Array, seen: jax.Array) -> State:
  return State(cache, length, state.token, state.remaining, state.seen | seen)
