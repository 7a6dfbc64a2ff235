"""Made tests/data/golden.qbin, once: PYTHONPATH=.:kernels:tests python -m formats.make_golden_qbin.

It is of version 1.0, and stays as it is: later versions must read it, and give the same.
"""

from pathlib import Path

import numpy as np

from q4jax.config import from_gguf
from q4jax.formats.checkpoint import Tensor
from q4jax.formats.qbin_sink import QbinSink
from q4jax.records import Record
from qbin_files import METADATA

GOLDEN = Path(__file__).parents[1] / "data" / "golden.qbin"
TENSORS = [
  Tensor("vector", (5,), "f32"),
  Tensor("half", (3, 6), "f16"),
  Tensor("brain", (17, 4), "bf16"),
  Tensor("old", (18, 64), "q4_0"),
  Tensor("eight", (2, 32), "q8_0"),
  Tensor("four", (1, 256), "q4_k"),
  Tensor("six", (3, 256), "q6_k"),
  Tensor("narrow", (5, 32), "q4s8_f32"),
  Tensor("wide", (2, 256), "q4a128_f16"),
]
KEYS = {
  "tokenizer.ggml.tokens": ["a", "\u00e9", ""],
  "some.numbers": np.array([-1, 2], np.int64),
  "some.float": 0.1,
  "some.flag": True,
}
RECORD = Record(
  "half", "weight", "int4", -1, 3, "minmax", np.full((3, 2), 0.25, np.float32),
  np.zeros((3, 2), np.int32), statistics={"mse": 0.5, "range": [-1.0, 1.0]},
)  # fmt: skip


def rows(tensor: Tensor) -> np.ndarray:
  """Bytes that count up from 1 to 59, over and over: every float in them is finite."""
  count = tensor.num_rows * tensor.row_bytes
  return (np.arange(count) % 59 + 1).astype(np.uint8).reshape(tensor.num_rows, -1)


def main() -> None:
  # The vocabulary gives the size, and the key goes.
  metadata = {k: v for k, v in METADATA.items() if k != "llama.vocab_size"} | KEYS
  config = from_gguf(metadata, frozenset(t.name for t in TENSORS), str(GOLDEN))
  with QbinSink(GOLDEN, config, metadata, TENSORS, records=[RECORD]) as sink:
    for tensor in TENSORS:
      sink.write(tensor, rows(tensor))


if __name__ == "__main__":
  main()
