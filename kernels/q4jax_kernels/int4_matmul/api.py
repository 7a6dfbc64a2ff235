"""One door to the int4 matmul: checks once, then picks an implementation or takes the named."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from q4jax_kernels import ffi
from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.int4_matmul import cpu, reference, xla

IMPLEMENTATIONS = ("reference", "xla", "cpu", "cpu_scalar", "cpu_avx2", "cpu_avx512")


def int4_matmul(
  x: jax.Array, ws: Sequence[BlockArray], implementation: str | None = None
) -> list[jax.Array]:
  """y_i = x @ W_i.T for one or more quantised matrices that share x.

  Args:
    x: float[..., K].
    ws: matrices [N_i, K].
    implementation: one of IMPLEMENTATIONS, which then runs or raises; None takes the best for the
      device, and where the native CPU library is missing that is XLA, said once.

  Returns:
    float[..., N_i] in x's dtype, one for each weight.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
    NotImplementedError: the named implementation cannot take these weights, or cannot run here.
  """
  for w in ws:
    if w.shape[1] != x.shape[-1]:
      raise ValueError(f"x has {x.shape[-1]} columns where the {w.format} weight has {w.shape[1]}.")
  x_mk = x.reshape(-1, x.shape[-1])
  return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in _pick(x_mk, ws, implementation)]


def _pick(x: jax.Array, ws: Sequence[BlockArray], name: str | None) -> list[jax.Array]:
  if name is None:
    return _best(x, ws)
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"implementation '{name}' is not one of {', '.join(IMPLEMENTATIONS)}.")
  if not name.startswith("cpu"):
    return {"reference": reference, "xla": xla}[name].int4_matmul(x, ws)
  isa = name.removeprefix("cpu").removeprefix("_") or "best"
  if not cpu.supports(ws) or ffi.isa_name(isa) is None:
    raise NotImplementedError(
      f"'{name}' needs the native library, a processor with these instructions and weights in the "
      "x16 layout."
    )
  return cpu.int4_matmul(x, ws, isa=isa)


def _best(x: jax.Array, ws: Sequence[BlockArray]) -> list[jax.Array]:
  # The x16 layout is made only for CPUs that have the library, when loading, so it decides.
  return cpu.int4_matmul(x, ws) if cpu.supports(ws) else xla.int4_matmul(x, ws)


def take_rows(w: BlockArray | jax.Array, ids: jax.Array) -> jax.Array:
  """Rows of a matrix [N, K] (an embedding table): ids int32[...] -> float32[..., K].

  An id outside the matrix is an error on the CPU and takes the nearest row elsewhere: check ids
  before they reach the device.
  """
  if not isinstance(w, BlockArray):
    return jnp.take(w, ids, axis=0, mode="clip").astype(jnp.float32)
  flat = ids.reshape(-1)
  rows = cpu.take_rows(w, flat) if cpu.supports([w]) else reference.take_rows(w, flat)
  return rows.reshape(*ids.shape, w.shape[1])
