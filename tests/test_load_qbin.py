"""A .qbin in memory: the file itself, shared between processes, and the same model as its GGUF."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from gguf_model import ModelSpec, large, write
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.hub import resolve
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.loading import load
from q4jax_kernels import ffi
from q4jax_kernels.block_array import BlockArray
from qbin_files import convert

MIB = 1 << 20
TOKENS = np.arange(3, 40)


def qbin_of(gguf: Path, path: Path, layout: str = "x16") -> Path:
  with GGUFCheckpoint.open(gguf) as source:
    convert(source, path, layout)
  return path


@pytest.mark.parametrize("layout", ["rows", "x16"])
@pytest.mark.parametrize("native", [True, False])
def test_tiny_answers_bit_for_bit_the_same(
  layout: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  if not native:
    monkeypatch.setattr(ffi, "library", lambda: None)
  model, expected = load(qbin_of(resolve("tiny"), tmp_path / "t.qbin", layout)), load("tiny")
  assert np.array_equal(model.logits(TOKENS), expected.logits(TOKENS))
  text = "The built-in function\u00e9"
  assert model.tokenizer.encode(text) == expected.tokenizer.encode(text)
  assert model.metadata == expected.metadata and model.nbytes == expected.nbytes


def test_tiles_of_an_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Tiles whose 5- and 6-bit codes lie as in a GGUF are read, though not where they lie."""
  formats = ["q5_k", "q6_k", "q4_k"]
  spec = ModelSpec(
    d_model=256, d_ffn=512, heads=4, head_dim=64, type=lambda name: formats[len(name) % 3]
  )
  gguf = write(tmp_path / "a.gguf", spec)
  with monkeypatch.context() as old:
    old.setattr("q4jax.formats.qbin_header.CODES", {})
    old.setattr("q4jax_kernels.code_words.CODES", {})
    path = qbin_of(gguf, tmp_path / "a.qbin")
  with QbinCheckpoint.open(path) as checkpoint:
    places = list(checkpoint.places.values())
    assert {p.layout for p in places} == {"rows", "x16"}
    assert {p.tensor.format for p in places if p.mappable} >= {"q4_k"}
    assert {p.tensor.format for p in places if p.tiled and not p.mappable} == {"q5_k", "q6_k"}
  assert np.array_equal(load(path).logits(TOKENS), load(gguf).logits(TOKENS))


@pytest.mark.parametrize("layout", ["planes", "row_planes"])
def test_other_devices_layouts(
  layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Tiles are taken apart again where another device wants other layouts."""
  path = qbin_of(resolve("tiny"), tmp_path / "t.qbin")
  monkeypatch.setattr(ffi, "library", lambda: None)
  monkeypatch.setattr("q4jax.loading.layout_for", lambda device: layout)
  assert np.array_equal(load(path).logits(TOKENS), load("tiny").logits(TOKENS))


def blocks(path: Path) -> list[BlockArray]:
  leaves = jax.tree.leaves(
    nnx.state(load(path).module), is_leaf=lambda leaf: isinstance(leaf, BlockArray)
  )
  return [leaf for leaf in leaves if isinstance(leaf, BlockArray)]


def test_weights_are_the_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Every matrix, of every kind, lies where the file is mapped: no byte of it was copied."""
  if not ffi.available():
    pytest.skip("without the native library no layout is the file's")
  formats = ["q4_k", "q5_k", "q6_k", "f16", "bf16", "f32", "q8_0"]
  spec = ModelSpec(
    d_model=256, d_ffn=512, heads=4, head_dim=64, tied=False,
    type=lambda name: formats[sum(name.encode()) % len(formats)],
  )  # fmt: skip
  path = qbin_of(write(tmp_path / "a.gguf", spec), tmp_path / "a.qbin")
  opened: list[QbinCheckpoint] = []
  opener = QbinCheckpoint.open
  monkeypatch.setattr(QbinCheckpoint, "open", lambda p: opened.append(opener(p)) or opened[-1])
  found = {leaf.data.unsafe_buffer_pointer(): leaf for leaf in blocks(path)}
  (checkpoint,) = opened
  first = np.frombuffer(checkpoint._mapping, np.uint8, 1).ctypes.data
  places = [p for p in checkpoint.places.values() if p.tiled]
  assert {first + place.offset for place in places} == set(found)
  for place in places:
    leaf = found[first + place.offset]
    assert (leaf.format, leaf.shape) == (place.tensor.format, place.tensor.shape)


SCRIPT = """
import json, sys, time
from pathlib import Path
import jax, numpy as np
from q4jax.loading import load

def status(field):
  return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024

def mapped(field):
  total, ours = 0, False
  for line in Path("/proc/self/smaps").read_text().splitlines():
    if "-" in line.split(" ")[0]:
      ours = line.endswith(sys.argv[1])
    elif ours and line.startswith(field + ":"):
      total += int(line.split()[1]) * 1024
  return total

jax.block_until_ready(jax.numpy.zeros(1))
load(sys.argv[2])
before = {name: status(name) for name in ("VmRSS", "RssAnon")}
Path("/proc/self/clear_refs").write_text("5")
model = load(sys.argv[1])
out = {"size": model.nbytes, "loaded": status("VmHWM") - before["VmRSS"]}
np.asarray(model.logits(np.array([3, 4, 5])))
out["anonymous"] = status("RssAnon") - before["RssAnon"]
print("ready", flush=True)
input()
out |= {name: mapped(name) for name in ("Rss", "Pss", "Private_Dirty")}
print(json.dumps(out), flush=True)
input()
"""


def test_two_processes_share_the_pages(tmp_path: Path) -> None:
  """Each has all pages resident and answers for half of them; all are clean, so may be dropped."""
  if not Path("/proc/self/smaps").exists() or not ffi.available():
    pytest.skip("needs Linux's /proc and the native library")
  big = qbin_of(write(tmp_path / "big.gguf", large(96)), tmp_path / "big.qbin")
  small = qbin_of(write(tmp_path / "small.gguf", large(4)), tmp_path / "small.qbin")
  (tmp_path / "big.gguf").unlink()
  command = [sys.executable, "-c", SCRIPT, str(big), str(small)]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  env = {**os.environ, "PYTHONPATH": os.pathsep.join((".", "kernels"))}
  children = [
    subprocess.Popen(command, cwd=Path(__file__).parents[1], env=env, text=True, **pipes)
    for _ in range(2)
  ]

  def ask(child: subprocess.Popen[str]) -> str:
    assert child.stdin and child.stdout
    child.stdin.write("\n")
    child.stdin.flush()
    return child.stdout.readline()

  try:
    for child in children:
      assert child.stdout and child.stdout.readline() == "ready\n"
    found = [json.loads(ask(child)) for child in children]
  finally:
    for child in children:
      child.kill()
      child.communicate()
    big.unlink()
  for process in found:
    assert process["size"] > 90 * MIB
    assert process["loaded"] < 16 * MIB, "loading reads no weights"
    # Programs are compiled between; the weights would be 96 MiB.
    assert process["anonymous"] < 80 * MIB, "there is no copy of the weights"
    assert process["Rss"] > 0.9 * process["size"], "answering reads them"
    assert process["Pss"] < 0.55 * process["Rss"], "the other process shares them"
    assert process["Private_Dirty"] == 0
