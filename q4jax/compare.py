"""How far one model's predictions are from another's, on the same tokens.

As llama-perplexity's --kl-divergence: chunks of `ctx` tokens, each from an empty cache with BOS
first where the model wants it, the tokens of the second half scored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.evaluate import chunked
from q4jax.model.model import Model


@dataclass(frozen=True)
class Comparison:
  """Means over the scored tokens; logarithms are natural.

  Attributes:
    ppl, reference_ppl: perplexities.
    ratio_stderr: standard error of ppl / reference_ppl, from paired differences of the tokens.
    kl, kl_stderr: KL(reference || model), the divergence of the predictions.
    kl_p99: its 99th percentile over tokens.
    top1: share of tokens where both find the same successor likeliest.
    tokens: scored.
  """

  ppl: float
  reference_ppl: float
  ratio_stderr: float
  kl: float
  kl_stderr: float
  kl_p99: float
  top1: float
  tokens: int

  @property
  def ratio(self) -> float:
    return self.ppl / self.reference_ppl


class Reference:
  """What a model predicts for a text, kept to compare others with.

  Memory: 4 bytes for each scored token and word of the vocabulary.
  """

  def __init__(
    self, model: Model, text: Any, ctx: int = 512, chunks: int | None = None,
    progress: Callable[[int, int], None] | None = None,
  ) -> None:  # fmt: skip
    """Args: as `q4jax.evaluate.perplexity`, which also says what it raises."""
    self.rows = chunked(model, text, ctx, chunks)
    self.vocab_size = model.config.vocab_size
    self.log_probs: list[NDArray[np.float32]] = []
    for i, row in enumerate(self.rows):
      self.log_probs.append(np.asarray(_log_probs(model, row)))
      if progress is not None:
        progress(i + 1, len(self.rows))

  def compare(self, model: Model, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """A model with the same vocabulary beside the reference.

    Raises:
      ConfigError: its vocabulary has another size.
    """
    if model.config.vocab_size != self.vocab_size:
      raise ConfigError(
        f"{model.path} has a vocabulary of {model.config.vocab_size} where the reference has "
        f"{self.vocab_size}: the two cannot be compared token by token. Take one model's variants."
      )
    parts = []
    for i, (row, expected) in enumerate(zip(self.rows, self.log_probs, strict=True)):
      targets = jnp.asarray(row[len(row) - len(expected) :])
      parts.append(np.asarray(_distance(jnp.asarray(expected), _log_probs(model, row), targets)))
      if progress is not None:
        progress(i + 1, len(self.rows))
    return _summary(np.concatenate(parts, axis=1).astype(np.float64))


def _log_probs(model: Model, row: NDArray[np.int32]) -> jax.Array:
  """float32[scored, V]: the prediction of each token of the second half but its first."""
  first = len(row) // 2
  return _normalise(model.logits(row)[0, first : len(row) - 1])


@jax.jit
def _normalise(logits: jax.Array) -> jax.Array:
  return jax.nn.log_softmax(logits, axis=-1)


@jax.jit
def _distance(p: jax.Array, q: jax.Array, targets: jax.Array) -> jax.Array:
  """Log probabilities [T, V] and what came, int32[T] -> float32[4, T]: both losses, KL, top-1."""
  kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  chosen = [-jnp.take_along_axis(x, targets[:, None], axis=-1)[:, 0] for x in (q, p)]
  same = (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(jnp.float32)
  return jnp.stack([*chosen, jnp.maximum(kl, 0), same])


def _summary(figures: NDArray[np.float64]) -> Comparison:
  loss, expected, kl, same = figures
  count = loss.size

  def stderr(x: NDArray[np.float64]) -> float:
    return float(x.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0

  ppl, reference = float(np.exp(loss.mean())), float(np.exp(expected.mean()))
  return Comparison(
    ppl=ppl,
    reference_ppl=reference,
    ratio_stderr=ppl / reference * stderr(loss - expected),
    kl=float(kl.mean()),
    kl_stderr=stderr(kl),
    kl_p99=float(np.percentile(kl, 99)),
    top1=float(same.mean()),
    tokens=count,
  )
