"""What loading costs in memory, watched from within a child process that loads a large file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_model import large, vectors_and_matrices, write
from q4jax_kernels import ffi

MIB = 1 << 20
SIZE = 144
# The largest tensor, and what the issue allows besides.
SLACK = 64 * MIB
SCRIPT = """
import json, sys
from pathlib import Path
import jax
from q4jax.loading import load

def memory(field):
  return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024

jax.block_until_ready(jax.numpy.zeros(1))
load(sys.argv[2])  # Pays for what any first load imports, compiles and keeps.
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # Sets the peak to what is resident.
model = load(sys.argv[1])
print(json.dumps({"size": model.nbytes, "peak": memory("VmHWM") - before,
                  "resident": memory("VmRSS") - before}))
"""


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
  if not Path("/proc/self/clear_refs").exists():
    pytest.skip("needs Linux's /proc")
  if not ffi.available():
    pytest.skip("without the native library, weights are views of the mapped file")
  folder = tmp_path_factory.mktemp("large")
  big, small = folder / "big.gguf", folder / "small.gguf"
  write(big, large(SIZE))
  write(small, large(4))
  try:
    child = subprocess.run(
      [sys.executable, "-c", SCRIPT, str(big), str(small)],
      cwd=Path(__file__).parents[1],
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
  finally:
    big.unlink()
  return json.loads(child.stdout)


def largest_tensor() -> int:
  matrices = [shape for shape in vectors_and_matrices(large(SIZE)).values() if len(shape) == 2]
  return max(n * k // 256 * 144 for n, k in matrices)


def test_the_peak_is_one_tensor_above(memory: dict[str, int]) -> None:
  assert 0.9 * SIZE * MIB < memory["size"] < 1.1 * SIZE * MIB
  assert memory["peak"] < memory["size"] + largest_tensor() + SLACK


def test_weights_are_there_once(memory: dict[str, int]) -> None:
  """Neither a second copy nor the file's pages stay; what the small model freed may be reused."""
  assert abs(memory["resident"] - memory["size"]) < 16 * MIB
