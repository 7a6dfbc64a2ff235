"""The C++ kernels outside of JAX: AVX-512 and NEON on machines without, and under the sanitizers.

  pytest -m slow tests/kernels/test_native_sources.py      # minutes, most of them the compilers'

`checksums.cc` runs every kernel of one instruction set and prints checksums of what comes out,
which must be AVX2's, bit by bit. `emulated_avx512/immintrin.h` gives the AVX-512 intrinsics in
terms of AVX2's, so that the AVX-512 source itself runs; NEON is cross-compiled and runs under qemu.
The program's buffers have exactly the sizes that the kernels are promised: AddressSanitizer sees a
step outside.
"""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

SOURCES = Path(__file__).parents[2] / "kernels" / "csrc"
CHECKSUMS = Path(__file__).with_name("checksums.cc")
EMULATION = Path(__file__).with_name("emulated_avx512")
# -ffp-contract=off as in setup.py: an FMA only where one is written.
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wno-psabi", f"-I{SOURCES}"]
X86 = ["g++", *FLAGS, "-mavx2", "-mfma", "-mf16c"]
ARM = ["aarch64-linux-gnu-g++", *FLAGS]
NEON = [*ARM, "-march=armv8.2-a+dotprod"]
QEMU = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

needs_x86 = pytest.mark.skipif(
  platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ for x86-64"
)
needs_arm = pytest.mark.skipif(
  shutil.which(ARM[0]) is None or shutil.which(QEMU[0]) is None,
  reason="needs the Debian packages g++-aarch64-linux-gnu and qemu-user",
)


def checksums(folder: Path, isa: str, compiler: list[str], emulator: Sequence[str] = ()) -> str:
  """What checksums.cc prints of kernels_<isa>.cc, built by `compiler` (with its flags)."""
  program = folder / isa
  define = f"-DKERNELS=k{isa.capitalize()}"
  files = [CHECKSUMS, SOURCES / f"kernels_{isa}.cc"]
  subprocess.run([*compiler, define, *files, "-o", program], check=True)
  done = subprocess.run([*emulator, program], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def assert_same(a: str, b: str) -> None:
  lines, others = a.splitlines(), b.splitlines()
  assert len(lines) > 1000
  assert len(lines) == len(others)
  assert [f"{x} | {y}" for x, y in zip(lines, others, strict=True) if x != y] == []


@pytest.mark.slow
@needs_x86
@pytest.mark.parametrize("extra", [[], SANITIZERS], ids=["plain", "sanitized"])
def test_avx512_is_avx2_to_the_bit_and_stays_in_bounds(extra: list[str], tmp_path: Path) -> None:
  compiler = [*X86, *extra, f"-I{EMULATION}"]
  with ThreadPoolExecutor(2) as pool:
    assert_same(*pool.map(lambda isa: checksums(tmp_path, isa, compiler), ["avx2", "avx512"]))


@pytest.mark.slow
@needs_x86
@needs_arm
def test_neon_is_avx2_to_the_bit(tmp_path: Path) -> None:
  with ThreadPoolExecutor(2) as pool:
    avx2 = pool.submit(checksums, tmp_path, "avx2", X86)
    neon = pool.submit(checksums, tmp_path, "neon", NEON, QEMU)
    assert_same(avx2.result(), neon.result())


@pytest.mark.slow
@needs_arm
def test_arm_processors_get_what_they_have(tmp_path: Path) -> None:
  """handlers.cc compiles for ARM64, and chooses NEON only where there is a dot product."""
  main = tmp_path / "main.cc"
  main.write_text("""
    #include <stdio.h>
    #include "kernels.h"
    const q4::Kernels q4::kScalar{"scalar"}, q4::kNeon{"neon"};
    extern "C" const char* q4jax_isa_name(int64_t isa);
    int main() {
      for (int isa = 0; isa <= 4; isa++) {
        const char* name = q4jax_isa_name(isa);
        printf("%s ", name ? name : "-");
      }
    }
  """)
  program = tmp_path / "main"
  include = ["-isystem", jax.ffi.include_dir(), "-pthread"]
  subprocess.run([*ARM, *include, main, SOURCES / "handlers.cc", "-o", program], check=True)
  for cpu, names in (("max", "neon scalar - - neon"), ("cortex-a53", "scalar scalar - - -")):
    done = subprocess.run([*QEMU, "-cpu", cpu, program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (names, ""), cpu
