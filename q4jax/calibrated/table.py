"""Which row of a model's calibration is whose, and the checks before a value is written to it."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError
from q4jax.model.calib import COLUMNS, Rows
from q4jax.offline.layerwise import SHARED, input_of
from q4jax.records import RANGES, Record

Table = NDArray[np.float32]
_INPUTS = tuple(shared[0] for shared in SHARED)


@dataclass(frozen=True)
class Layout:
  """The rows of a model's calibration, float32[R, 4].

  A block has its inputs, in the order in which they are needed, then the heads of keys and of
  values; the head's input comes last.
  """

  config: LlamaConfig

  @property
  def per_block(self) -> int:
    return len(_INPUTS) + 2 * self.config.num_kv_heads

  @property
  def total(self) -> int:
    return self.config.num_layers * self.per_block + 1

  def block(self, index: int) -> Rows:
    """What `Slots` of a block need."""
    begin, heads = index * self.per_block, self.config.num_kv_heads
    inputs = tuple((name, begin + i, 1) for i, name in enumerate(_INPUTS))
    keys = begin + len(_INPUTS)
    return (*inputs, ("key", keys, heads), ("value", keys + heads, heads))

  def head(self) -> Rows:
    """What `Slots` of the head need."""
    return (("output", self.total - 1, 1),)

  def find(self, record: Record) -> tuple[int, int]:
    """(first row, rows) of a record.

    Raises:
      ConfigError: the model has no such layer, or not this stream of it.
    """
    name = record.layer_name
    head = "token_embd.weight" if self.config.tied else "output.weight"
    if record.target == "input" and name == head:
      return self.total - 1, 1
    block, _, rest = name.removeprefix("blk.").partition(".")
    known = block.isdecimal() and str(int(block)) == block and int(block) < self.config.num_layers
    if name.startswith("blk.") and known:
      rows = {stream: (row, count) for stream, row, count in self.block(int(block))}
      if record.target in ("key", "value") and not rest:
        return rows[record.target]
      if record.target == "input" and rest in _MATRICES:
        return rows[input_of(name).rpartition(".")[2]]
    raise ConfigError(
      f"layer '{name}' has no {record.target} in this model; expected, for inputs, "
      f"blk.0 to blk.{self.config.num_layers - 1} with .{', .'.join(sorted(_MATRICES))}, or "
      f"{head}; for keys and values blk.N alone. Leave it out, or take a calibration of this model."
    )


_MATRICES = frozenset(f"{matrix}.weight" for shared in SHARED for matrix in shared)


def filled(layout: Layout, table: Table, records: Iterable[Record]) -> Table:
  """A copy of the table with the records written to it; records of weights are passed over.

  Raises:
    ConfigError: nothing to write; a layer that is unknown or comes twice with other values;
      parameters that do not fit it or cannot be. It names the layer; `table` is as it was.
  """
  out, by = table.copy(), dict[int, Record]()
  for record in records:
    if record.target == "weight":
      continue
    row, count = layout.find(record)
    values = _values(record, count)
    if row in by and not np.array_equal(out[row : row + count], values):
      raise ConfigError(
        f"{_place(record)}: its parameters are not those of '{by[row].layer_name}', which shares "
        "this input. Give the same to both, or one alone."
      )
    out[row : row + count], by[row] = values, record
  if not by:
    raise ConfigError(
      "there is nothing to inject: no record of an input, of keys or of values. Calibrate with "
      "`q4jax calibrate`, or name another calibration."
    )
  return out


def _values(record: Record, count: int) -> Table:
  """float32[count, 4], checked."""
  place, columns = _place(record), np.zeros((count, len(COLUMNS)), np.float32)
  if record.dtype not in RANGES:
    raise ConfigError(f"{place}: dtype is '{record.dtype}'; expected one of {', '.join(RANGES)}.")
  if record.minimum is not None:
    raise ConfigError(
      f"{place}: it has a minimum; activations are rounded with a zero_point. Calibrate again."
    )
  low, high = RANGES[record.dtype]
  scale, zero = np.asarray(record.scale), np.asarray(record.zero_point)
  for name, values in (("scale", scale), ("zero_point", zero)):
    if values.size != count or values.shape not in ((), (count,), (count, 1)):
      what = "one for the tensor" if record.target == "input" else f"one for each of {count} heads"
      raise ConfigError(f"{place}: {name} has shape {list(values.shape)}; expected {what}.")
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
      raise ConfigError(f"{place}: {name} is {_short(values)}; expected finite numbers.")
  with np.errstate(over="ignore", under="ignore"):
    scale = scale.astype(np.float32)
  # Beneath the smallest normal float, x / scale is beyond float32, or the device flushes it to 0.
  if not (np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)).all():
    raise ConfigError(
      f"{place}: scale is {_short(record.scale)}; expected positive numbers within float32."
    )
  if not ((zero >= low) & (zero <= high) & (zero == np.rint(zero))).all():
    raise ConfigError(
      f"{place}: zero_point is {_short(zero)}; expected whole numbers within {record.dtype}'s "
      f"codes ({low}..{high})."
    )
  _check_statistics(record, place)
  columns[:, 0], columns[:, 1] = scale.reshape(-1), zero.reshape(-1)
  columns[:, 2:] = low, high
  return columns


def _check_statistics(record: Record, place: str) -> None:
  low, high = (record.statistics.get(name) for name in ("min", "max"))
  if isinstance(low, int | float) and isinstance(high, int | float) and not low <= high:
    raise ConfigError(f"{place}: its statistics say min {low} and max {high}; expected min <= max.")


def _place(record: Record) -> str:
  return f"layer '{record.layer_name}' ({record.target})"


def _short(values: NDArray) -> str:
  return f"{np.asarray(values).reshape(-1)[:4].tolist()}"
