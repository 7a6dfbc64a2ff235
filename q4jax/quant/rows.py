"""Work on a large matrix a few rows at a time, on all cores: temporary arrays stay in cache."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 18  # Weights worked on at once: a float32 temporary is 1 MiB.


def by_rows(
  function: Callable[[int, int], NDArray], shape: tuple[int, ...], chunk: int = CHUNK
) -> NDArray:
  """`function(start, stop)` of runs of rows of a matrix of this shape, joined along axis 0.

  Runs are of about `chunk` weights; which rows share a run does not depend on the cores. NumPy
  lets other threads run while it works on arrays.
  """
  n, k = shape
  rows = max(1, chunk // max(k, 1))
  runs = [(start, min(start + rows, n)) for start in range(0, n, rows)]
  if len(runs) == 1:
    return function(*runs[0])
  with ThreadPoolExecutor(_cores()) as pool:
    return np.concatenate(list(pool.map(lambda run: function(*run), runs)))


def _cores() -> int:
  """Of those that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
