"""llama.cpp's importance matrices: sums of squares of what flows into each matrix.

A GGUF with, for each matrix, `NAME.in_sum2` float32[1, K] and `NAME.counts` float32[1, 1], the
number of rows summed. Source: save_imatrix in llama.cpp (tools/imatrix/imatrix.cpp). Files in the
older binary format (.dat) are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import FormatError
from q4jax.formats.atomic import replacing
from q4jax.formats.gguf import GGUFFile

_SUM, _COUNT = ".in_sum2", ".counts"


@dataclass(frozen=True, eq=False)
class Moments:
  """Of one matrix's input.

  Attributes:
    sum_squares: float32[K].
    count: rows summed.
  """

  sum_squares: NDArray[np.float32]
  count: int

  @property
  def mean_squares(self) -> NDArray[np.float32]:
    """float32[K]; the importance of each input."""
    return np.asarray(self.sum_squares / np.float32(self.count))


def is_imatrix(path: str | Path) -> bool:
  """Whether a GGUF calls itself an importance matrix.

  Raises:
    FormatError: it is no GGUF.
  """
  with GGUFFile.open(path) as file:
    return file.metadata.get("general.type") == "imatrix"


def read(path: str | Path) -> dict[str, Moments]:
  """The moments by the matrix's name ("blk.0.attn_q.weight").

  Raises:
    FormatError: no imatrix, a mixture-of-experts one, or values that no sum of squares has.
  """
  moments = {}
  with GGUFFile.open(path) as file:
    if file.metadata.get("general.type") != "imatrix":
      raise FormatError(
        f"{path}: general.type is {file.metadata.get('general.type')!r}; expected 'imatrix'. "
        "llama-imatrix writes such files, and q4jax calibrate."
      )
    for name, info in file.tensors.items():
      if not name.endswith(_SUM):
        continue
      matrix = name.removesuffix(_SUM)
      count = file.tensors.get(matrix + _COUNT)
      if count is None or info.format != "f32" or count.format != "f32" or info.num_rows != 1:
        raise FormatError(
          f"{path}: '{matrix}' has shape {list(info.shape)} of {info.format}, its counts "
          f"{None if count is None else list(count.shape)}; expected one row of f32 and one count. "
          "Importances of experts are not supported."
        )
      sums = file.read_rows(info, 0, 1).view(np.float32).reshape(-1).copy()
      rows = float(file.read_rows(count, 0, 1).view(np.float32)[0, 0])
      if not (np.isfinite(sums).all() and (sums >= 0).all() and 1 <= rows < 2**53):
        raise FormatError(
          f"{path}: '{matrix}' has {rows} rows and sums of {sums.min()} to {sums.max()}; expected "
          "finite sums of squares of at least one row. Calibrate again."
        )
      moments[matrix] = Moments(sums, int(rows))
  if not moments:
    raise FormatError(f"{path}: there is no importance in it. Calibrate again.")
  return moments


def write(path: str | Path, moments: Mapping[str, Moments], dataset: str, chunk_size: int) -> None:
  """Writes a file that llama-quantize takes.

  Args:
    moments: by the matrix's name.
    dataset: what text they come from.
    chunk_size: tokens in a sequence.
  """
  import gguf

  chunks = max(m.count for m in moments.values()) // chunk_size
  with replacing(path) as temporary:
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, m in sorted(moments.items()):
      writer.add_tensor(name + _SUM, m.sum_squares.astype(np.float32).reshape(1, -1))
      writer.add_tensor(name + _COUNT, np.array([[m.count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
