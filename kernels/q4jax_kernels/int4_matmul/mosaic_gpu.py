"""The Hopper kernel (Pallas, Mosaic GPU): packed rows come from HBM, are unpacked in registers.

It computes y.T = W @ x.T with `wgmma`, W from registers and x from shared memory: see
row_planar_array.py for why. A thread block has a few compute warpgroups, 64 rows of W each, and one
that keeps copies (TMA) of the next tiles in flight. Unpacked codes can be used in two ways:

  on the sums     codes are multiplied as they are, exactly, and each group's sum is scaled:
                  y += s * (codes @ x) - t * xsum. Little work for few rows of x, where time goes
                  into reading weights; then K is also split among thread blocks, so that all SMs
                  read, and XLA adds the splits.
  on the weights  w = s * code - t in float32, rounded to bfloat16: for many rows, where scaling
                  every sum would take longer than the products. The weights are the ones that
                  dequantising first would give.

From a few hundred rows on, dequantising once and XLA's product (xla.py) is the rival: here every
block_m rows unpack the weight anew, there a float copy of it is written and read. Which is
faster has to be measured; until then the kernel is taken, which needs no memory for the copy.

Here codes are signed, w = s * (code + bias - offset) - m, so t = m - s * (bias - offset); symmetric
4- and 8-bit weights have t = 0. x is rounded to bfloat16; products accumulate in float32.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from q4jax_kernels.int4_matmul import mosaic_gpu_kernel
from q4jax_kernels.int4_matmul.mosaic_gpu_kernel import WARPGROUP_ROWS, signed_bias
from q4jax_kernels.row_planar_array import CHUNK, RowPlanarArray

WEIGHT = RowPlanarArray  # what `int4_matmul` reads in place of a PlanarArray
GROUP_SIZES = (16, 32, 64, 128, 256)  # besides one group for all of K
BITS = ((4,), (8,), (4, 1), (4, 2))
SMS = 132  # of an H100 SXM, H200 or GH200: what splitting K aims at
_SMEM_BYTES = 200 << 10  # of the 227 KiB that a thread block may have


@dataclasses.dataclass(frozen=True)
class Config(mosaic_gpu_kernel.Config):
  """How the work is cut, and how to choose."""

  @classmethod
  def choose(cls, m: int, w: RowPlanarArray) -> "Config":
    """For x [m, K].

    Up to 64 rows (32 with 8-bit codes, which take more registers) sums are scaled. Unpacking keeps
    four warpgroups busy; where a thread of four would spill registers (codes of two planes or 8
    bits, more rows), there are two.
    """
    n, k = w.shape
    on_sums = m <= (64 if w.bits != (8,) else 32)
    # A step's sums of x are copied 128 bytes at a time (jax 0.10 takes no less).
    least = 32 * w.group_size // CHUNK if w.num_groups > 1 and w.minimum is not None else 8
    block_m = next(b for b in (8, 16, 32, 64, 128, 256) if b >= max(m, least) or b == 256)
    most = 4 if block_m <= 16 and w.bits == (4,) else 2
    warpgroups = next(g for g in (4, 2, 1) if g <= most and n % (WARPGROUP_ROWS * g) == 0)
    widest = CHUNK
    if len(w.bits) == 1 and block_m > 32:  # Wider steps would spill, too.
      widest = 128 if on_sums else 64
      widest = max(widest, w.group_size if w.num_groups > 1 else 0)
    if widest == CHUNK:
      block_m = min(block_m, 128)
    n_blocks = n // (WARPGROUP_ROWS * warpgroups)
    while not on_sums and block_m > 64 and 2 * n_blocks * -(-m // block_m) <= SMS:
      block_m //= 2  # Twice the thread blocks, and still no more than there are SMs.
    block_k = next(b for b in (256, 128, 64) if b <= widest and k % b == 0)
    config = cls(block_m, warpgroups, block_k, 1, 1, on_sums)
    steps = k // block_k
    blocks = n_blocks * -(-m // block_m)
    splits = min(_divisors(steps), key=lambda s: (-(-blocks * s // SMS) * (steps // s + 2), s))
    stages = max(1, min(_SMEM_BYTES // config.stage_bytes(w), 4, steps // splits))
    return dataclasses.replace(config, splits=splits if on_sums else 1, stages=stages)

  def stage_bytes(self, w: RowPlanarArray) -> int:
    """Bytes of shared memory that the tiles of one step take."""
    bits = sum(w.bits) * self.block_n * self.block_k + 16 * self.block_m * self.block_k
    factors = [a for a in (w.scale, w.scale_code, w.minimum, w.minimum_code) if a is not None]
    rows = [max(1, self.block_k * a.shape[0] // w.shape[1]) for a in factors]
    groups = max(1, self.block_k // w.group_size)
    return (
      bits // 8
      + sum(r * self.block_n * a.dtype.itemsize for r, a in zip(rows, factors, strict=True))
      + 4 * groups * self.block_m
    )


def supports(w: RowPlanarArray) -> bool:
  """Whether the kernel takes this matrix, and the GPU, if there is one, has `wgmma`."""
  n, k = w.shape
  whole = w.num_groups == 1 and w.scale_code is None
  groups = whole or w.group_size in GROUP_SIZES
  # Steps are of 64 inputs at least and have whole groups; sub-scales and upper bits come by 256.
  step = CHUNK if w.scale_code is not None else max(64, 0 if whole else w.group_size)
  shapes = n % WARPGROUP_ROWS == 0 and k % step == 0
  return tuple(w.bits) in BITS and groups and shapes and _may_be_hopper()


def _may_be_hopper() -> bool:
  """Whether this process may compile for compute capability 9.0, the only one with `wgmma`."""
  if jax.default_backend() != "gpu":
    return True  # Lowering is for another machine, and its business.
  return jax.devices()[0].compute_capability == "9.0"


def int4_matmul(
  x: jax.Array,
  ws: Sequence[RowPlanarArray],
  config: Config | None = None,
  interpret: Any = None,
) -> list[jax.Array]:
  """x float[M, K], rounded to bfloat16, times each weight's transpose: [M, N_i] in x's dtype.

  Args:
    x: float[M, K].
    ws: matrices [N_i, K].
    config: how the work is cut; by default what `Config.choose` says of each weight.
    interpret: a `plgpu.InterpretGPUParams` runs on any device (jax 0.11.2 and newer).

  Raises:
    NotImplementedError: a weight that `supports` refuses.
  """
  return [_matmul(x, w, config, interpret) for w in ws]


def _matmul(x: jax.Array, w: RowPlanarArray, config: Config | None, interpret: Any) -> jax.Array:
  (m, k), n = x.shape, w.num_rows
  if not supports(w):
    raise NotImplementedError(
      f"the Hopper kernel takes codes of {BITS} bits in groups of {GROUP_SIZES} or K, N a multiple "
      f"of {WARPGROUP_ROWS}, K of its step; got {w.bits} bits in groups of {w.group_size} with "
      f"N = {n}, K = {k}."
    )
  if m == 0:
    return jnp.zeros((0, n), x.dtype)
  config = config or Config.choose(m, w)
  x16 = jnp.pad(x.astype(jnp.bfloat16), ((0, -m % config.block_m), (0, 0)))
  y = mosaic_gpu_kernel.call(x16, w, config, interpret)
  y = jnp.sum(y, axis=0) if config.splits > 1 else y[0]
  y = y[:m]
  return (_scaled(y, x16[:m], w) if w.num_groups == 1 else y).astype(x.dtype)


def _scaled(y: jax.Array, x: jax.Array, w: RowPlanarArray) -> jax.Array:
  """x @ codes.T float32[m, N], scaled where one group is all of K."""
  scale = w.scale.astype(jnp.float32)
  shift = signed_bias(w, 0) * scale - (0 if w.minimum is None else w.minimum.astype(jnp.float32))
  return y * scale + jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True) * shift


def _divisors(x: int) -> list[int]:
  return [d for d in range(1, x + 1) if x % d == 0]
