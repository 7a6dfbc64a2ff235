"""`verify` finds each single fault, names its tensor, and finds nothing in a sound file."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_model import ModelSpec, write
from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Tensor
from q4jax.formats.hub import resolve
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.formats.qbin_sink import QbinSink
from q4jax.offline.verify import _not_finite, factors, verify
from q4jax.records import dumps
from q4jax_kernels.block_array import FIELDS, BlockArray, block_shape, dequantize_blocks
from qbin_files import METADATA, write_qbin


@pytest.mark.parametrize("format", FIELDS)
def test_factors_are_what_makes_weights_infinite(format: str) -> None:
  """Brute force: an infinity put where a factor is makes a weight infinite or NaN, and nowhere
  else does any byte.
  """
  _, nbytes = block_shape(format)
  kinds = {"f16": ("<u2", 0x7C00), "bf16": ("<u2", 0x7F80), "f32": ("<u4", 0x7F800000)}
  runs = factors(format)
  inside = np.zeros(nbytes, bool)
  for start, stop, kind in runs:
    inside[start:stop] = True
    dtype, infinity = kinds[kind]
    for at in range(start, stop, np.dtype(dtype).itemsize):
      block = np.full(nbytes, 1, np.uint8)
      block[at : at + np.dtype(dtype).itemsize] = np.array([infinity], dtype).view(np.uint8)
      with np.errstate(invalid="ignore"):
        assert not np.isfinite(dequantize_blocks(block, format)).all(), at
  block = np.where(inside, 0, 255).astype(np.uint8)
  assert np.isfinite(dequantize_blocks(block, format)).all()


@pytest.mark.parametrize("layout", ["rows", "x16"])
def test_every_factor_of_every_format(layout: str, tmp_path: Path) -> None:
  """One factor of one block is infinite in each tensor in turn; zeros are sound."""
  path = tmp_path / "a.qbin"
  tensors = [Tensor(format, (19, 256), format) for format in FIELDS]
  write_qbin(path, tensors)
  with QbinCheckpoint.open(path) as old:
    config = old.config
  rows = {t.name: np.zeros((19, t.row_bytes), np.uint8) for t in tensors}

  def bad() -> list[str | None]:
    with QbinSink(path, config, METADATA, tensors, layout=layout) as sink:
      for tensor in tensors:
        sink.write(tensor, rows[tensor.name])
    return [failure.tensor for failure in verify(path).failures]

  assert bad() == []
  for format in FIELDS:
    start, _, kind = factors(format)[-1]
    infinity = {"f16": b"\x00\x7c", "bf16": b"\x80\xff", "f32": b"\x00\x00\x80\x7f"}[kind]
    at = rows[format].shape[1] - block_shape(format)[1] + start
    rows[format][17, at : at + len(infinity)] = np.frombuffer(infinity, np.uint8)
  assert bad() == list(FIELDS)


def test_tiles_and_rows_count_the_same() -> None:
  rng = np.random.default_rng(0)
  for format in FIELDS:
    tensor = Tensor("m", (16, 512), format)
    # Bytes that make exponents full more often than any byte would.
    rows = rng.choice(np.array([0, 0x7C, 0x7F, 0x80, 0xFF], np.uint8), (16, tensor.row_bytes))
    tiles = np.asarray(BlockArray(rows, format, 16).tiles().data)  # type: ignore[arg-type]
    assert _not_finite(rows, tensor, False) == _not_finite(tiles, tensor, True) > 0


def test_a_gguf_with_nan(tmp_path: Path) -> None:
  path = write(tmp_path / "a.gguf", ModelSpec(type="q8_0", d_ffn=128))
  assert verify(path).failures == []
  tensor = next(t for t in gguf.GGUFReader(str(path)).tensors if t.name == "blk.1.ffn_up.weight")
  with path.open("r+b") as file:
    file.seek(int(tensor.data_offset) + 34 * 7)
    file.write(b"\x01\x7e")
  (failure,) = verify(path).failures
  assert failure.tensor == "blk.1.ffn_up.weight" and "1 scales" in failure.problem


def test_the_model_that_comes_along_is_sound() -> None:
  report = verify(resolve("tiny"))
  assert report.files == 1 and report.tensors > 10 and not report.failures


def test_a_folder(tmp_path: Path) -> None:
  with pytest.raises(ConfigError, match="holds no"):
    verify(tmp_path)
  write_qbin(tmp_path / "b.qbin", [])
  (tmp_path / "a.json").write_text(dumps([], {}))
  (tmp_path / "other.json").write_text("{}")
  report = verify(tmp_path)
  assert report.files == 2 and not report.failures
  (tmp_path / "c.qbin").write_bytes(b"short")
  document = json.loads(dumps([], {})) | {"version": 2}
  (tmp_path / "d.json").write_text(json.dumps(document))
  assert [Path(f.path).name for f in verify(tmp_path).failures] == ["c.qbin", "d.json"]
