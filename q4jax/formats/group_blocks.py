"""Group-wise 4-bit weights as GGUF's blocks, where these hold the very same weights.

q4_0 is `scale * (code - 8)` and q4_1 `scale * code + m` with one float16 scale for 32 weights. A
group of 32 is such a block; a larger one is several that repeat its scale: the same weights at 4.5
(q4_0) or 5 bits each (q4_1).
"""

import numpy as np

from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Bytes
from q4jax.formats.gguf_types import TENSOR_TYPES
from q4jax_kernels.block_formats import pack_codes
from q4jax_kernels.q4_formats import Q4_FORMATS

_BLOCK = 32
_WRITABLE = frozenset(type.name for type in TENSOR_TYPES.values())


def ggml_format(format: str, what: str) -> str:
  """The format that GGUF keeps these weights in: the same, or q4_0 or q4_1.

  Raises:
    ConfigError: no GGUF type holds them exactly; `what` begins the message.
  """
  if format in _WRITABLE:
    return format
  group = Q4_FORMATS.get(format)
  if group is None or group.wide or group.group < _BLOCK:
    raise ConfigError(
      f"{what}: '{format}' weights are in no GGUF type exactly. GGUF takes "
      f"{', '.join(sorted(_WRITABLE))}, and groups of {_BLOCK} or more with float16 scales "
      "(q4s32_f16, q4a128_f16, ...) as q4_0 and q4_1. Write .qbin, which takes all formats, or "
      "quantise to one of these."
    )
  return "q4_0" if group.symmetric else "q4_1"


def as_ggml_blocks(rows: Bytes, format: str) -> Bytes:
  """Rows of a group-wise format as rows of `ggml_format`, bit for bit the same weights.

  uint8[N, row_bytes] -> uint8[N, K / 32 * 18] (or 20). A minimum becomes the m that is added: its
  sign flips, which is exact.
  """
  form = Q4_FORMATS[format]
  blocks = rows.reshape(len(rows), -1, form.block_bytes)
  codes, scale, minimum = form.split(blocks, np)
  factors = [scale] if minimum is None else [scale, -minimum]
  repeats = form.group // _BLOCK
  fields = [np.repeat(f[..., None], repeats, axis=-2).view(np.uint8) for f in factors]
  packed = pack_codes(codes.reshape(*codes.shape[:-1], -1, _BLOCK), 4, _BLOCK // 2)
  return np.concatenate([*fields, packed], axis=-1).reshape(len(rows), -1)
