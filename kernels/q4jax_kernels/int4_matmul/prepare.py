"""The layout that a device's kernel reads, made once from a file's blocks."""

from typing import cast

import jax
import numpy as np

from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.block_parts import PARTS
from q4jax_kernels.int4_matmul import dispatch
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.row_planar_array import CHUNK, RowPlanarArray


def layout_for(device: jax.Device) -> str:
  """What `prepared` makes for a device: "planes", "row_planes", or "rows" where XLA dequantises."""
  if device.platform == "tpu":
    return "planes"
  hopper = device.platform == "gpu" and device.compute_capability == "9.0"
  return "row_planes" if hopper else "rows"


def prepared(rows: np.ndarray, format: str, device: jax.Device, layout: str) -> dispatch.Weight:
  """A matrix on the device as its kernel reads it; every bit of the source is kept.

  Args:
    rows: uint8[N, row_bytes], blocks of `format` as a GGUF file has them.
    layout: from `layout_for`. Where the kernel does not take this format or shape the blocks stay
      as they are.
  """
  if layout != "rows" and format in PARTS:
    # Taken apart on the host: on the device, every part would exist twice for a while.
    planes = PlanarArray.from_blocks(BlockArray(cast(jax.Array, rows), format, len(rows)))
    if layout == "planes" and dispatch.supports("pallas_tpu", planes):
      return jax.device_put(planes, device)
    # Upper bits of codes lie in chunks; K may not fill them.
    if layout == "row_planes" and (len(planes.bits) == 1 or planes.shape[1] % CHUNK == 0):
      turned = jax.jit(RowPlanarArray.from_planar)(jax.device_put(planes, device))
      if dispatch.supports("mosaic_gpu", turned):
        return turned
  return BlockArray(jax.device_put(rows, device), format, len(rows))
