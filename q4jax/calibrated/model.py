"""A model with room for a calibration, and putting one there while its programs run."""

from collections.abc import Callable
from types import TracebackType

import jax
import numpy as np
from flax import nnx

from q4jax.calibrated.sources import Source, records_of
from q4jax.calibrated.table import Layout, Table, filled
from q4jax.errors import ConfigError
from q4jax.model.calib import COLUMNS, Calib, Rows, Slots
from q4jax.model.model import Model

MakeSlots = Callable[[Calib, Rows], Slots]


def with_calibration(
  model: Model, source: Source | None = None, slots: MakeSlots = Slots
) -> "CalibratedModel":
  """The model with slots for a calibration; the weights are the same arrays, not copies.

  Without a source nothing is rounded, and what it computes is bit for bit what `model` does, at a
  small cost in each layer. Engines must be made anew, from what this returns.

  Args:
    source: see `CalibratedModel.inject`; it becomes the model's own calibration.
    slots: what the layers apply; for studies.

  Raises:
    ConfigError: the model has slots already; else as `inject`.
  """
  if isinstance(model, CalibratedModel):
    raise ConfigError("the model has slots for a calibration already; inject into it.")
  layout = Layout(model.config)
  table = np.zeros((layout.total, len(COLUMNS)), np.float32)
  if source is not None:
    table = filled(layout, table, records_of(source))
  return CalibratedModel(model, layout, table, slots)


class CalibratedModel(Model):
  """See `with_calibration`.

  `module` holds the model's own calibration; `leaves` holds what programs are given, which is the
  same until something is injected.
  """

  def __init__(self, model: Model, layout: Layout, table: Table, slots: MakeSlots):
    module = nnx.merge(*nnx.split(model.module))  # Another module around the same arrays.
    # Placed as the weights are, now and later: else another placement would compile anew.
    self._sharding = model.leaves[0].sharding
    calib = Calib(jax.device_put(table, self._sharding))
    module.slots = nnx.data(slots(calib, layout.head()))
    for index, block in enumerate(module.blocks):
      block.attn.slots = block.ffn.slots = nnx.data(slots(calib, layout.block(index)))
    super().__init__(module, model.tokenizer, model.metadata, model.path)
    self.layout = layout
    [self._at] = [i for i, leaf in enumerate(self.leaves) if leaf is calib.get_value()]

  @property
  def calibration(self) -> Table:
    """What is in force: float32[R, 4], see q4jax/model/calib.py."""
    return np.asarray(self.table)

  def inject(self, source: Source) -> "Injection":
    """Puts a calibration in force, for this model and all engines that it has.

    Layers that the source does not name keep what they have. The next call of a program sees it: in
    a generation under way, the next token. Nothing compiles. In a `with` statement it ends with the
    block; else `undo` ends it.

      with model.inject("calibration/"):
        ...
      injection = model.inject({"blk.0.attn_q.weight": Range(-4, 4), "blk.0.key": (scales, 0)})

    Args:
      source: records; the path of a folder that `q4jax calibrate` wrote, of one .json of it or of a
        .qbin with records; or parameters by layer (`q4jax.calibrated.Affine`, `Range`). Records of
        weights are passed over.

    Raises:
      ConfigError: an unknown layer, or parameters that do not fit it or cannot be; it names the
        layer, and all stays as it was.
      FormatError: a file that cannot be read.
    """
    table = filled(self.layout, self.calibration, records_of(source))
    return Injection(self, jax.device_put(table, self._sharding))

  @property
  def table(self) -> jax.Array:
    """What programs are given."""
    return self.leaves[self._at]

  @table.setter
  def table(self, table: jax.Array) -> None:
    leaves = list(self.leaves)
    leaves[self._at] = table
    self.leaves = leaves  # One assignment: a thread that decodes sees the old table or the new.


class Injection:
  """A calibration in force, until it is undone. See `CalibratedModel.inject`."""

  def __init__(self, model: CalibratedModel, table: jax.Array):
    self._model, self._before, self._mine, self._done = model, model.table, table, False
    model.table = table

  def undo(self) -> None:
    """What was in force before is again; a second call does nothing.

    Raises:
      ConfigError: something else was injected since, and must be undone first.
    """
    if self._done:
      return
    if self._model.table is not self._mine:
      raise ConfigError("another calibration was injected after this one; undo that one first.")
    self._model.table, self._done = self._before, True

  def __enter__(self) -> "Injection":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.undo()
