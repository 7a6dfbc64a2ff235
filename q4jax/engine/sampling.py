"""Choosing the next token inside the compiled step: no sort, no recompilation between settings.

The order is Hugging Face's: repetition penalty, temperature, top-k, top-p, min-p; then the
Gumbel-max trick draws a block of tokens by its probability, and a token of the block: random
numbers for all of a vocabulary take longer than its softmax. Top-k and top-p find their threshold
by bisection over the bits of a float, 32 passes over the logits, exact up to ties (all values equal
to the threshold stay).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from q4jax.errors import ConfigError

_BLOCK = 256  # tokens


@dataclass(frozen=True)
class SamplingParams:
  """How one sequence is sampled. `temperature=0` is greedy.

  Attributes:
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens whose probabilities reach p; 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the likeliest; 0 keeps all.
    repetition_penalty: divides (or multiplies, if negative) the logits of tokens already in the
      prompt or the output; 1 is off (CTRL, arXiv 1909.05858).
    seed: two sequences with the same seed, prompt and settings get the same tokens, in whatever
      batch they run.
  """

  temperature: float = 0.7
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  seed: int = 0

  def __post_init__(self) -> None:
    for name, good, expected in (
      ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
      ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "a whole number, 0 or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
      ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 (1 is off)"),
      ("seed", 0 <= self.seed < 2**32 and self.seed == int(self.seed), "0 to 2^32 - 1"),
    ):
      if not good:
        raise ConfigError(f"{name} is {getattr(self, name)}; expected {expected}.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
  """`SamplingParams` of a batch, as traced values: one array [B] for each."""

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  repetition_penalty: jax.Array
  seed: jax.Array

  @classmethod
  def of(cls, params: list[SamplingParams]) -> "SamplingArrays":
    def column(name: str, dtype: jnp.dtype) -> jax.Array:
      return jnp.asarray([getattr(p, name) for p in params], dtype)

    return cls(
      temperature=column("temperature", jnp.float32),
      top_k=column("top_k", jnp.int32),
      top_p=column("top_p", jnp.float32),
      min_p=column("min_p", jnp.float32),
      repetition_penalty=column("repetition_penalty", jnp.float32),
      seed=column("seed", jnp.uint32),
    )


def sample(
  logits: jax.Array, params: SamplingArrays, seen: jax.Array, position: jax.Array
) -> jax.Array:
  """The next token of each row, int32[B].

  Args:
    logits: float32[B, V].
    seen: bool[B, V], tokens already in the sequence.
    position: int32[B], the sampled token's position, which with the seed fixes the draw.
  """
  logits = jax.lax.cond(
    jnp.any(params.repetition_penalty != 1), _penalise, lambda x, *_: x, logits, params, seen
  )
  greedy = _argmax(logits)
  return jax.lax.cond(
    jnp.any(params.temperature > 0),
    lambda: jnp.where(params.temperature > 0, _draw(logits, params, position), greedy),
    lambda: greedy,
  )


def _penalise(logits: jax.Array, params: SamplingArrays, seen: jax.Array) -> jax.Array:
  penalty = params.repetition_penalty[:, None]
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _draw(logits: jax.Array, params: SamplingArrays, position: jax.Array) -> jax.Array:
  # Greedy rows of the batch get any finite temperature; their draw is not used.
  scaled = logits / jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
  limited = jnp.any((params.top_k > 0) & (params.top_k < logits.shape[-1]))
  scaled = jax.lax.cond(limited, _top_k, lambda x, _: x, scaled, params)
  scaled = jax.lax.cond(jnp.any(params.top_p < 1), _top_p, lambda x, _: x, scaled, params)
  best = jnp.max(scaled, axis=-1, keepdims=True)
  scaled = jnp.where(scaled >= best + jnp.log(params.min_p)[:, None], scaled, -jnp.inf)
  blocks = _blocks(scaled)
  keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(params.seed, position)
  count = blocks.shape[1]
  noise = jax.vmap(lambda key: jax.random.gumbel(key, (count + _BLOCK,), jnp.float32))(keys)
  mass = jnp.sum(jnp.exp(blocks - best[:, :, None]), axis=-1)
  block = jnp.argmax(jnp.log(mass) + noise[:, :count], axis=-1)
  return _token(block, _taken(blocks, block) + noise[:, count:])


def _argmax(x: jax.Array) -> jax.Array:
  """As `jnp.argmax` of the last axis, int32[B]; XLA's own on a CPU goes element by element."""
  blocks = _blocks(x)
  block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
  return _token(block, _taken(blocks, block))


def _blocks(x: jax.Array) -> jax.Array:
  """float32[B, V] -> [B, ceil(V / 256), 256], filled up with -inf."""
  fill = -x.shape[1] % _BLOCK
  return jnp.pad(x, ((0, 0), (0, fill)), constant_values=-jnp.inf).reshape(len(x), -1, _BLOCK)


def _taken(blocks: jax.Array, block: jax.Array) -> jax.Array:
  """One block of each row, [B, 256]."""
  return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _token(block: jax.Array, scores: jax.Array) -> jax.Array:
  """The token with the highest of a block's scores, int32[B]."""
  return (block * _BLOCK + jnp.argmax(scores, axis=-1)).astype(jnp.int32)


def _top_k(logits: jax.Array, params: SamplingArrays) -> jax.Array:
  k = jnp.where(params.top_k > 0, params.top_k, logits.shape[-1])
  order = _ordered(logits)
  threshold = _largest(order, lambda above: jnp.sum(above, axis=-1) >= k)
  return jnp.where(order >= threshold[:, None], logits, -jnp.inf)


def _top_p(logits: jax.Array, params: SamplingArrays) -> jax.Array:
  p = jax.nn.softmax(logits, axis=-1)
  order = _ordered(p)
  # Rounding may leave the whole sum a little below 1: never ask for more than there is.
  goal = jnp.minimum(params.top_p, jnp.sum(p, axis=-1))
  threshold = _largest(order, lambda above: jnp.sum(jnp.where(above, p, 0.0), axis=-1) >= goal)
  keep = (order >= threshold[:, None]) | (params.top_p >= 1)[:, None]
  return jnp.where(keep, logits, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
  """Floats as uint32 that compare in the same order."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(order: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """The largest threshold uint32[B] for which `enough(order >= threshold)` holds in each row."""

  def bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
    attempt = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    return jnp.where(enough(order >= attempt[:, None]), attempt, threshold)

  return jax.lax.fori_loop(0, 32, bit, jnp.zeros(order.shape[0], jnp.uint32))
