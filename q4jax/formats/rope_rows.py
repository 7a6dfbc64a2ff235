"""The order of Q's and K's rows: interleaved in a GGUF of arch `llama`, half-split in memory.

Half-split RoPE rotates the pairs (i, i + head_dim / 2) of a head, interleaved RoPE (2i, 2i + 1).
Reordering rows is exact and commutes with quantised blocks, which lie along a row.
"""

import re

import numpy as np
from numpy.typing import NDArray

from q4jax.config import INTERLEAVED_ARCHITECTURES, LlamaConfig

_ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


def file_rows(config: LlamaConfig, name: str) -> NDArray[np.int64] | None:
  """int64[N]: which row of a GGUF file each row of memory is; None where both orders agree."""
  rotated = _ROTATED.fullmatch(name)
  if rotated is None or config.architecture not in INTERLEAVED_ARCHITECTURES:
    return None
  count = config.num_heads if rotated[1] == "q" else config.num_kv_heads
  order = np.arange(count * config.head_dim)
  return order.reshape(count, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def memory_rows(config: LlamaConfig, name: str) -> NDArray[np.int64] | None:
  """The inverse of `file_rows`: which row of memory each row of a GGUF file is."""
  order = file_rows(config, name)
  return None if order is None else np.argsort(order)
