"""A model on disk as named tensors: what every format of files here is read as.

Tensors have their GGUF names and types, whatever the file calls them, and their rows are in the
order of memory (see rope_rows): code above this line meets one convention.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, cast

import jax
import numpy as np
from numpy.typing import NDArray

from q4jax.config import LlamaConfig
from q4jax_kernels.block_array import block_shape, dequantize_blocks

FLOAT_FORMATS = ("f32", "f16", "bf16")
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Tensor:
  """What a tensor is, wherever it lies.

  Attributes:
    name: as GGUF has it, e.g. blk.0.attn_q.weight.
    shape: (N rows, K columns) of a matrix, (N,) of a vector, which is one row.
    format: of its bytes: "f32", "f16", "bf16", a GGUF block format ("q4_k") or a group-wise one
      ("q4s128_f16"); see `q4jax_kernels.block_array.block_shape`.
  """

  name: str
  shape: tuple[int, ...]
  format: str

  @property
  def num_rows(self) -> int:
    """N of a matrix, 1 for a vector."""
    return math.prod(self.shape[:-1])

  @property
  def row_bytes(self) -> int:
    block_size, block_bytes = block_shape(self.format)
    return self.shape[-1] // block_size * block_bytes

  @property
  def nbytes(self) -> int:
    return self.num_rows * self.row_bytes


class Checkpoint(Protocol):
  """An open model; a context manager.

  Attributes:
    path: where it is, for messages.
    config: the model's dimensions.
    metadata: GGUF keys and values, the tokenizer's among them.
    tensors: by name.
  """

  path: str
  config: LlamaConfig
  metadata: Mapping[str, Any]
  tensors: Mapping[str, Tensor]

  def rows(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
    """Rows start..stop-1 of a tensor (all if None): uint8[rows, row_bytes], read-only.

    Raises:
      FormatError: the file cannot give them.
    """
    ...

  def release(self, name: str) -> None:
    """Gives back the memory that reading this tensor took; it can be read again."""
    ...

  def close(self) -> None:
    """Closes the files; arrays that `rows` gave stay valid."""
    ...

  def __enter__(self) -> Self: ...

  def __exit__(self, *error: object) -> None: ...


class Sink(Protocol):
  """A model being written; a context manager.

  What it writes has a temporary name until the `with` block ends without an error: then every
  tensor must have been written, it is flushed to the disk, and takes its own name in one step,
  replacing what was there. After an error nothing of it is left.
  """

  def write(self, tensor: Tensor, rows: Bytes) -> None:
    """Writes one of the tensors the sink was opened for; rows as `Checkpoint.rows` gives them."""
    ...

  def __enter__(self) -> Self: ...

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
    /,
  ) -> None: ...


def floats(
  checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None
) -> NDArray[np.float32]:
  """Rows of a tensor as float32[rows, K]; a vector as float32[N]."""
  tensor = checkpoint.tensors[name]
  rows = checkpoint.rows(name, start, stop)
  _, block_bytes = block_shape(tensor.format)
  blocks = cast(jax.Array, rows.reshape(len(rows), -1, block_bytes))  # NumPy in, NumPy out.
  values = np.asarray(dequantize_blocks(blocks, tensor.format))
  return values.reshape(tensor.shape if len(tensor.shape) == 1 else (len(rows), -1))
