"""A model in memory as a `Checkpoint` and a `Sink`: variants to measure without writing files."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Bytes, Tensor


class MemoryCheckpoint:
  """See `Checkpoint` and `Sink`; it starts empty."""

  def __init__(self, config: LlamaConfig, metadata: Mapping[str, Any], path: str = "in memory"):
    self.config, self.metadata, self.path = config, metadata, path
    self.tensors: Mapping[str, Tensor] = {}
    self._rows: dict[str, Bytes] = {}

  def write(self, tensor: Tensor, rows: Bytes) -> None:
    """See `Sink.write`; a name written again is replaced."""
    if rows.shape != (tensor.num_rows, tensor.row_bytes) or rows.dtype != np.uint8:
      raise ConfigError(
        f"{tensor.name}: got {rows.dtype}{list(rows.shape)} for a {tensor.format} tensor of shape "
        f"{list(tensor.shape)}; expected uint8{[tensor.num_rows, tensor.row_bytes]}."
      )
    self.tensors = {**self.tensors, tensor.name: tensor}
    self._rows[tensor.name] = rows

  def rows(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
    """See `Checkpoint.rows`."""
    return self._rows[name][start:stop]

  def release(self, name: str) -> None:
    """See `Checkpoint.release`: nothing to give back."""

  def close(self) -> None:
    """See `Checkpoint.close`: nothing to close."""

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
