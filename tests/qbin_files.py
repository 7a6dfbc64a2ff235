"""Small .qbin files with any tensors, their bytes random."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from q4jax.config import from_gguf
from q4jax.formats.checkpoint import Checkpoint, Tensor
from q4jax.formats.qbin_sink import QbinSink
from q4jax.records import Record

METADATA: dict[str, Any] = {
  "general.architecture": "llama",
  "llama.vocab_size": 32,
  "llama.block_count": 1,
  "llama.context_length": 64,
  "llama.embedding_length": 16,
  "llama.feed_forward_length": 32,
  "llama.attention.head_count": 2,
  "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def random_bytes(tensor: Tensor, seed: int = 0) -> np.ndarray:
  """uint8[num_rows, row_bytes]: any bytes, not always numbers."""
  shape = (tensor.num_rows, tensor.row_bytes)
  return np.random.default_rng([seed, *tensor.name.encode()]).integers(0, 256, shape, np.uint8)


def write_qbin(
  path: Path,
  tensors: Sequence[Tensor],
  layout: str = "x16",
  records: Sequence[Record] = (),
  metadata: Mapping[str, Any] = METADATA,
) -> dict[str, np.ndarray]:
  """Writes a file of these tensors; their rows by name."""
  rows = {tensor.name: random_bytes(tensor) for tensor in tensors}
  config = from_gguf(metadata, frozenset(rows), str(path))
  with QbinSink(path, config, metadata, tensors, layout=layout, records=records) as sink:
    for tensor in tensors:
      sink.write(tensor, rows[tensor.name])
  return rows


def convert(source: Checkpoint, path: Path, layout: str = "x16") -> None:
  """Writes a whole model as .qbin."""
  tensors = list(source.tensors.values())
  with QbinSink(path, source.config, source.metadata, tensors, layout=layout) as sink:
    for tensor in tensors:
      sink.write(tensor, source.rows(tensor.name))
