"""How well a model predicts a text: perplexity by llama.cpp's protocol, and losses by position.

The protocol (llama.cpp, tools/perplexity): the tokens are cut into chunks of `ctx`; each chunk is
read from an empty cache, its first token replaced by BOS where the model wants one; the tokens of
its second half but the first are scored, each given all before it in the chunk. What is left over
at the end is dropped. Figures therefore compare with those that llama-perplexity prints.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.errors import ConfigError, PromptError
from q4jax.model.caches import KVCache, Span
from q4jax.model.llama import Llama
from q4jax.model.model import Model

# Tokens of a sequence that pass through the layers together; a power of two.
_WIDTH = 256
# Most bytes of logits that exist at once.
_LOGITS_BYTES = 64 << 20
# Tokens in one call of the program unless the caller says otherwise, as llama-perplexity's batch.
_CALL_TOKENS = 2048


@dataclass(frozen=True)
class PerplexityResult:
  """What `perplexity` measured.

  Attributes:
    ppl: exp(nll).
    stderr: of ppl, to first order: ppl times the standard error of the mean.
    nll: mean negative log-likelihood of a scored token, in nats.
    chunks: chunks evaluated.
    tokens: tokens scored.
    ctx: tokens in a chunk.
  """

  ppl: float
  stderr: float
  nll: float
  chunks: int
  tokens: int
  ctx: int


def perplexity(
  model: Model,
  text: str | Sequence[int] | np.ndarray,
  ctx: int = 512,
  chunks: int | None = None,
  batch: int | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
  """The perplexity of a text, as llama-perplexity would print it.

  Args:
    text: a str, tokenised as llama-perplexity does (one newline at its end dropped, special tokens
      in the text taken as text); or token ids of the whole text, with BOS where the model wants it.
    ctx: tokens in a chunk.
    chunks: evaluate only this many from the start; all if None or more than there are.
    batch: chunks in one call of the compiled program; about 2048 tokens of them if None. It affects
      speed and memory alone.
    progress: called with the chunks done and the chunks in all.

  Raises:
    PromptError: the text is shorter than two chunks, or an id is outside the vocabulary.
    ConfigError: ctx, chunks or batch out of range.
  """
  if batch is not None and batch < 1:
    raise ConfigError(f"batch is {batch}; expected at least 1, or None.")
  rows = chunked(model, text, ctx, chunks)
  total = len(rows)
  batch = min(batch or max(1, _CALL_TOKENS // ctx), total)
  parts = []
  for begin in range(0, total, batch):
    # The last call repeats its last chunk, so that one program serves all calls.
    index = np.minimum(np.arange(begin, begin + batch), total - 1)
    parts.append(_losses(model, rows[index], ctx // 2)[: total - begin])
    if progress is not None:
      progress(min(begin + batch, total), total)
  return _summary(np.concatenate(parts).astype(np.float64), ctx)


def chunked(
  model: Model, text: str | Sequence[int] | np.ndarray, ctx: int, chunks: int | None = None
) -> np.ndarray:
  """The chunks that `perplexity` reads, int32[chunks, ctx]; arguments and errors are its own."""
  limit = model.config.context_length
  if not 4 <= ctx <= limit:
    raise ConfigError(f"ctx is {ctx}; expected 4 to {limit}, the context of this model.")
  if chunks is not None and chunks < 1:
    raise ConfigError(f"chunks is {chunks}; expected at least 1, or None.")
  tokens = _tokens(model, text, ctx)
  total = min(chunks or len(tokens), len(tokens) // ctx)
  rows = tokens[: total * ctx].reshape(total, ctx).copy()
  bos = model.tokenizer.encode_parts([], add_eos=False)
  rows[:, : len(bos)] = bos
  return rows


def token_nll(model: Model, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
  """-log p(token t + 1 | tokens 0..t) in nats: int[T] or int[B, T] -> float32[B, T - 1].

  Nothing is added to the tokens: begin them with BOS where the model wants it.

  Raises:
    PromptError: fewer than two tokens, more than the model's context, ids outside the vocabulary.
  """
  array = np.atleast_2d(np.asarray(tokens))
  limit = model.config.context_length
  if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
    raise PromptError(
      f"token_nll takes token ids of shape [T] or [B, T]; got {array.dtype} of shape "
      f"{list(array.shape)}."
    )
  if not 2 <= array.shape[1] <= limit or not len(array):
    raise PromptError(
      f"token_nll got {len(array)} sequence(s) of {array.shape[1]} tokens; expected at least one, "
      f"of 2 to {limit} tokens (the model's context)."
    )
  model.check_ids(array)
  return _losses(model, array.astype(np.int32), 0)


def _tokens(model: Model, text: str | Sequence[int] | np.ndarray, ctx: int) -> np.ndarray:
  if isinstance(text, str):
    text = model.tokenizer.encode_parts([text.removesuffix("\n")], add_eos=False)
  tokens = np.asarray(text)
  if tokens.size < 2 * ctx:
    raise PromptError(
      f"the text has {tokens.size} tokens; a perplexity with ctx={ctx} needs at least {2 * ctx}. "
      "Give a longer text, or a smaller ctx."
    )
  if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
    raise PromptError(
      f"perplexity takes text or a flat list of token ids; got {tokens.dtype} of shape "
      f"{list(tokens.shape)}."
    )
  model.check_ids(tokens)
  return tokens.astype(np.int32)


def _summary(losses: np.ndarray, ctx: int) -> PerplexityResult:
  """losses float64[chunks, scored tokens]; the formulas are llama-perplexity's."""
  mean, count = float(losses.mean()), losses.size
  variance = max(float(np.square(losses).mean()) - mean**2, 0.0)
  ppl = math.exp(mean)
  stderr = ppl * math.sqrt(variance / max(count - 1, 1))
  return PerplexityResult(ppl, stderr, mean, len(losses), count, ctx)


# One compiled program for each model that is still in use.
_PROGRAMS: weakref.WeakKeyDictionary[Model, Callable] = weakref.WeakKeyDictionary()


def _losses(model: Model, tokens: np.ndarray, first: int) -> np.ndarray:
  """float32[B, T - 1 - first]: the losses of the tokens after position `first`."""
  if model not in _PROGRAMS:
    _PROGRAMS[model] = model.jit(_nll, static_argnums=2)
  return np.asarray(_PROGRAMS[model](model.leaves, jnp.asarray(tokens), first))


def _nll(module: Llama, tokens: jax.Array, first: int) -> jax.Array:
  """tokens int32[B, T] -> float32[B, T - 1 - first].

  The sequence goes through the layers a window at a time, over a float32 cache, so that neither the
  attention's [T, T] nor all logits ever exist.
  """
  config, (batch, length) = module.config, tokens.shape
  width = min(_WIDTH, max(64, 1 << (length - 2).bit_length()))
  steps = -(-(length - 1) // width)

  def windows(x: jax.Array) -> jax.Array:
    padded = jnp.pad(x, ((0, 0), (0, steps * width - (length - 1))))
    return padded.reshape(batch, steps, width).swapaxes(0, 1)

  def step(
    cache: KVCache, window: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[KVCache, jax.Array]:
    start, inputs, targets = window
    count = jnp.minimum(length - 1 - start, width)
    ones = jnp.ones((batch,), jnp.int32)
    hidden, cache = module.hidden(inputs, cache, Span(start * ones, count * ones))
    scored = start + width > first
    losses = jax.lax.cond(
      scored,
      lambda: _window_nll(module, hidden, targets),
      lambda: jnp.zeros((batch, width), jnp.float32),
    )
    return cache, losses

  shape = (config.num_layers, batch, config.num_kv_heads, steps * width, config.head_dim)
  empty: KVCache = (jnp.zeros(shape), jnp.zeros(shape))
  starts = width * jnp.arange(steps, dtype=jnp.int32)
  _, losses = jax.lax.scan(step, empty, (starts, windows(tokens[:, :-1]), windows(tokens[:, 1:])))
  return losses.swapaxes(0, 1).reshape(batch, -1)[:, first : length - 1]


def _window_nll(module: Llama, hidden: jax.Array, targets: jax.Array) -> jax.Array:
  """hidden float32[B, W, D], targets int32[B, W] -> float32[B, W]; logits a slice at a time."""
  batch, width, d_model = hidden.shape
  rows = width
  while rows > 16 and 4 * rows * module.config.vocab_size > _LOGITS_BYTES:
    rows //= 2

  def slice_nll(part: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, target = part
    logits = module.unembed(x)
    chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen

  parts = hidden.reshape(-1, rows, d_model), targets.reshape(-1, rows)
  return jax.lax.map(slice_nll, parts).reshape(batch, width)
