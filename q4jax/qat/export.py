"""A trained student as a quantised model, bit for bit what its forward pass computed with.

The codes come from the student's own rounding, compiled on the same device: another division, by
another machine, could round a weight in the middle of two codes the other way.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Checkpoint, Sink, Tensor
from q4jax.offline.quantize import as_floats
from q4jax.qat import fake_quant as fq
from q4jax.qat.student import Student, finished
from q4jax.quant.convert import as_planned, block_format
from q4jax.quant.grid import GroupArray, Parameters


def group_array(student: Student, name: str) -> GroupArray:
  """A matrix of a `finished` student on its grid.

  Raises:
    ConfigError: a scale or minimum that float16 does not hold.
  """
  w, (scale, minimum) = student.weights[name].get_value(), student.parameters(name)
  parts = [None if p is None else np.asarray(_stored(p)) for p in (scale, minimum)]
  for part in parts:
    if part is not None and not np.isfinite(part).all():
      raise ConfigError(
        f"{name}: a scale or minimum is not finite in float16; training has diverged. Go back to "
        "an earlier checkpoint, with a smaller learning rate."
      )
  grid = student.rounding.grid
  half = [None if p is None else p.astype(np.float16) for p in parts]
  codes = w.astype(jnp.uint8) if student.rounding.fixed_codes else _codes(w, scale, minimum, grid)
  return GroupArray(np.asarray(codes), Parameters(half[0], half[1]), grid)  # type: ignore[arg-type]


def write(student: Student, source: Checkpoint, open_sink: Callable[[list[Tensor]], Sink]) -> None:
  """Writes the student.

  Args:
    student: trained; its matrices on the grid become blocks of `convert.block_format`.
    source: the float model it began as, which gives what did not learn, byte for byte.
    open_sink: opens what is written to, given all its tensors.

  Raises:
    ConfigError: see `group_array`; or no format that a model runs holds such a grid.
  """
  student = finished(student)
  planned = [_planned(student, tensor) for tensor in source.tensors.values()]
  with open_sink(planned) as sink:
    for tensor in planned:
      sink.write(tensor, _rows(student, source, tensor))
      source.release(tensor.name)


def _planned(student: Student, tensor: Tensor) -> Tensor:
  if tensor.name in student.scales:
    format = block_format(student.rounding.grid, tensor.shape[1])
    return Tensor(tensor.name, tensor.shape, format)
  if tensor.name.startswith("blk."):  # Norms and biases learn, in float32.
    return Tensor(tensor.name, tensor.shape, "f32")
  return tensor


def _rows(student: Student, source: Checkpoint, tensor: Tensor) -> np.ndarray:
  if tensor.name in student.scales:
    blocks = as_planned(group_array(student, tensor.name))
    assert blocks.format == tensor.format, (blocks.format, tensor)
    return np.asarray(blocks.data)
  if tensor.name.startswith("blk."):
    return as_floats(np.asarray(student.weights[tensor.name].get_value()), "f32")
  return source.rows(tensor.name)


_codes = jax.jit(fq.codes, static_argnums=3)
_stored = jax.jit(fq.stored)
