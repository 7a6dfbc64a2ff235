"""What can be injected: records, files that hold them, and a dict of parameters by layer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from q4jax.errors import ConfigError
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.offline.calibration import read_records
from q4jax.records import RANGES, Record


@dataclass(frozen=True)
class Affine:
  """x' = scale * (clip(round(x / scale) + zero_point, codes of dtype) - zero_point).

  Attributes:
    scale, zero_point: one number, or for keys and values one a head.
  """

  scale: Any
  zero_point: Any = 0
  dtype: str = "int8"


@dataclass(frozen=True)
class Range:
  """The least and largest value that must be represented; 0 always is.

  A signed dtype gets a symmetric scale, an unsigned one a zero point, as `q4jax calibrate` does.
  """

  min: Any
  max: Any
  dtype: str = "int8"


# By name: a matrix ("blk.0.attn_q.weight") for its input, "blk.0.key" or "blk.0.value".
State = Mapping[str, Affine | Range | tuple[Any, Any]]
Source = str | PathLike[str] | Iterable[Record] | State


def records_of(source: Source) -> list[Record]:
  """The records of any source.

  Raises:
    FormatError: a file that cannot be read, or holds no calibration.
    ConfigError: a state that is none; it names the layer.
  """
  if isinstance(source, str | PathLike):
    path = Path(source)
    if path.suffix != ".qbin":
      return read_records(path)
    with QbinCheckpoint.open(path) as checkpoint:
      return checkpoint.records()
  if isinstance(source, Mapping):
    return [_record(name, value) for name, value in source.items()]
  return list(source)


def _record(name: str, value: Any) -> Record:
  if isinstance(value, tuple) and len(value) == 2:
    value = Affine(*value)
  if isinstance(value, Range):
    value = _affine(name, value)
  if not isinstance(value, Affine):
    raise ConfigError(
      f"layer '{name}': expected (scale, zero_point), Affine or Range; got {value!r:.80}."
    )
  layer, _, last = name.rpartition(".")
  target = last if last in ("key", "value") else "input"
  return Record(
    layer_name=name if target == "input" else layer,
    target=target,
    dtype=value.dtype,
    axis=None if target == "input" else -1,
    group_size=0,
    method="injected",
    scale=_array(name, value.scale),
    zero_point=_array(name, value.zero_point, np.shape(value.scale)),
  )


def _affine(name: str, value: Range) -> Affine:
  low, high = _array(name, value.min), _array(name, value.max)
  if low.shape != high.shape or not (np.isfinite(low).all() and np.isfinite(high).all()):
    raise ConfigError(
      f"layer '{name}': the range is {value.min} to {value.max}; expected finite numbers, as many "
      "of one as of the other."
    )
  if (low > high).any():
    raise ConfigError(
      f"layer '{name}': the range's min {value.min} is above its max {value.max}; swap them."
    )
  if value.dtype not in RANGES:
    raise ConfigError(f"layer '{name}': dtype is '{value.dtype}'; one of {', '.join(RANGES)}.")
  least, most = RANGES[value.dtype]
  low, high = np.minimum(low, 0), np.maximum(high, 0)
  if least < 0:
    scale, zero = np.maximum(-low, high) / most, np.zeros(low.shape)
  else:
    scale = (high - low) / most
    zero = np.rint(-low / np.where(scale == 0, np.inf, scale))
  return Affine(np.where(scale == 0, 1, scale), zero, value.dtype)


def _array(name: str, value: Any, shape: tuple[int, ...] = ()) -> np.ndarray:
  """The value as an array; a single number for each of `shape`, where it has one."""
  try:
    array = np.asarray(value, np.float64)
    return np.broadcast_to(array, shape) if array.ndim == 0 else array
  except (TypeError, ValueError):
    raise ConfigError(f"layer '{name}': {value!r:.80} is no number, nor a list of them.") from None
