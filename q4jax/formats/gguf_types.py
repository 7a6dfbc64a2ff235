"""The types of GGUF by their numbers, and the place of a tensor in a file.

Source: enum ggml_type and enum gguf_type of ggml (ggml.h, gguf.h); GGUF specification.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from q4jax_kernels.block_formats import FORMATS


@dataclass(frozen=True)
class TensorType:
  """A storage type: `block_bytes` bytes hold `block_size` values of a row."""

  name: str
  block_size: int
  block_bytes: int


def _quantised(name: str) -> TensorType:
  return TensorType(name, FORMATS[name].block_size, FORMATS[name].block_bytes)


TENSOR_TYPES: dict[int, TensorType] = {
  0: TensorType("f32", 1, 4),
  1: TensorType("f16", 1, 2),
  2: _quantised("q4_0"),
  3: _quantised("q4_1"),
  6: _quantised("q5_0"),
  7: _quantised("q5_1"),
  8: _quantised("q8_0"),
  10: _quantised("q2_k"),
  11: _quantised("q3_k"),
  12: _quantised("q4_k"),
  13: _quantised("q5_k"),
  14: _quantised("q6_k"),
  20: _quantised("iq4_nl"),
  23: _quantised("iq4_xs"),
  30: TensorType("bf16", 1, 2),
}

# Types that ggml knows, or knew, and q4jax does not read: an error can then say the name.
OTHER_TENSOR_TYPES: dict[int, str] = {
  4: "Q4_2",
  5: "Q4_3",
  9: "Q8_1",
  15: "Q8_K",
  16: "IQ2_XXS",
  17: "IQ2_XS",
  18: "IQ3_XXS",
  19: "IQ1_S",
  21: "IQ3_S",
  22: "IQ2_S",
  24: "I8",
  25: "I16",
  26: "I32",
  27: "I64",
  28: "F64",
  29: "IQ1_M",
  31: "Q4_0_4_4",
  32: "Q4_0_4_8",
  33: "Q4_0_8_8",
  34: "TQ1_0",
  35: "TQ2_0",
  36: "IQ4_NL_4_4",
  37: "IQ4_NL_4_8",
  38: "IQ4_NL_8_8",
  39: "MXFP4",
  40: "NVFP4",
  41: "Q1_0",
}

BOOL, STRING, ARRAY = 7, 8, 9
# The value types of fixed size; files are little-endian.
SCALARS: dict[int, np.dtype] = {
  0: np.dtype("u1"),
  1: np.dtype("i1"),
  2: np.dtype("<u2"),
  3: np.dtype("<i2"),
  4: np.dtype("<u4"),
  5: np.dtype("<i4"),
  6: np.dtype("<f4"),
  BOOL: np.dtype("?"),
  10: np.dtype("<u8"),
  11: np.dtype("<i8"),
  12: np.dtype("<f8"),
}


def holds(dtype: np.dtype, value: object) -> bool:
  """Whether a number keeps its value in a type of `SCALARS`; False of all else, bools included."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  if dtype.kind == "f":
    with np.errstate(over="ignore"):
      return value != value or float(dtype.type(value)) == value
  integer = isinstance(value, int) and dtype.kind in "iu"
  return integer and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


@dataclass(frozen=True)
class TensorInfo:
  """Where a tensor lies and what its bytes mean.

  Attributes:
    shape: outermost first, the reverse of the file's `ne`: a matrix is (N rows, K columns).
    format: "f32", "f16", "bf16" or a name in `q4jax_kernels.block_formats.FORMATS`.
    path: the file, or the shard, that holds it.
    offset: of its first byte, from the start of that file.
    nbytes: its length in the file; rows follow each other without padding.
  """

  name: str
  shape: tuple[int, ...]
  format: str
  path: Path
  offset: int
  nbytes: int

  @property
  def num_rows(self) -> int:
    """The product of all dimensions but the last; 1 for a vector."""
    return math.prod(self.shape[:-1])

  @property
  def row_bytes(self) -> int:
    return self.nbytes // self.num_rows
