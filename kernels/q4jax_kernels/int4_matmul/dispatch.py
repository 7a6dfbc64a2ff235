"""Which implementation multiplies which weight, and the check that a named one can."""

import functools
import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType

import jax

from q4jax_kernels import ffi
from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.int4_matmul import cpu, reference, xla
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.q4_array import Q4Array
from q4jax_kernels.row_planar_array import RowPlanarArray

Weight = BlockArray | Q4Array | PlanarArray | RowPlanarArray

# Kernels of Pallas by the platform they are for. Each module has int4_matmul(x, ws), supports(w),
# and perhaps WEIGHT, the type that it reads in place of PlanarArray. They are imported when asked
# for: Pallas is slow to import, and not to be had on every platform.
_KERNELS = {"tpu": "pallas_tpu", "cuda": "mosaic_gpu"}
IMPLEMENTATIONS = (
  *("reference", "xla", "cpu", "cpu_scalar", "cpu_avx2", "cpu_avx512", "cpu_neon", "cpu_exact"),
  *_KERNELS.values(),
)


def check(name: str, ws: Sequence[Weight]) -> None:
  """Raises unless implementation `name` takes all of `ws`: ValueError if there is none so called,
  NotImplementedError if these weights or this machine are not for it.
  """
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"implementation '{name}' is not one of {', '.join(IMPLEMENTATIONS)}.")
  if name.startswith("cpu"):
    if not cpu.supports(ws) or ffi.isa_name(_isa(name)) is None:
      raise NotImplementedError(
        f"'{name}' needs the native library, a processor with these instructions and weights in "
        "the x16 layout (of a Q4Array: q4_blocks.to_blocks(w).tiles())."
      )
  elif name in _KERNELS.values():
    module = _kernel(name)
    for w in ws:
      if not _takes(module, w):
        kind = type(w).__name__
        wanted = _weight_type(module).__name__
        raise NotImplementedError(
          f"'{name}' does not take this {kind} of shape {list(w.shape)}; it reads a {wanted} with "
          "planes and groups that its `supports` names."
        )


def best(w: Weight) -> str:
  """The implementation for this weight where none is named; "planar" is the platform's kernel."""
  if isinstance(w, BlockArray):
    # The x16 layout is made only for CPUs that have the library, when loading, so it decides.
    return "cpu" if cpu.supports([w]) else "xla"
  if isinstance(w, Q4Array):
    _say_xla("Q4Array", "any device (prepare it: q4_blocks.to_blocks(w).tiles() for a CPU)")
    return "xla"
  return "planar"


def run(name: str, x: jax.Array, ws: Sequence[Weight]) -> list[jax.Array]:
  """x float[M, K] times each weight's transpose: [M, N_i] in x's dtype."""
  if name.startswith("cpu"):
    blocks = [w for w in ws if isinstance(w, BlockArray)]  # All of them: `check` saw to it.
    return cpu.int4_matmul(x, blocks, isa=_isa(name), exact=name == "cpu_exact")
  if name == "planar":
    return [_planar(x, w) for w in ws]
  module = {"reference": reference, "xla": xla}.get(name) or _kernel(name)
  return module.int4_matmul(x, ws)


def _planar(x: jax.Array, w: Weight) -> jax.Array:
  """The kernel of the platform that the program is lowered for, and XLA where there is none."""
  branches = {}
  for platform, name in _KERNELS.items():
    module = _kernel_or_none(name)
    if module is not None and _takes(module, w):
      branches[platform] = lambda x, w, module=module: module.int4_matmul(x, [w])[0]
  here = jax.default_backend()
  if here not in branches and not (here == "gpu" and "cuda" in branches):
    _say_xla(type(w).__name__, here)
  if not branches:
    return xla.int4_matmul(x, [w])[0]
  return jax.lax.platform_dependent(
    x, w, **branches, default=lambda x, w: xla.int4_matmul(x, [w])[0]
  )


@functools.cache
def _say_xla(kind: str, platform: str) -> None:
  warnings.warn(
    f"q4jax: there is no kernel for this {kind} on {platform}; XLA dequantises it in every call.",
    stacklevel=2,
  )


@functools.cache
def _kernel(name: str) -> ModuleType:
  module = _kernel_or_none(name)
  if module is None:
    raise NotImplementedError(f"'{name}' is not part of this installation of q4jax_kernels.")
  return module


@functools.cache
def _kernel_or_none(name: str) -> ModuleType | None:
  try:
    return importlib.import_module(f"q4jax_kernels.int4_matmul.{name}")
  except ImportError:  # The module, or the part of Pallas that it needs.
    return None


def supports(name: str, w: Weight) -> bool:
  """Whether the Pallas kernel `name` is there and takes this weight."""
  module = _kernel_or_none(name)
  return module is not None and _takes(module, w)


def _weight_type(module: ModuleType) -> type:
  return getattr(module, "WEIGHT", PlanarArray)


def _takes(module: ModuleType, w: Weight) -> bool:
  return isinstance(w, _weight_type(module)) and module.supports(w)


def _isa(name: str) -> str:
  return "best" if name in ("cpu", "cpu_exact") else name.removeprefix("cpu_")
