"""The build: flags of each C++ file, the headers' version, no compiler; and what is declared."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NATIVE = Path("kernels/q4jax_kernels/_native.so")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

# Tells which instructions it was compiled for, and that the FFI headers were found.
SOURCE = """
#include "xla/ffi/api/version.h"
#if defined(__AVX512VNNI__)
extern "C" int NAME() { return 512; }
#elif defined(__AVX2__)
extern "C" int NAME() { return 2; }
#else
extern "C" int NAME() { return headers; }
#endif
"""


def pinned_jaxlib() -> str:
  (pin,) = [
    requirement
    for requirement in map(Requirement, PYPROJECT["build-system"]["requires"])
    if requirement.name == "jaxlib" and (not requirement.marker or requirement.marker.evaluate())
  ]
  (version,) = pin.specifier
  assert version.operator == "=="
  return version.version


def build(
  tree: Path, jaxlib: str, sources: dict[str, str], **environment: str
) -> subprocess.CompletedProcess[str]:
  """Runs the project's setup.py in `tree` on these sources, beside a jaxlib of that version."""
  for name in ("setup.py", "pyproject.toml"):
    shutil.copy(ROOT / name, tree)
  files = {f"kernels/csrc/{name}.cc": text.replace("NAME", name) for name, text in sources.items()}
  files |= {
    "LICENSE": "",
    "README.md": "",
    "kernels/q4jax_kernels/__init__.py": "",
    "site/jaxlib/include/xla/ffi/api/version.h": "const int headers = 102;",
    f"site/jaxlib-{jaxlib}.dist-info/METADATA": f"Name: jaxlib\nVersion: {jaxlib}\n",
  }
  for name, text in files.items():
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text(text)
  return subprocess.run(
    [sys.executable, "setup.py", "build_ext", "--inplace"],
    cwd=tree,
    env=os.environ | {"PYTHONPATH": str(tree / "site")} | environment,
    capture_output=True,
    text=True,
    check=False,
  )


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles x86 instructions")
def test_each_file_has_its_own_flags(tmp_path: Path) -> None:
  built = build(
    tmp_path, pinned_jaxlib(), dict.fromkeys(["a_avx2", "a_avx512", "a_neon", "a"], SOURCE)
  )
  assert built.returncode == 0, built.stderr
  library = ctypes.CDLL(str(tmp_path / NATIVE))
  assert (library.a(), library.a_avx2(), library.a_avx512()) == (102, 2, 512)
  assert not hasattr(library, "a_neon")  # For another processor.


def test_newer_headers_are_refused(tmp_path: Path) -> None:
  built = build(tmp_path, "99.0.1", {"a": SOURCE})
  assert built.returncode != 0
  assert "99.0.1" in built.stderr
  assert f"=={pinned_jaxlib()}" in built.stderr
  assert "make native" in built.stderr
  assert not (tmp_path / NATIVE).exists()


def test_no_compiler_is_one_warning(tmp_path: Path) -> None:
  compiler = str(tmp_path / "no-such-compiler")
  built = build(tmp_path, pinned_jaxlib(), {"a": SOURCE}, CC=compiler, CXX=compiler)
  assert built.returncode == 0, built.stderr
  (warning,) = [line for line in built.stderr.splitlines() if "warning" in line.lower()]
  assert "no-such-compiler" in warning
  assert "Install g++" in warning
  assert not (tmp_path / NATIVE).exists()


def test_headers_are_the_oldest_supported() -> None:
  (jax,) = [r for r in map(Requirement, PYPROJECT["project"]["dependencies"]) if r.name == "jax"]
  if sys.version_info < (3, 15):  # Later ones start with a newer jaxlib.
    assert str(jax.specifier) == f">={pinned_jaxlib()}"


def test_every_direct_dependency_is_pinned() -> None:
  extras = PYPROJECT["project"]["optional-dependencies"]
  declared = [
    *PYPROJECT["project"]["dependencies"],
    *extras["dev"],
    *extras["docs"],
    *extras["train"],
  ]
  names = {canonicalize_name(Requirement(line).name) for line in declared} - {"q4jax"}
  lines = (ROOT / "constraints.txt").read_text().splitlines()
  pins = [Requirement(line) for line in lines if not line.startswith("#")]
  assert names <= {canonicalize_name(pin.name) for pin in pins}
  assert all(specifier.operator == "==" for pin in pins for specifier in pin.specifier)


def test_every_module_is_in_a_package() -> None:
  """The wheel holds packages alone: a folder without `__init__.py` would stay behind."""
  modules = [*ROOT.glob("q4jax/**/*.py"), *ROOT.glob("kernels/q4jax_kernels/**/*.py")]
  assert modules
  folders = {module.parent.relative_to(ROOT) for module in modules}
  assert not [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()]
