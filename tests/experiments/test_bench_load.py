"""bench_load runs, as its docstring says, on the model that comes with q4jax."""

import json
from pathlib import Path

import pytest

from experiments.bench_load import Config, run, table
from q4jax.formats.hub import resolve
from q4jax_kernels import ffi


def test_a_qbin_is_loaded_without_a_copy(tmp_path: Path) -> None:
  if not Path("/proc/self/clear_refs").exists() or not ffi.available():
    pytest.skip("needs Linux's /proc and the native library")
  config = Config(model=str(resolve("tiny")), qbin=str(tmp_path / "tiny.qbin"), reps=1)
  records = run(config)
  assert [record["side"] for record in records] == ["q4jax gguf", "q4jax qbin"]
  assert all(record["load_s"] > 0 and record["file"] > 2e6 for record in records)
  json.dumps(records)
  assert len(table(records).splitlines()) == 4
