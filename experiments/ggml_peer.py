"""llama.cpp's own product of a quantised matrix, through the libraries of a build (ctypes).

The functions are those of ggml.h and ggml-cpu.h (github.com/ggml-org/llama.cpp, ggml/include). Rows
lie as in a file, so this is the kernel that llama.cpp runs where weights are not repacked.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

# For the work areas of this many computations, which ggml takes from the context and never returns.
_COMPUTATIONS = 64


class _InitParams(ctypes.Structure):
  _fields_ = [
    ("mem_size", ctypes.c_size_t),
    ("mem_buffer", ctypes.c_void_p),
    ("no_alloc", ctypes.c_bool),
  ]


class GgmlMatmul:
  """x float32[M, K] times the transpose of each of several quantised matrices [N, K].

  Args:
    folder: of libggml-base.so and libggml-cpu.so.
    format: lower-case name of a GGUF type, such as q4_k.
    weights: uint8[N, row_bytes] each.

  Raises:
    OSError: the libraries are not there, or are of a version without these functions.
    RuntimeError: too many computations were asked for.
  """

  def __init__(
    self, folder: Path, format: str, weights: Sequence[np.ndarray], x: np.ndarray, threads: int
  ) -> None:
    base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
    pointers = (
      "ggml_init",
      "ggml_new_tensor_2d",
      "ggml_mul_mat",
      "ggml_new_graph",
      "ggml_get_data",
    )
    try:
      for name in pointers:
        getattr(base, name).restype = ctypes.c_void_p
      self._compute = cpu.ggml_graph_compute_with_ctx
      cpu.ggml_cpu_init()
    except AttributeError as error:
      raise OSError(f"{folder}: {error}; another version of ggml is needed.") from error
    (m, k), n = x.shape, len(weights[0])
    # Weights, x, and the products; work: x rounded to bytes, with scales.
    size = sum(w.nbytes for w in weights) + x.nbytes + 4 * m * n * len(weights)
    size += _COMPUTATIONS * (2 * m * k + (1 << 18)) + (8 << 20)
    self._left, self._threads, self._base = _COMPUTATIONS, threads, base
    self._context = ctypes.c_void_p(base.ggml_init(_InitParams(size, None, False)))
    kind = gguf.GGMLQuantizationType[format.upper()]
    source = self._tensor(gguf.GGMLQuantizationType.F32, x, k)
    self._graph = ctypes.c_void_p(base.ggml_new_graph(self._context))
    self._products = []
    for w in weights:
      matrix = self._tensor(kind, w, k)
      product = ctypes.c_void_p(base.ggml_mul_mat(self._context, matrix, source))
      base.ggml_build_forward_expand(self._graph, product)
      self._products.append(product)
    self._shape = (m, n)

  def _tensor(self, kind: int, values: np.ndarray, columns: int) -> ctypes.c_void_p:
    sizes = (ctypes.c_int64(columns), ctypes.c_int64(len(values)))
    tensor = ctypes.c_void_p(
      self._base.ggml_new_tensor_2d(self._context, ctypes.c_int(kind), *sizes)
    )
    data = np.ascontiguousarray(values)
    ctypes.memmove(self._base.ggml_get_data(tensor), data.ctypes.data, data.nbytes)
    return tensor

  def __call__(self) -> None:
    """Computes all products."""
    if self._left == 0:
      raise RuntimeError(f"more than {_COMPUTATIONS} computations; the context has no memory left.")
    self._left -= 1
    status = self._compute(self._context, self._graph, ctypes.c_int(self._threads))
    if status != 0:
      raise RuntimeError(f"ggml_graph_compute_with_ctx returned {status}.")

  def product(self, i: int) -> np.ndarray:
    """The i-th product, float32[M, N], as the last call left it."""
    m, n = self._shape
    at = self._base.ggml_get_data(self._products[i])
    return np.ctypeslib.as_array((ctypes.c_float * (m * n)).from_address(at)).reshape(m, n).copy()

  def __del__(self) -> None:
    if hasattr(self, "_context"):
      self._base.ggml_free(self._context)
