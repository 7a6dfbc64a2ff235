"""The C++ kernels outside of JAX: AVX-512 on machines without it, and under the sanitizers.

  pytest -m slow tests/kernels/test_native_sources.py      # 5 minutes on two cores

`emulated_avx512/immintrin.h` gives the AVX-512 intrinsics in terms of AVX2's, so that the AVX-512
source itself runs; `compare.cc` holds it to the AVX2 kernels bit by bit, in every format. Its
buffers have exactly the sizes that the kernels are promised: AddressSanitizer sees a step outside.
"""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "kernels" / "csrc"
EMULATION = Path(__file__).parent / "emulated_avx512"
# -ffp-contract=off as in setup.py: an FMA only where one is written.
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wno-psabi", "-mavx2", "-mfma", "-mf16c"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.slow
@pytest.mark.skipif(
  platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ for x86-64"
)
@pytest.mark.parametrize("extra", [[], SANITIZERS], ids=["plain", "sanitized"])
def test_avx512_is_avx2_to_the_bit_and_stays_in_bounds(extra, tmp_path):
  def build(source: Path) -> Path:
    out = tmp_path / f"{source.stem}.o"
    include = [f"-I{EMULATION}", f"-I{SOURCES}"]
    subprocess.run(["g++", *FLAGS, *extra, *include, "-c", source, "-o", out], check=True)
    return out

  sources = [SOURCES / "kernels_avx2.cc", SOURCES / "kernels_avx512.cc", EMULATION / "compare.cc"]
  with ThreadPoolExecutor(2) as pool:
    objects = list(pool.map(build, sources))
  program = tmp_path / "compare"
  subprocess.run(["g++", *extra, *objects, "-o", program], check=True)
  done = subprocess.run([program], capture_output=True, text=True)
  assert done.returncode == 0 and "0 differ" in done.stdout, done.stdout + done.stderr
