"""Random weights in every format of GGUF: valid blocks, and what gguf-py says they mean."""

import gguf
import numpy as np

FLOATS = ("f32", "f16", "bf16")
# Where the float16 factors of a block lie; all other bytes may hold anything.
_HALVES = {
  "q4_0": (0,),
  "q4_1": (0, 2),
  "q5_0": (0,),
  "q5_1": (0, 2),
  "q8_0": (0,),
  "q2_k": (80, 82),
  "q3_k": (108,),
  "q4_k": (0, 2),
  "q5_k": (0, 2),
  "q6_k": (208,),
  "iq4_nl": (0,),
  "iq4_xs": (0,),
}
FORMATS = (*FLOATS, *_HALVES)


def ggml_type(format: str) -> gguf.GGMLQuantizationType:
  return gguf.GGMLQuantizationType[format.upper()]


def block_sizes(format: str) -> tuple[int, int]:
  """(weights, bytes) of a block, as gguf-py has them."""
  return gguf.GGML_QUANT_SIZES[ggml_type(format)]


def random_rows(
  rng: np.random.Generator, format: str, n: int, k: int, scale: float = 0.01
) -> np.ndarray:
  """uint8[n, row_bytes]: n rows of k weights; block factors are drawn from N(0, scale^2)."""
  if format in FLOATS:
    weights = rng.normal(0, 10 * scale, (n, k)).astype(np.float32)
    return gguf.quantize(weights, ggml_type(format)).view(np.uint8).reshape(n, -1)
  size, nbytes = block_sizes(format)
  blocks = rng.integers(0, 256, (n * (k // size), nbytes), dtype=np.uint8)
  for at in _HALVES[format]:
    halves = rng.normal(0, scale, len(blocks)).astype("<f2")
    blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
  return blocks.reshape(n, k // size * nbytes)


def set_halves(rows: np.ndarray, format: str, value: float) -> np.ndarray:
  """The same rows with every float16 factor of every block replaced."""
  blocks = rows.reshape(-1, block_sizes(format)[1]).copy()
  for at in _HALVES[format]:
    blocks[:, at : at + 2] = np.array([value], "<f2").view(np.uint8)
  return blocks.reshape(rows.shape)


def dequantize(rows: np.ndarray, format: str) -> np.ndarray:
  """float32[n, k], by gguf-py."""
  if format in ("f32", "f16"):
    return rows.view("<f4" if format == "f32" else "<f2").astype(np.float32)
  with np.errstate(all="ignore"):
    return gguf.dequantize(rows, ggml_type(format))
