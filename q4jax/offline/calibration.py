"""The folder that calibration writes: its files, and what is read from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from q4jax import records as records_lib
from q4jax.errors import FormatError
from q4jax.formats import imatrix
from q4jax.formats.atomic import write_bytes
from q4jax.offline.layerwise import input_of
from q4jax.records import Record

IMATRIX, HIDDEN = "imatrix.gguf", "hidden"


@dataclass(frozen=True, eq=False)
class Sums:
  """Over all rows that flowed into a matrix.

  Attributes:
    absolute, square: float32[K], sums of |x| and of x^2.
    count: rows.
  """

  absolute: NDArray[np.float32]
  square: NDArray[np.float32]
  count: int


def stem(index: int) -> str:
  """Of a block's files."""
  return f"blk.{index:03}"


def save_sums(path: Path, sums: Mapping[str, Sums]) -> None:
  """Writes the sums of a block's inputs, by name."""
  from safetensors.numpy import save

  arrays = {}
  for name, s in sums.items():
    arrays[f"{name}.absolute"], arrays[f"{name}.square"] = s.absolute, s.square
    arrays[f"{name}.count"] = np.array([s.count], np.int64)
  write_bytes(path, save(arrays))


def read_sums(folder: Path) -> dict[str, Sums]:
  """The sums of all inputs, by name ("blk.0.attn_q", "output"); or those of one file of the folder.

  Raises:
    FormatError: no calibration, or a file that is damaged.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import load

  sums: dict[str, Sums] = {}
  for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]:
    try:
      arrays = load(path.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
      raise FormatError(f"{path} cannot be read: {error}. Calibrate again.") from None
    for name in {key.rpartition(".")[0] for key in arrays}:
      sums[name] = _checked(arrays, name, path)
  if not sums:
    raise FormatError(
      f"{folder} holds no calibration; expected what `q4jax calibrate` writes, or name an "
      "imatrix.gguf."
    )
  return sums


def _checked(arrays: Mapping[str, NDArray], name: str, path: Path) -> Sums:
  parts = [arrays.get(f"{name}.{part}") for part in ("absolute", "square", "count")]
  absolute, square, count = parts
  if absolute is None or square is None or count is None:
    raise FormatError(f"{path}: the sums of '{name}' are not complete. Calibrate again.")
  fits = absolute.shape == square.shape and absolute.ndim == 1 and count.size == 1
  good = fits and all(np.isfinite(x).all() and (x >= 0).all() for x in (absolute, square))
  if not good or int(count[0]) < 1:
    raise FormatError(
      f"{path}: the sums of '{name}' have shapes {absolute.shape} and {square.shape} over "
      f"{count.reshape(-1)[:1]} rows; expected finite sums >= 0 of one shape. Calibrate again."
    )
  return Sums(absolute.astype(np.float32), square.astype(np.float32), int(count[0]))


def read_importance(path: str | Path) -> dict[str, NDArray[np.float32]]:
  """Mean squares of inputs float32[K] by the input's name (`input_of`).

  Args:
    path: a calibration's folder, or an imatrix of llama.cpp.

  Raises:
    FormatError: it is neither, or damaged.
  """
  path = Path(path)
  if path.is_dir():
    return {name: s.square / np.float32(s.count) for name, s in read_sums(path).items()}
  return {input_of(name): m.mean_squares for name, m in imatrix.read(path).items()}


def read_records(folder: str | Path) -> list[Record]:
  """All records of a calibration's folder, or of one document.

  Raises:
    FormatError: there is none, or one breaks the schema.
  """
  folder = Path(folder)
  paths = sorted(folder.glob("*.json")) if folder.is_dir() else [folder]
  found: list[Record] = []
  for path in paths:
    try:
      text = path.read_bytes()
    except OSError as error:
      raise FormatError(f"{path} cannot be read: {error.strerror}.") from None
    found.extend(records_lib.loads(text, str(path))[0])
  if not found:
    raise FormatError(f"{folder} holds no calibration document (*.json).")
  return found
