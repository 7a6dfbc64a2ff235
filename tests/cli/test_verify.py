"""`verify`: exit codes, and what people and machines read."""

import json
from pathlib import Path

import numpy as np

from q4jax.formats.checkpoint import Tensor
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.formats.qbin_sink import QbinSink
from qbin_files import METADATA, write_qbin

from .conftest import Run

TENSORS = [Tensor("codes", (20, 32), "q8_0"), Tensor("more", (20, 32), "q8_0")]


def sound(path: Path) -> None:
  """Random bytes are not always finite; int8 codes with scales of 1 are."""
  rows = write_qbin(path, TENSORS)
  with QbinCheckpoint.open(path) as old, QbinSink(path, old.config, METADATA, TENSORS) as sink:
    for tensor in TENSORS:
      rows[tensor.name][:, :2] = np.frombuffer(b"\x00\x3c", np.uint8)
      sink.write(tensor, rows[tensor.name])


def test_sound(q4jax: Run, tmp_path: Path) -> None:
  sound(tmp_path / "a.qbin")
  result = q4jax("verify", tmp_path / "a.qbin")
  assert result.code == 0 and result.err == ""
  assert result.out.startswith("ok: 1 file(s), 2 tensors, 2 checksums, 0 records")
  about = json.loads(q4jax("verify", tmp_path / "a.qbin", "--json").out)
  assert about["ok"] and about["failures"] == [] and about["tensors"] == 2


def test_damaged(q4jax: Run, tmp_path: Path) -> None:
  path = tmp_path / "a.qbin"
  sound(path)
  content = bytearray(path.read_bytes())
  content[-1] ^= 1  # of the last tensor
  path.write_bytes(content)
  result = q4jax("verify", path)
  assert result.code == 1
  assert "a.qbin: more: its bytes do not have the checksum" in result.out
  assert "1 failure(s), first in 'more'" in result.err
  result = q4jax("verify", path, "--json")
  about = json.loads(result.out)
  assert result.code == 1 and not about["ok"]
  assert [failure["tensor"] for failure in about["failures"]] == ["more"]


def test_no_model(q4jax: Run, tmp_path: Path) -> None:
  (tmp_path / "a.json").write_text("[]")
  result = q4jax("verify", tmp_path / "a.json")
  assert result.code == 1 and "records.schema.json" in result.out
  assert q4jax("verify", tmp_path / "none.gguf").code == 1
