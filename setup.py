"""Builds the native CPU library. All else about the packages stands in pyproject.toml.

`kernels/csrc/*.cc` become `q4jax_kernels/_native.so`: a plain library of XLA FFI handlers that
ctypes loads, no Python module, so one file serves every Python. Where it cannot be compiled the
build warns in one line and goes on; q4jax then runs on XLA alone.
"""

import hashlib
import os
import platform
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# No contraction: an FMA is written where it is wanted, and no result depends on the compiler.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-g0", "-ffp-contract=off", "-Wno-psabi"]
# A file for one instruction set says so in its name; the library picks one at run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
# gcc 12 takes its own AVX-512 intrinsics for uninitialised (its bug 105593), 35,000 lines long.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
NEON = ["-march=armv8.2-a+dotprod"]
X86_FLAGS = {"_avx2": AVX2, "_avx512": [*AVX2, *AVX512, *QUIET]}
ARM_FLAGS = {"_neon": NEON}
ISA_FLAGS = X86_FLAGS | ARM_FLAGS


def isa_suffix(source: str) -> str | None:
  """The key of ISA_FLAGS that the file name ends with."""
  return next((suffix for suffix in ISA_FLAGS if Path(source).stem.endswith(suffix)), None)


def ffi_headers() -> str:
  """The XLA FFI headers of the very jaxlib that pyproject.toml pins for this Python.

  A library built with newer headers is refused by an older runtime, so a jaxlib that happens to
  be installed will not do. Exits, naming both versions, where that is what we would have to use.
  """
  requires = tomllib.loads(Path("pyproject.toml").read_text())["build-system"]["requires"]
  jaxlib = next(
    r
    for r in map(Requirement, requires)
    if r.name == "jaxlib" and (r.marker is None or r.marker.evaluate())
  )
  try:
    found = metadata.version("jaxlib")
  except metadata.PackageNotFoundError:
    found = "none"
  if found == "none" or found not in jaxlib.specifier:
    raise SystemExit(
      "setup.py: the native library must be built with the headers of the oldest supported jaxlib, "
      f"{jaxlib.specifier}; found {found}. Run `make native`, or let pip isolate the build."
    )
  return str(metadata.distribution("jaxlib").locate_file("jaxlib/include"))


class BuildNative(build_ext):
  """Compiles every source by itself: with its own flags, and on all cores."""

  def get_ext_filename(self, fullname: str) -> str:
    return os.path.join(*fullname.split(".")) + ".so"

  def build_extension(self, ext: Extension) -> None:
    include = ffi_headers()
    texts = [path.read_bytes() for path in sorted(Path("kernels/csrc").iterdir())]
    version = metadata.version("jaxlib")

    def compile_one(source: str) -> str:
      """The object file of a source; an editable install, a wheel and `make native` share it."""
      flags = [*FLAGS, *ISA_FLAGS.get(isa_suffix(source) or "", [])]
      compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
      told = repr((compiler, version, source, flags, texts))
      folder = Path("build/native")
      kept = folder / f"{Path(source).stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.o"
      if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as here:
          flags = [f"-isystem{include}", *flags]
          (made,) = self.compiler.compile([source], output_dir=here, extra_postargs=flags)
          os.replace(made, kept)
      return str(kept)

    try:
      with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, ext.sources))
      path = self.get_ext_fullpath(ext.name)
      self.compiler.link_shared_object(objects, path, target_lang="c++")
    except (CompileError, LinkError) as error:
      reason = f"{error}; q4jax will run without it, slower. Install g++ >= 9 and build again"
      raise CompileError(reason) from error  # An optional extension's error becomes a warning.


def sources() -> list[str]:
  """The C++ files for this processor."""
  here = {"x86_64": X86_FLAGS, "AMD64": X86_FLAGS, "aarch64": ARM_FLAGS, "arm64": ARM_FLAGS}
  mine = [None, *here.get(platform.machine(), {})]
  files = sorted(str(path) for path in Path("kernels/csrc").glob("*.cc"))
  return [file for file in files if isa_suffix(file) in mine]


setup(
  cmdclass={"build_ext": BuildNative},
  # Windows' compiler takes other flags, and nobody has tried.
  ext_modules=[Extension("q4jax_kernels._native", sources(), language="c++", optional=True)]
  if os.name == "posix" and sources()
  else [],
)
