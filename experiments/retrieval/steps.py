"""Held-out samples read by a model, and stepped through over a cache of any kind."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.retrieval.tasks import EOS, TASKS, Ints, Sizes, dialogue, held_out
from q4jax.kv.cache import CompressedKV
from q4jax.kv.config import KVConfig
from q4jax.kv.store import KVStore
from q4jax.model.caches import Compressed, KVCache, Recording, Span
from q4jax.model.llama import Llama
from q4jax.model.model import Model

# Whether the questions are read before the cache is compressed, too.
MODES = {"agnostic": False, "aware": True}


@dataclass(frozen=True)
class Batch:
  """Samples of all tasks and modes, read: B = tasks * modes * size rows, by task, then mode.

  Attributes:
    prompt: the dense cache, and all that any policy may need: queries of all positions, mass.
    length: int[B], tokens of the prompts.
    rest: int32[B, T], what follows them, padded.
    count: int[B], how many of the T are real.
    scored: bool[B, T], which of them are answers.
  """

  prompt: Recording
  length: Ints
  rest: Ints
  count: Ints
  scored: np.ndarray


class Programs:
  """The model's compiled functions."""

  def __init__(self, model: Model) -> None:
    self.read: Callable = model.jit(_read, static_argnums=3)
    self.step: Callable = model.jit(_step)


def _read(module: Llama, tokens: jax.Array, length: jax.Array, slots: int) -> Recording:
  c, batch = module.config, len(tokens)
  zeros = jnp.zeros((c.num_layers, batch, c.num_kv_heads, slots, c.head_dim))
  queries = jnp.zeros((c.num_layers, batch, slots, c.num_heads, c.head_dim))
  empty = Recording((zeros, zeros), queries, zeros[..., 0])
  _, cache = module.hidden(tokens, empty, Span(jnp.zeros_like(length), length))
  assert isinstance(cache, Recording)
  return cache


def _step(
  module: Llama, cache: KVCache, tokens: jax.Array, at: jax.Array, running: jax.Array
) -> tuple[KVCache, jax.Array]:
  """One token of each row that is running; the cache and the likeliest next tokens int32[B]."""
  hidden, cache = module.hidden(tokens[:, None], cache, Span(at, running.astype(jnp.int32)))
  return cache, module.unembed(hidden[:, 0]).argmax(-1).astype(jnp.int32)


def read(
  model: Model, programs: Programs, seed: int, samples: int, size: int, sizes: Sizes
) -> list[Batch]:
  """So many held-out samples of each task and mode, `size` of each in a batch."""
  groups = [
    dialogue(held_out(task, seed, samples, sizes), twice)
    for task in TASKS
    for twice in MODES.values()
  ]
  longest = [max(texts[i].shape[1] for texts in groups) for i in (0, 1)]
  slots = -(-sum(longest) // 64) * 64

  def padded(rows: np.ndarray, width: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=EOS)

  batches = []
  for first in range(0, samples, size):
    part = slice(first, first + size)
    prompts, rests = (
      np.concatenate([padded(texts[i][part], longest[i]) for texts in groups]) for i in (0, 1)
    )
    length, count = (np.repeat([texts[i].shape[1] for texts in groups], size) for i in (0, 1))
    scored = np.stack([np.pad(s, (0, longest[1] - len(s))) for _, _, s in groups])
    model.check_ids(prompts)
    prompt = programs.read(model.leaves, prompts, jnp.asarray(length, jnp.int32), slots)
    scored = np.repeat(scored, size, axis=0)
    batches.append(Batch(prompt, length, rests, count, scored))
  return batches


def right(
  model: Model, programs: Programs, batch: Batch, kv: KVConfig | None
) -> tuple[np.ndarray, float]:
  """bool[B], rows all of whose answer tokens are right; the share of the prompts that stayed."""
  cache: KVCache = batch.prompt.cache
  compressed, kept = None, 1.0
  if kv is not None:
    queries = batch.prompt.queries
    assert queries is not None
    prompt = Recording(
      batch.prompt.cache,
      queries[:, :, -kv.window :] if kv.window else None,
      batch.prompt.mass if kv.mass else None,
    )
    # As many blocks as nothing evicted would need: all rows share a step's program.
    slots = prompt.cache[0].shape[3]
    blocks = 1 + model.config.num_layers * len(batch.length) * -(-slots // kv.block_size)
    store = KVStore(kv, model.config, blocks, next(iter(queries.devices())))
    compressed = CompressedKV(kv, model.config, prompt, batch.length, batch.count, store)
    cache, kept = compressed.state, compressed.usage.keep_ratio
  good = np.ones(len(batch.length), bool)
  for i in range(batch.rest.shape[1] - 1):
    running = i < batch.count
    at = jnp.asarray(batch.length + i, jnp.int32)
    if compressed is not None:
      assert isinstance(cache, Compressed)
      cache = compressed.before_step(cache, at, running)
    cache, said = programs.step(model.leaves, cache, batch.rest[:, i], at, running)
    good &= (np.asarray(said) == batch.rest[:, i + 1]) | ~batch.scored[:, i + 1]
  return good, kept
