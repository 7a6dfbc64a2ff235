"""A process killed at any moment while it writes leaves the old file, the new file, or none."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from q4jax.formats.checkpoint import Tensor
from q4jax.formats.qbin import QbinCheckpoint
from qbin_files import random_bytes, write_qbin

TENSORS = [Tensor(f"t{i}", (160, 512), "q4_k") for i in range(6)]
# Writes generation after generation over the same file; says when the first has begun.
SCRIPT = """
import sys
from pathlib import Path
from formats.test_qbin_killed import TENSORS, write_generation
print("ready", flush=True)
for generation in range(1, 1000):
  write_generation(Path(sys.argv[1]), generation)
"""


def write_generation(path: Path, generation: int) -> None:
  from q4jax.config import from_gguf
  from q4jax.formats.qbin_sink import QbinSink
  from qbin_files import METADATA

  metadata = METADATA | {"generation": generation}
  config = from_gguf(metadata, frozenset(t.name for t in TENSORS), "")
  with QbinSink(path, config, metadata, TENSORS) as sink:
    for tensor in TENSORS:
      sink.write(tensor, random_bytes(tensor, generation))


@pytest.mark.parametrize("exists", [False, True])
def test_killed_while_writing(exists: bool, tmp_path: Path) -> None:
  path, rng = tmp_path / "a.qbin", random.Random(exists)
  found = []
  for _ in range(6):
    path.unlink(missing_ok=True)
    if exists:
      write_qbin(path, TENSORS)
    child = subprocess.Popen(
      [sys.executable, "-c", SCRIPT, str(path)],
      cwd=Path(__file__).parents[2],
      env={**os.environ, "PYTHONPATH": os.pathsep.join((".", "kernels", "tests"))},
      stdout=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    time.sleep(rng.uniform(0, 0.12))
    child.kill()
    child.wait()
    child.stdout.close()
    if path.exists():
      found.append(assert_whole(path))
  assert len(found) == 6 if exists else True
  # The next writer removes what the killed ones left.
  write_generation(path, 1)
  assert os.listdir(tmp_path) == ["a.qbin"]


def assert_whole(path: Path) -> int:
  """Every tensor is there, of one generation, which is returned (0: the file from before)."""
  with QbinCheckpoint.open(path) as checkpoint:
    generation = checkpoint.metadata.get("generation", 0)
    for tensor in TENSORS:
      assert checkpoint.is_intact(tensor.name)
      assert np.array_equal(checkpoint.rows(tensor.name), random_bytes(tensor, generation))
  return generation
