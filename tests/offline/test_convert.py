"""What converting costs in memory, and what a kill leaves: watched in child processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gguf_model import large, vectors_and_matrices, write
from q4jax.formats.open import open_checkpoint

MIB = 1 << 20
SIZE = 144
SLACK = 48 * MIB  # Python's and NumPy's own, the header, chunks of 16 MiB.
MEMORY = """
import sys
from pathlib import Path
from q4jax.offline.convert import convert

def memory(field):
  return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024

source, small, out = sys.argv[1:]
convert(small, "warm" + out)  # Pays for what any first conversion imports and keeps.
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # Sets the peak to what is resident.
convert(source, out)
print(memory("VmHWM") - before)
"""
SLOWLY = """
import sys, time
from q4jax.offline.convert import convert

def progress(done, total):
  print(done, flush=True)
  time.sleep(0.02)

convert(*sys.argv[1:], force=True, progress=progress)
print("complete", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
  folder = tmp_path_factory.mktemp("large")
  write(folder / "big.gguf", large(SIZE))
  write(folder / "small.gguf", large(4))
  yield folder
  for path in folder.iterdir():
    path.unlink()


def run(code: str, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
  root = Path(__file__).parents[2]
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
  return subprocess.Popen(
    [sys.executable, "-c", code, *arguments],
    cwd=folder,
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )


def largest_tensor() -> int:
  matrices = [shape for shape in vectors_and_matrices(large(SIZE)).values() if len(shape) == 2]
  return max(n * k // 256 * 144 for n, k in matrices)


def test_the_peak_is_one_tensor(folder: Path) -> None:
  """Of 144 MiB, the largest tensor has 24; two of that size fit what is asked."""
  if not Path("/proc/self/clear_refs").exists():
    pytest.skip("needs Linux's /proc")
  for source, out in (("big.gguf", "a.gguf"), ("big.gguf", "b.qbin"), ("b.qbin", "c.gguf")):
    with run(MEMORY, folder, source, "small.gguf", out) as child:
      assert child.stdout is not None
      peak = int(json.loads(child.stdout.read()))
    assert peak < 2 * largest_tensor() + SLACK < SIZE * MIB, (source, out, peak / MIB)
  assert (folder / "a.gguf").read_bytes() == (folder / "c.gguf").read_bytes()


@pytest.mark.parametrize("out", ["out.gguf", "out.qbin", "out.orbax"])
def test_a_kill_leaves_nothing_or_all(out: str, tmp_path: Path) -> None:
  write(tmp_path / "in.gguf", large(4))
  for written in (3, 20):  # Of 20 tensors: the last kill comes as all is flushed and named.
    with run(SLOWLY, tmp_path, "in.gguf", out) as child:
      assert child.stdout is not None
      for _ in range(written):
        child.stdout.readline()
      time.sleep(0.02 if written == 20 else 0)
      child.send_signal(signal.SIGKILL)
    if written < 20:
      assert not (tmp_path / out).exists()
    elif (tmp_path / out).exists():
      same(tmp_path / out, tmp_path / "in.gguf")
  with run(SLOWLY, tmp_path, "in.gguf", out) as child:
    assert child.stdout is not None
    while child.stdout.readline() != "complete\n":
      pass
    child.kill()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["in.gguf", out]
  same(tmp_path / out, tmp_path / "in.gguf")


def same(a: Path, b: Path) -> None:
  with open_checkpoint(a) as one, open_checkpoint(b) as other:
    assert one.tensors == other.tensors
    for name in one.tensors:
      assert one.rows(name).tobytes() == other.rows(name).tobytes(), name
