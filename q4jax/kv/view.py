"""What a policy sees of a prompt and what it leaves, to be looked at: pictures, not generation."""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.kv.compress import attention, context_of, decide, spilled_after
from q4jax.kv.config import KVConfig
from q4jax.model.caches import Recording, Span
from q4jax.model.llama import Llama
from q4jax.model.model import Model

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PromptView:
  """One prompt of S tokens, read by L layers with N query heads and K KV heads.

  Attributes:
    attention: float32[L, N, S], what each slot gets from the last `queries` queries, their mean;
      sums to 1 over S.
    score: float32[L, K, S], the policy's; None without one.
    kept: bool[L, S], what attention still sees after the prompt: sinks, the ring, and what was
      chosen of the rest.
    dense: bool[S], sinks and ring: kept in floats, whatever the score.
  """

  attention: Floats
  score: Floats | None
  kept: NDArray[np.bool_]
  dense: NDArray[np.bool_]


def view_prompt(model: Model, tokens: NDArray, kv: KVConfig, queries: int = 32) -> PromptView:
  """Reads int[S] densely and asks the policy of `kv`.

  Raises:
    ConfigError: fewer tokens than queries, or a cache that the model cannot have.
    PromptError: ids outside the vocabulary.
  """
  kv.check(model.config)
  tokens = np.asarray(tokens)
  limit = model.config.context_length
  if tokens.ndim != 1 or not 1 <= queries <= len(tokens) <= limit:
    raise ConfigError(
      f"tokens have the shape {list(tokens.shape)}; expected one prompt of {queries} (the queries "
      f"to look at) to {limit} tokens."
    )
  model.check_ids(tokens)
  if model not in _PROGRAMS:
    _PROGRAMS[model] = model.jit(_read, static_argnums=(2, 3))
  arrays = _PROGRAMS[model](model.leaves, jnp.asarray(tokens[None], jnp.int32), kv, queries)
  mass, score, chosen = (None if a is None else np.asarray(a) for a in arrays)
  first, spilled = kv.protect.sink, int(spilled_after(np.array([len(tokens)]), kv)[0])
  slot = np.arange(len(tokens))
  dense = (slot < first) | (slot >= first + spilled)
  assert mass is not None and chosen is not None
  return PromptView(mass, score, chosen | dense, dense)


# Compiled once for each model, length and configuration.
_PROGRAMS: WeakKeyDictionary[Model, Callable] = WeakKeyDictionary()


def _read(
  module: Llama, tokens: jax.Array, kv: KVConfig, count: int
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """tokens int32[1, S] -> attention [L, N, S], scores [L, K, S], what leaves the ring and stays."""
  c, (_, s) = module.config, tokens.shape
  shape = (c.num_layers, 1, c.num_kv_heads, s, c.head_dim)
  needed = kv.recording((jnp.zeros(shape), jnp.zeros(shape)), c.num_heads)
  wide = max(count, kv.window)
  queries = jnp.zeros((c.num_layers, 1, wide, c.num_heads, c.head_dim))
  length = jnp.full(1, s, jnp.int32)
  _, read = module.hidden(
    tokens, Recording(needed.cache, queries, needed.mass), Span(jnp.zeros_like(length), length)
  )
  assert isinstance(read, Recording) and read.queries is not None
  pos, keys = jnp.arange(s, dtype=jnp.int32)[None], read.cache[0]
  mass = [
    attention(read.queries[i][:, wide - count :], keys[i], pos, length)[0].mean(axis=1)
    for i in range(c.num_layers)
  ]
  known = read.queries[:, :, wide - kv.window :] if kv.window else None
  prompt = Recording(read.cache, known, read.mass)
  score = None
  if kv.policy is not None:
    policy, valid = kv.policy, jnp.ones((1, s), bool)
    score = jnp.stack(
      [
        policy(context_of(*layer, pos, valid, length, kv))[0]  # type: ignore[call-arg]
        for layer in zip(*_layers(prompt), strict=True)
      ]
    )
  return jnp.stack(mass), score, decide(prompt, length, kv)[:, 0]


def _layers(prompt: Recording) -> list[list]:
  """Keys, values, queries and mass, each a list with an entry for each layer."""
  count = len(prompt.cache[0])
  arrays = (*prompt.cache, prompt.queries, prompt.mass)
  return [[None] * count if a is None else list(a) for a in arrays]
