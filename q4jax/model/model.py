"""A loaded model: the Flax module, its tokenizer, and its compiled pure functions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from q4jax.config import LlamaConfig
from q4jax.errors import PromptError
from q4jax.model.llama import Llama, num_params
from q4jax.text.tokenizer import Tokenizer

# Lengths are padded to a multiple of this, so that few programs are compiled.
_LOGITS_BUCKET = 64


class Model:
  """What `q4jax.load` returns.

  Attributes:
    module: the Flax module.
    config: its dimensions.
    tokenizer: text to tokens and back.
    metadata: the file's metadata without the vocabulary.
    path: where it came from.
  """

  def __init__(
    self, module: Llama, tokenizer: Tokenizer, metadata: Mapping[str, Any], path: str
  ) -> None:
    self.module, self.tokenizer, self.metadata, self.path = module, tokenizer, metadata, path
    self.config: LlamaConfig = module.config
    self._graphdef, state = nnx.split(module)
    # Each array that passes the jit boundary costs time at every call, and a Flax state costs more
    # than a flat list (docs/adr/0006): so a flat list, with all norms and biases in one array.
    leaves, treedef = jax.tree.flatten(state)
    self.leaves, self._unpack = _pack(leaves)
    self._treedef = treedef

  def jit(self, function: Callable, **options: Any) -> Callable:
    """Compiles `function(module, *args)` to a function of `(leaves, *args)`.

    The result holds on to the module's structure alone, neither to this model nor to its weights.
    """
    graphdef, treedef, unpack = self._graphdef, self._treedef, self._unpack

    def call(leaves: list[jax.Array], *args: Any) -> Any:
      return function(nnx.merge(graphdef, jax.tree.unflatten(treedef, unpack(leaves))), *args)

    return jax.jit(call, **options)

  def logits(self, tokens: Any) -> jax.Array:
    """Logits of every position: int[T] or int[B, T] -> float32[B, T, V]. No cache, no sampling.

    Raises:
      PromptError: no tokens, ids outside the vocabulary, or more than two dimensions.
    """
    array = np.atleast_2d(np.asarray(tokens))
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
      raise PromptError(
        f"logits takes token ids of shape [T] or [B, T], at least one; got {array.dtype} of shape "
        f"{list(array.shape)}."
      )
    self.check_ids(array)
    length = array.shape[1]
    padded = np.pad(array.astype(np.int32), ((0, 0), (0, -length % _LOGITS_BUCKET)))
    return self._logits(self.leaves, jnp.asarray(padded))[:, :length]

  @functools.cached_property
  def _logits(self) -> Callable:
    return self.jit(lambda module, tokens: module(tokens))

  def check_ids(self, ids: np.ndarray) -> None:
    """Raises PromptError where an id is not in the vocabulary."""
    vocab = self.config.vocab_size
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
      bad = ids[(ids < 0) | (ids >= vocab)].flat[0]
      raise PromptError(f"token id {bad} is outside the vocabulary of {vocab} (0..{vocab - 1}).")

  @property
  def num_params(self) -> int:
    """Weights, each quantised value counted as one."""
    return num_params(self.module)

  @property
  def nbytes(self) -> int:
    """Bytes the weights take in memory."""
    return sum(leaf.nbytes for leaf in self.leaves)


def _pack(
  arrays: list[jax.Array],
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], list[jax.Array]]]:
  """The arrays with all float32 vectors joined to one, first; and the function that undoes it."""
  is_vector = [a.ndim == 1 and a.dtype == jnp.float32 for a in arrays]
  vectors = [a for a, small in zip(arrays, is_vector, strict=True) if small]
  if not vectors:
    return arrays, lambda packed: packed
  ends = np.cumsum([v.size for v in vectors])[:-1].tolist()

  def unpack(packed: list[jax.Array]) -> list[jax.Array]:
    small, large = iter(jnp.split(packed[0], ends)), iter(packed[1:])
    return [next(small) if vector else next(large) for vector in is_vector]

  matrices = [a for a, small in zip(arrays, is_vector, strict=True) if not small]
  return [jnp.concatenate(vectors), *matrices], unpack
