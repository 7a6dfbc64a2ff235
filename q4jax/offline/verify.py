"""Is a file what it says: structure, checksums, finite scales; the schema of a calibration.

Opening a file checks its structure. Then each tensor's bytes are read once: they must have the
checksum of a .qbin, and every float in them (the factors of each block, or each value of a float
tensor) must be finite.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jax import records
from q4jax.errors import ConfigError, FormatError
from q4jax.formats import imatrix
from q4jax.formats.checkpoint import FLOAT_FORMATS, Bytes, Checkpoint, Tensor
from q4jax.formats.open import open_checkpoint
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.offline import calibration
from q4jax_kernels.block_array import FIELDS, PIECES, ROWS, block_shape
from q4jax_kernels.q4_formats import Q4_FORMATS

# Where the factors (float16, two bytes each) of GGUF's blocks are, by field.
_HALF_FIELDS: dict[str, tuple[int, ...]] = {
  "q4_0": (0,), "q4_1": (0, 1), "q5_0": (0,), "q5_1": (0, 1), "q8_0": (0,), "q2_k": (2, 3),
  "q3_k": (3,), "q4_k": (0, 1), "q5_k": (0, 1), "q6_k": (3,), "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip
# Bits of an exponent, all set in infinities and NaNs.
_EXPONENTS = {"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000}
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Failure:
  """What is wrong.

  Attributes:
    path: the file.
    tensor: its name; None where it is the file.
    problem: found, expected, and what to do.
  """

  path: str
  tensor: str | None
  problem: str


@dataclass
class Report:
  """What was looked at, and what is wrong with it."""

  files: int = 0
  tensors: int = 0
  checksums: int = 0
  records: int = 0
  failures: list[Failure] = field(default_factory=list)


Progress = Callable[[int, int], None]


def verify(path: str | Path, progress: Progress | None = None) -> Report:
  """Verifies a model, a calibration, or each of them in a folder.

  Raises:
    ConfigError: there is nothing that could be verified.
  """
  path, report = Path(path), Report()
  for file in _files(path):
    report.files += 1
    try:
      if file.suffix == ".json":
        report.records += len(records.loads(file.read_bytes(), str(file))[0])
      elif file.suffix == ".safetensors":
        report.tensors += len(calibration.read_sums(file))
      elif file.suffix == ".gguf" and imatrix.is_imatrix(file):
        report.tensors += len(imatrix.read(file))
      else:
        _verify_model(file, report, progress)
    except FormatError as error:
      report.failures.append(Failure(str(file), None, str(error)))
    except OSError as error:
      report.failures.append(Failure(str(file), None, f"it cannot be read: {error.strerror}."))
  return report


def _files(path: Path) -> list[Path]:
  if not path.is_dir() or (path / "config.json").exists():
    return [path]  # A folder with a config.json is one model.
  suffixes = (".gguf", ".qbin", ".safetensors")
  files = sorted(p for p in path.iterdir() if p.suffix in suffixes or _is_calibration(p))
  if not files:
    raise ConfigError(f"{path} holds no .gguf, no .qbin and no calibration; name another folder.")
  return files


def _is_calibration(path: Path) -> bool:
  """Whether a file is JSON that calls itself a calibration, or is broken JSON."""
  if path.suffix != ".json":
    return False
  try:
    document = json.loads(path.read_bytes())
  except (ValueError, RecursionError, OSError):
    return True
  return isinstance(document, dict) and document.get("format") == "q4jax-calibration"


def _verify_model(path: Path, report: Report, progress: Progress | None) -> None:
  with open_checkpoint(path) as checkpoint, ThreadPoolExecutor(os.cpu_count()) as threads:
    if isinstance(checkpoint, QbinCheckpoint):
      report.records += len(checkpoint.records())
      report.checksums += sum(p.checksum is not None for p in checkpoint.places.values())
    done, total = 0, sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    # Sums and comparisons are in C, which lets go of the interpreter.
    found = threads.map(lambda name: list(_problems(checkpoint, name)), checkpoint.tensors)
    for tensor, problems in zip(checkpoint.tensors.values(), found, strict=True):
      report.tensors += 1
      report.failures += [Failure(str(path), tensor.name, problem) for problem in problems]
      done += tensor.nbytes
      if progress:
        progress(done, total)


def _problems(checkpoint: Checkpoint, name: str) -> Iterator[str]:
  tensor, tiled = checkpoint.tensors[name], False
  if isinstance(checkpoint, QbinCheckpoint):
    tiled = checkpoint.places[name].tiled
    if checkpoint.is_intact(name) is False:
      yield (
        "its bytes do not have the checksum that the file gives for them: they were changed or "
        "damaged. Copy the file again, or convert the model again."
      )
    data = checkpoint.stored(name)
  else:
    data = checkpoint.rows(name)
  count = _not_finite(data, tensor, tiled)
  if count:
    what = "values" if tensor.format in FLOAT_FORMATS else "scales or minimums of its blocks"
    yield (
      f"{count} {what} ({tensor.format}) are infinite or NaN; a model has only finite ones. Make "
      "it again from a sound source."
    )
  checkpoint.release(name)


def _not_finite(data: Bytes, tensor: Tensor, tiled: bool) -> int:
  """How many floats of a tensor's rows, or x16 tiles, are infinite or NaN."""
  side = ROWS if tiled else 1
  width = block_shape(tensor.format)[1] * side
  step = max(1, _CHUNK_BYTES // data.shape[1])
  total = 0
  for first in range(0, len(data), step):
    blocks = data[first : first + step].reshape(-1, width)
    for start, stop, kind in factors(tensor.format, tiled):
      part = np.ascontiguousarray(blocks[:, start:stop])
      bits: NDArray[Any] = part.view(np.uint32 if kind == "f32" else np.uint16)
      total += int(np.count_nonzero((bits & _EXPONENTS[kind]) == _EXPONENTS[kind]))
  return total


def factors(format: str, tiled: bool = False) -> list[tuple[int, int, str]]:
  """(first byte, end, float format) of each run of floats in a block, or in 16 blocks of a tile."""
  if format in FLOAT_FORMATS:
    wanted: tuple[int, ...] = (0,)
    kind = format
  elif format in Q4_FORMATS:
    form = Q4_FORMATS[format]
    wanted, kind = tuple(range(len(form.fields) - 1)), "f32" if form.wide else "f16"
  else:
    wanted, kind = _HALF_FIELDS[format], "f16"
  starts = np.cumsum([0] + [size for size, _ in FIELDS[format]]).tolist()
  offsets = {starts[i] for i in wanted}
  if not tiled:
    return [(starts[i], starts[i + 1], kind) for i in wanted]
  runs, at = [], 0
  for offset, size, _ in PIECES[format]:
    if offset in offsets:
      runs.append((ROWS * at, ROWS * (at + size), kind))
    at += size
  return runs
