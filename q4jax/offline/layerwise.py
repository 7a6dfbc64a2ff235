"""A model run a block at a time over its weights on disk, every matrix's input in view.

Calibration needs what flows into each matrix, and a model may not fit into memory: so only the
hidden states of all sequences stay, and one block's weights come and go. A quantised block can run
in place of the one on disk, and those after it then see what it makes of its input.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from q4jax.config import LlamaConfig
from q4jax.errors import PromptError
from q4jax.formats.checkpoint import Checkpoint, floats
from q4jax.model.caches import Span
from q4jax.model.layers import Matmul, RMSNorm
from q4jax.model.llama import Block
from q4jax.model.rope import cos_sin
from q4jax_kernels.block_array import block_shape, dequantize_blocks

# The matrices of a block that share an input, in the order in which they run; the input has the
# name of the first.
SHARED = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
_INPUT_OF = {matrix: shared[0] for shared in SHARED for matrix in shared}
# Tokens that run through a block together; it bounds the memory of what flows in it.
_CALL_TOKENS = 2048

Weights = Mapping[str, jax.Array]


def input_of(name: str) -> str:
  """The name of what flows into a matrix: that of the first matrix that takes it.

  "blk.3.attn_v.weight" takes "blk.3.attn_q"; the head takes "output", be it the embedding table.
  """
  block, _, rest = name.removesuffix(".weight").rpartition(".")
  return f"{block}.{_INPUT_OF.get(rest, rest)}" if block else "output"


def takes_input(name: str, config: LlamaConfig) -> bool:
  """Whether a matrix is multiplied with something: an embedding table may only be looked up."""
  return config.tied or name != "token_embd.weight"


@dataclass(frozen=True)
class Flow:
  """What went through a block with some sequences [B, T].

  Attributes:
    inputs: float32[B, T, K] by the name of the first matrix that takes it: attn_q, attn_output,
      ffn_gate, ffn_down.
    keys, values: float32[B, K, T, H], RoPE applied.
  """

  inputs: dict[str, jax.Array]
  keys: jax.Array
  values: jax.Array


class LayerRunner:
  """The hidden states of all sequences, and blocks that move them on.

  Memory: 4 bytes for each of B * T * D hidden values, in memory or, with a `folder`, in a file that
  is mapped from it; besides, one block in float32 and what 2048 tokens make of it.

  Attributes:
    hidden: float32[B, T, D], what flows into the next block.
    index: of the next block.
  """

  def __init__(self, checkpoint: Checkpoint, tokens: NDArray[np.int32], folder: Path | None = None):
    """Embeds the tokens int32[B, T]: whole sequences, each with BOS first if the model wants it.

    Raises:
      PromptError: no tokens, more than the model's context, or ids outside the vocabulary.
    """
    config = checkpoint.config
    if tokens.ndim != 2 or not tokens.size or tokens.shape[1] > config.context_length:
      raise PromptError(
        f"calibration takes sequences of tokens, int32[B, T] of 1 to {config.context_length} "
        f"tokens each; got shape {list(tokens.shape)}. Give more text, or a smaller ctx."
      )
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
      raise PromptError(
        f"token ids of {tokens.min()} to {tokens.max()} do not fit the vocabulary of "
        f"{config.vocab_size}; was the text tokenised for another model?"
      )
    self.checkpoint, self.config, self.index = checkpoint, config, 0
    shape = (*tokens.shape, config.d_model)
    self.hidden: NDArray[np.float32] = (
      np.empty(shape, np.float32)
      if folder is None
      else np.memmap(folder / "hidden.f32", np.float32, "w+", shape=shape)
    )
    self.hidden[:] = _embed(checkpoint, tokens)
    self.batch = max(1, _CALL_TOKENS // tokens.shape[1])
    self._rope_factors = (
      jnp.asarray(floats(checkpoint, "rope_freqs.weight")) if config.rope_factors else None
    )

  @property
  def prefix(self) -> str:
    """Of the next block's tensors."""
    return f"blk.{self.index}."

  def read_block(self) -> dict[str, jax.Array]:
    """The next block's parameters in float32, by their names without the prefix."""
    names = [name for name in self.checkpoint.tensors if name.startswith(self.prefix)]
    weights = {}
    for name in names:
      weights[name.removeprefix(self.prefix)] = jnp.asarray(floats(self.checkpoint, name))
      self.checkpoint.release(name)
    return weights

  def flows(self, weights: Weights) -> Iterator[Flow]:
    """What flows through the next block with these weights, some sequences at a time."""
    for begin in range(0, len(self.hidden), self.batch):
      yield self._run(weights, begin)[1]

  def advance(self, weights: Weights, visit: Callable[[Flow], None] | None = None) -> None:
    """Moves all sequences through the next block; `visit` sees what flows."""
    for begin in range(0, len(self.hidden), self.batch):
      hidden, flow = self._run(weights, begin)
      if visit is not None:
        visit(flow)
      self.hidden[begin : begin + self.batch] = hidden
    self.index += 1

  def head_inputs(self) -> Iterator[jax.Array]:
    """After the last block: what flows into the output matrix, float32[B, T, D] at a time."""
    norm = RMSNorm(jnp.asarray(floats(self.checkpoint, "output_norm.weight")), self.config.norm_eps)
    for begin in range(0, len(self.hidden), self.batch):
      yield norm(jnp.asarray(self.hidden[begin : begin + self.batch]))

  def _run(self, weights: Weights, begin: int) -> tuple[NDArray[np.float32], Flow]:
    part = self.hidden[begin : begin + self.batch]
    # The last call has as many sequences as all others, so that one program serves them all.
    filled = np.zeros((self.batch, *part.shape[1:]), np.float32)
    filled[: len(part)] = part
    hidden, inputs, keys, values = _block(
      self.config, dict(weights), jnp.asarray(filled), self._rope_factors
    )
    n = len(part)
    flow = Flow({name: x[:n] for name, x in inputs.items()}, keys[:n], values[:n])
    return np.asarray(hidden)[:n], flow


@dataclass(frozen=True)
class _Tap(Matmul):
  """A product that remembers what it was given."""

  seen: list[jax.Array] = field(default_factory=list)

  def __call__(self, x: jax.Array, weights: list[nnx.Variable]) -> list[jax.Array]:
    self.seen.append(x)
    return super().__call__(x, weights)


@partial(jax.jit, static_argnums=0)
def _block(
  config: LlamaConfig, weights: dict[str, jax.Array], x: jax.Array, factors: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array, jax.Array]:
  """One block over x [B, T, D]: x after it, the inputs of its matrices, keys and values."""
  tap = _Tap()
  block = Block(config, lambda name, _: weights[name.removeprefix("blk.0.")], 0, tap)
  b, t, _ = x.shape
  cos, sin = cos_sin(jnp.arange(t, dtype=jnp.int32).reshape(1, -1), config, factors)
  empty = jnp.zeros((1, b, config.num_kv_heads, t, config.head_dim), jnp.float32)
  span = Span(jnp.zeros(b, jnp.int32), jnp.full(b, t, jnp.int32))
  x, cache = block(x, cos, sin, (empty, empty), span)
  keys, values = cast(tuple[jax.Array, jax.Array], cache)
  inputs = {shared[0]: seen for shared, seen in zip(SHARED, tap.seen, strict=True)}
  return x, inputs, keys[0], values[0]


def _embed(checkpoint: Checkpoint, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
  """float32[B, T, D]; of the table only the rows in use are decoded."""
  name = "token_embd.weight"
  tensor = checkpoint.tensors[name]
  ids, places = np.unique(tokens, return_inverse=True)
  rows = np.concatenate([checkpoint.rows(name, i, i + 1) for i in ids.tolist()])
  checkpoint.release(name)
  _, block_bytes = block_shape(tensor.format)
  blocks = cast(jax.Array, rows.reshape(len(ids), -1, block_bytes))
  table = np.asarray(dequantize_blocks(blocks, tensor.format)).reshape(len(ids), -1)
  return table[places.reshape(tokens.shape)]
