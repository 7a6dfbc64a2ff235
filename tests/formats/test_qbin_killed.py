"""A process killed at any moment while it writes leaves the old file, the new file, or none."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from q4jax.config import from_gguf
from q4jax.formats.checkpoint import Tensor
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.formats.qbin_sink import QbinSink
from qbin_files import METADATA, random_bytes, write_qbin

TENSORS = [Tensor(f"t{i}", (160, 512), "q4_k") for i in range(6)]
KILLS = 40


def write_generation(path: Path, generation: int) -> None:
  metadata = METADATA | {"generation": generation}
  config = from_gguf(metadata, frozenset(t.name for t in TENSORS), "")
  with QbinSink(path, config, metadata, TENSORS) as sink:
    for tensor in TENSORS:
      sink.write(tensor, random_bytes(tensor, generation))


def generation_of(path: Path) -> int:
  """Which generation a file is (0: `write_qbin`'s), once every tensor is known to be of it."""
  with QbinCheckpoint.open(path) as checkpoint:
    generation = checkpoint.metadata.get("generation", 0)
    for tensor in TENSORS:
      assert checkpoint.is_intact(tensor.name)
      assert np.array_equal(checkpoint.rows(tensor.name), random_bytes(tensor, generation))
  return generation


def kill_writers(path: Path, exists: bool) -> None:
  """Kills processes that write generation after generation to `path`, and looks what is there."""
  rng, last, partly = random.Random(exists), [], 0
  for _ in range(KILLS):
    path.unlink(missing_ok=True)
    if exists:
      write_qbin(path, TENSORS)
    child = os.fork()
    if child == 0:
      for generation in range(1, 1000):
        write_generation(path, generation)
      os._exit(0)
    time.sleep(rng.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    partly += any(name.endswith(".tmp") for name in os.listdir(path.parent))
    last.append(generation_of(path) if path.exists() else None)
  print(f"{partly} kills left a part, {len(set(last))} generations were seen")
  assert partly > KILLS // 4 and len(set(last)) > 1
  assert not exists or None not in last
  write_generation(path, 1)
  assert os.listdir(path.parent) == [path.name], "the next writer removes what the killed ones left"


@pytest.mark.parametrize("exists", [False, True])
def test_killed_while_writing(exists: bool, tmp_path: Path) -> None:
  # In a process of its own, which has no threads that a fork would leave behind.
  script = "import sys, pathlib; from formats.test_qbin_killed import kill_writers as kill\n"
  subprocess.run(
    [
      sys.executable,
      "-c",
      f"{script}kill(pathlib.Path(sys.argv[1]), {exists})",
      tmp_path / "a.qbin",
    ],
    cwd=Path(__file__).parents[2],
    env={**os.environ, "PYTHONPATH": os.pathsep.join((".", "kernels", "tests"))},
    check=True,
  )
