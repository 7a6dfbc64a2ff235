"""Quantises a model on disk, tensor by tensor or block by block, into a sink."""

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Bytes, Checkpoint, Sink, Tensor, floats
from q4jax.formats.group_blocks import as_ggml_blocks
from q4jax.offline.blockwise import BLOCK_METHODS
from q4jax.offline.layerwise import LayerRunner, input_of, takes_input
from q4jax.offline.scheme import NEEDS_TEXT, Scheme, check_source
from q4jax.quant import kquants, search
from q4jax.quant.convert import as_planned, to_blocks
from q4jax.quant.fits import FITS
from q4jax.quant.grid import Floats, Grid, GroupArray, quantize
from q4jax_kernels.block_array import block_shape

_CHUNK = 1 << 24  # Weights in float32 at once, where rows do not depend on each other.
# The types of blocks of 32 are group-wise integers.
_GRIDS = {
  "q4_0": Grid(4, 32, "signed"),
  "q4_1": Grid(4, 32, "minimum"),
  "q5_0": Grid(5, 32, "signed"),
  "q5_1": Grid(5, 32, "minimum"),
}
# Importance float32[K] of a matrix's inputs, by the input's name (`input_of`).
Importance = Mapping[str, NDArray[np.float32]]
OpenSink = Callable[[list[Tensor]], Sink]
Report = Callable[[int, int], None]


def targets(
  source: Checkpoint, scheme: Scheme, importance: Importance | None = None, again: bool = False
) -> dict[str, Tensor]:
  """What each tensor will be, by name; also whether all of that can be done.

  Args:
    again: whether a source that is quantised may be quantised again.

  Raises:
    ConfigError: a tensor cannot have what the scheme asks for.
  """
  planned = {}
  for name, tensor in source.tensors.items():
    if not again:
      check_source(tensor)
    planned[name] = scheme.target(tensor, source.config, importance is not None)
  return planned


def quantize_model(
  source: Checkpoint,
  open_sink: OpenSink,
  scheme: Scheme,
  *,
  importance: Importance | None = None,
  tokens: NDArray[np.int32] | None = None,
  again: bool = False,
  progress: Report | None = None,
) -> None:
  """Writes the quantised model.

  Memory: a method that looks at one matrix needs 64 MiB of it a few times in float32; with text
  (`scheme.NEEDS_TEXT`) a block in float32, its Hessians, and 4 bytes a hidden value of all tokens.

  Args:
    source: the model, best in float.
    open_sink: opens what is written to, given all its tensors.
    scheme: what it shall be.
    importance: of inputs, e.g. mean squares of activations from a calibration. Where one is given,
      every matrix of a block must have it.
    tokens: int32[B, T], what GPTQ and AWQ watch flow.
    again: see `targets`.
    progress: called with bytes of the source done and in all.

  Raises:
    ConfigError: the scheme does not fit the model, its text or importances; a weight that cannot be
      quantised.
  """
  if (scheme.method in NEEDS_TEXT) != (tokens is not None):
    raise ConfigError(
      f"method '{scheme.method}' needs text that runs through the model; give --text=FILE."
      if tokens is None
      else f"method '{scheme.method}' does not look at text; leave --text out, or choose gptq."
    )
  planned = targets(source, scheme, importance, again)
  done, total = 0, sum(tensor.nbytes for tensor in source.tensors.values())
  with open_sink(list(planned.values())) as sink:
    for name, rows in _all_rows(source, scheme, planned, importance, tokens):
      sink.write(planned[name], rows)
      done += source.tensors[name].nbytes
      if progress is not None:
        progress(done, total)


def _all_rows(
  source: Checkpoint,
  scheme: Scheme,
  planned: Mapping[str, Tensor],
  importance: Importance | None,
  tokens: NDArray[np.int32] | None,
) -> Iterator[tuple[str, Bytes]]:
  """(name, rows in the planned format) of every tensor."""
  blockwise = tokens is not None
  for name in source.tensors:
    if not (blockwise and name.startswith("blk.")):
      yield name, _rows(source, name, scheme, planned[name], importance)
      source.release(name)
  if tokens is not None:
    yield from _block_rows(source, scheme, tokens)


def _rows(
  source: Checkpoint, name: str, scheme: Scheme, target: Tensor, importance: Importance | None
) -> Bytes:
  """One tensor, looked at by itself."""
  tensor = source.tensors[name]
  plan = scheme.plan(tensor, source.config, importance is not None)
  if plan == tensor.format:
    return source.rows(name)
  weight = _importance(importance, name, source.config)
  whole = len(tensor.shape) == 1 or (isinstance(plan, Grid) and plan.group_size == "tensor")
  step = tensor.num_rows if whole else max(1, _CHUNK // tensor.shape[1])
  out = np.empty((target.num_rows, target.row_bytes), np.uint8)
  for start in range(0, tensor.num_rows, step):
    stop = min(start + step, tensor.num_rows)
    w = floats(source, name, start, stop)
    if isinstance(plan, Grid):
      p = FITS[scheme.method](w, plan, weight)
      out[start:stop] = _blocks(quantize(w, plan, p), target)
    elif plan in kquants.FORMATS:
      out[start:stop] = _ggml_blocks(w, plan, weight)
    else:
      out[start:stop] = as_floats(w, plan)
    if not whole:
      source.release(name)  # A large table's pages would all stay otherwise.
  return out


def _ggml_blocks(w: Floats, format: str, weight: NDArray[np.float32] | None) -> Bytes:
  grid = _GRIDS.get(format)
  if weight is None or grid is None:
    return kquants.quantize(w, format, weight)
  # ggml's formula for these types looks at the largest weight alone; a search can be guided.
  found = quantize(w, grid, search.fit(w, grid, weight))
  if format in ("q4_0", "q4_1"):
    blocks = as_planned(found)
    return as_ggml_blocks(np.asarray(blocks.data), blocks.format)
  return np.asarray(to_blocks(found, format).data)


def _block_rows(
  source: Checkpoint, scheme: Scheme, tokens: NDArray[np.int32]
) -> Iterator[tuple[str, Bytes]]:
  """The blocks' tensors, each block quantised on what the quantised ones before it make."""
  method = BLOCK_METHODS[scheme.method]
  grid = cast(Grid, scheme.grid)
  runner = LayerRunner(source, tokens)
  for _ in range(source.config.num_layers):
    prefix, weights = runner.prefix, runner.read_block()
    new = method(runner, weights, grid)
    for name, value in new.items():
      full = source.tensors[prefix + name]
      target = scheme.target(full, source.config, importance=False)
      if isinstance(value, GroupArray):
        yield full.name, _blocks(value, target)
        weights[name] = jnp.asarray(value.dequantize())
      else:
        yield full.name, as_floats(value, target.format)
        weights[name] = jnp.asarray(value)
    runner.advance(weights)


def _blocks(w: GroupArray, target: Tensor) -> Bytes:
  blocks = as_planned(w)
  assert blocks.format == target.format, (blocks.format, target)
  return np.asarray(blocks.data)


def as_floats(w: Floats, format: str) -> Bytes:
  """float32 values as rows of "f32", "f16" or "bf16"."""
  import ml_dtypes

  dtype = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[format]
  with np.errstate(over="ignore"):
    narrow = np.ascontiguousarray(w, dtype=dtype)
  if not np.isfinite(narrow.astype(np.float32)).all():
    raise ConfigError(f"a weight of {np.abs(w).max():.3g} is beyond {format}; keep it in f32.")
  rows = narrow.reshape(1, -1) if w.ndim == 1 else narrow
  assert rows.nbytes == w.size * block_shape(format)[1]
  return rows.view(np.uint8)


def _importance(
  importance: Importance | None, name: str, config: LlamaConfig
) -> NDArray[np.float32] | None:
  """Of the matrix's inputs, where it has any."""
  if importance is None or not takes_input(name, config):
    return None
  key = input_of(name)
  if key not in importance:
    if name.startswith("blk."):
      raise ConfigError(
        f"the calibration says nothing of the input of '{name}'; it is of another model, or of a "
        "part of this one. Calibrate this model."
      )
    return None
  return importance[key]
