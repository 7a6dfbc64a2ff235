"""What two models differ in, tensor by tensor: for the same model before and after quantising."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Checkpoint, floats
from q4jax.quant.error import WeightError, weight_error
from q4jax_kernels.block_array import block_shape


@dataclass(frozen=True)
class TensorDifference:
  """One matrix of both models.

  Attributes:
    name: of the tensor.
    formats: of the first model's and of the second's.
    same_bytes: whether both store the same.
    error: of the second against the first.
  """

  name: str
  formats: tuple[str, str]
  same_bytes: bool
  error: WeightError


def differences(reference: Checkpoint, model: Checkpoint) -> Iterator[TensorDifference]:
  """The matrices of two models of one shape, in the reference's order.

  Memory: both forms of one matrix, in float32.

  Raises:
    ConfigError: tensors that only one has, or of other shapes; it names the first.
  """
  shapes = [{n: t.shape for n, t in c.tensors.items()} for c in (reference, model)]
  for name in {**shapes[0], **shapes[1]}:
    found = [shape.get(name) for shape in shapes]
    if found[0] != found[1]:
      raise ConfigError(
        f"'{name}' has shape {found[0]} in {reference.path} and {found[1]} in {model.path}; only "
        "two forms of one model can be compared."
      )
  for name, tensor in reference.tensors.items():
    if len(tensor.shape) == 2:
      yield _matrix(reference, model, name)
      reference.release(name)
      model.release(name)


def _matrix(reference: Checkpoint, model: Checkpoint, name: str) -> TensorDifference:
  before, after = reference.tensors[name], model.tensors[name]
  same = before.format == after.format and np.array_equal(reference.rows(name), model.rows(name))
  block, width = block_shape(after.format)
  error = weight_error(
    floats(reference, name), floats(model, name), bits_per_weight=8 * width / block
  )
  return TensorDifference(name, (before.format, after.format), same, error)


def plot(found: list[TensorDifference], path: str) -> None:
  """Relative error of each matrix, a line for each kind of matrix over the layers.

  Raises:
    MissingDependencyError: matplotlib is not installed.
  """
  from q4jax.errors import MissingDependencyError

  try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
  except ImportError:
    raise MissingDependencyError(
      "plots need matplotlib: pip install 'q4jax[viz]', or leave --plot out."
    ) from None
  figure = Figure(figsize=(8, 4.5), layout="constrained")
  axes = figure.add_subplot()
  kinds: dict[str, list[tuple[int, float]]] = {}
  for d in found:
    parts = d.name.split(".")
    if parts[0] == "blk":
      kinds.setdefault(parts[2], []).append((int(parts[1]), 100 * d.error.relative_l2))
    else:
      axes.axhline(100 * d.error.relative_l2, linestyle=":", color="gray")
      axes.text(0, 100 * d.error.relative_l2, parts[0], color="gray", va="bottom")
  for kind, points in kinds.items():
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind)
  axes.set(xlabel="layer", ylabel="relative error |w - w'| / |w|, %", ylim=(0, None))
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  if kinds:
    axes.legend(ncols=2)
  figure.savefig(path, dpi=120)
