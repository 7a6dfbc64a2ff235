"""The native library where it is missing, broken, or lacks instructions: said once, and no harm."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from q4jax_kernels import ffi

ROOT = Path(__file__).parents[2]
# Multiplies, gathers and attends with whatever this copy of the package has, and checks the sums.
SCRIPT = """
import warnings
import jax, jax.numpy as jnp, numpy as np
from q4jax_kernels import ffi
from q4jax_kernels.attention import cached_attention
from q4jax_kernels.block_array import BlockArray, interleave_tile
from q4jax_kernels.int4_matmul import int4_matmul, take_rows

# Row r of q8_0 with d = 0.5: weight k is 0.5 * (r + k).
codes = np.arange(16)[:, None] + np.arange(32)
rows = np.concatenate([np.tile(np.array([0x00, 0x38]), (16, 1)), codes], 1).astype(np.uint8)
tile = np.empty((1, rows.size), np.uint8)
with warnings.catch_warnings(record=True) as caught:
  warnings.simplefilter("always")
  interleave_tile(rows, "q8_0", tile[0])
  w = BlockArray(jnp.asarray(tile), "q8_0", 16, "x16")
  x = jnp.ones((2, 32))
  (y,) = jax.jit(lambda x, w: int4_matmul(x, [w]))(x, w)
  np.testing.assert_allclose(y[1], 0.5 * codes.sum(1), rtol=1e-3)
  np.testing.assert_array_equal(jax.jit(take_rows)(w, jnp.array([3, 15])), 0.5 * codes[[3, 15]])
  one, cache = jnp.ones((1, 1, 2, 8)), jnp.full((1, 1, 2, 4, 8), jnp.nan, jnp.float16)
  at = jnp.zeros(1, jnp.int32)
  attend = jax.jit(cached_attention, static_argnames='layer')
  out, _ = attend(one, one, 3 * one, (cache, cache), at, at + 1, layer=0)
  np.testing.assert_array_equal(out, 3 * one)
print(ffi.available(), ffi.isa_name(), ffi.isa_name("scalar"))
for warning in caught:
  print(warning.category.__name__, warning.message)
"""


def run(tree: Path, library: bytes | None) -> list[str]:
  """Runs SCRIPT with a copy of the package whose library is these bytes; the lines it printed."""
  package = tree / "q4jax_kernels"
  source = ROOT / "kernels" / "q4jax_kernels"
  shutil.copytree(source, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
  if library is not None:
    (package / "_native.so").write_bytes(library)
  child = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    env={**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"},
    cwd=tree,
    capture_output=True,
    text=True,
    check=False,
  )
  assert child.returncode == 0, child.stderr
  return child.stdout.splitlines()


def test_a_missing_library_is_one_warning(tmp_path: Path) -> None:
  has, *warnings = run(tmp_path, None)
  assert has == "False None None"
  (warning,) = warnings
  assert warning.startswith("UserWarning q4jax: the native CPU kernels are not available")
  assert "it was not built" in warning
  assert "Install g++" in warning and "make native" in warning


@pytest.mark.parametrize("library", [b"", b"not a library", b"\x7fELF" + bytes(4096)])
def test_a_broken_library_is_one_warning(tmp_path: Path, library: bytes) -> None:
  has, *warnings = run(tmp_path, library)
  assert has == "False None None"
  (warning,) = warnings
  assert "the native CPU kernels are not available" in warning
  assert "_native.so" in warning, "the loader's own reason is told"


def test_a_library_of_another_version_is_one_warning(tmp_path: Path) -> None:
  """One that loads and lacks a handler, as an older build would."""
  if not shutil.which("gcc"):
    pytest.skip("needs gcc to build a stand-in")
  stand_in = tmp_path / "stand_in.so"
  subprocess.run(
    ["gcc", "-shared", "-o", str(stand_in), "-xc", "-"],
    input="int q4jax_matmul;",
    text=True,
    check=True,
  )
  has, *warnings = run(tmp_path, stand_in.read_bytes())
  assert has == "False None None"
  (warning,) = warnings
  assert "q4jax_take_rows" in warning and "make native" in warning


def test_the_library_is_used_where_it_is(tmp_path: Path) -> None:
  if not ffi.available():
    pytest.skip("needs the native library")
  (has,) = run(tmp_path, (ROOT / "kernels" / "q4jax_kernels" / "_native.so").read_bytes())
  assert has == f"True {ffi.isa_name()} scalar"


def test_isa_names() -> None:
  if not ffi.available():
    pytest.skip("needs the native library")
  flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
  assert ffi.isa_name("scalar") == "scalar"
  has = {
    "avx2": all(f" {flag} " in flags for flag in ("avx2", "fma", "f16c")),
    "avx512": all(
      f" {flag} " in flags
      for flag in ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
    ),
    "neon": " asimddp " in flags.replace("\n", " \n"),  # which may end its line
  }
  for isa, there in has.items():
    assert ffi.isa_name(isa) == (isa if there else None)
  best = next((isa for isa in ("avx512", "avx2", "neon") if has[isa]), "scalar")
  assert ffi.isa_name() == ffi.isa_name("best") == best
