"""What sinks share: a tensor is written once; the whole appears under its name, or nothing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from q4jax.errors import ConfigError
from q4jax.formats.atomic import replacing
from q4jax.formats.checkpoint import Bytes, Tensor


class WholeSink(ABC):
  """A `Sink` that writes to a temporary path beside its own; a subclass says how."""

  def __init__(self, path: str | Path, tensors: Sequence[Tensor]):
    self.path = Path(path)
    self.tensors = tuple(tensors)
    self._missing = {tensor.name: tensor for tensor in tensors}
    if len(self._missing) < len(tensors):
      raise ConfigError(f"{path}: two of the {len(tensors)} tensors to write have the same name.")
    self._closing = ExitStack()

  @abstractmethod
  def _begin(self, temporary: Path, closing: ExitStack) -> None:
    """Opens `temporary` for writing; `closing` closes what this opens."""

  @abstractmethod
  def _put(self, tensor: Tensor, rows: Bytes) -> None:
    """Writes a tensor, one of `tensors` and of its shape."""

  def _finish(self) -> None:  # noqa: B027
    """Called when all tensors are written, before the files are closed."""

  def write(self, tensor: Tensor, rows: Bytes) -> None:
    """See `Sink.write`.

    Raises:
      ConfigError: the tensor is none that is still to be written, or its rows have another size.
    """
    if self._missing.get(tensor.name) != tensor:
      raise ConfigError(
        f"{self.path}: {tensor} is not a tensor that is still to be written; each is written once, "
        "as the sink was told when it was opened."
      )
    if rows.shape != (tensor.num_rows, tensor.row_bytes) or rows.dtype != "uint8":
      raise ConfigError(
        f"{self.path}: {tensor.name} comes as {rows.dtype}{list(rows.shape)}; expected "
        f"uint8{[tensor.num_rows, tensor.row_bytes]}."
      )
    self._put(tensor, rows)
    del self._missing[tensor.name]

  def __enter__(self) -> Self:
    with self._closing as closing:
      temporary = closing.enter_context(replacing(self.path))
      self._begin(temporary, closing)
      self._closing = closing.pop_all()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    with self._closing:
      if error is not None:
        raise error
      if self._missing:
        raise ConfigError(
          f"{self.path}: {len(self._missing)} tensor(s) were not written, first "
          f"'{next(iter(self._missing))}'; nothing is kept."
        )
      self._finish()
