"""What a .qbin gives back is what was put in: rows, keys, records, fields that we do not know."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import random_blocks
from gguf_model import ModelSpec, write
from q4jax.errors import ConfigError, FormatError
from q4jax.formats import qbin_header
from q4jax.formats import qbin_pb2 as pb
from q4jax.formats.checkpoint import Tensor, floats
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.formats.qbin_sink import QbinSink, set_records
from q4jax.records import RANGES, Record
from q4jax_kernels import ffi
from q4jax_kernels.block_array import FIELDS, BlockArray
from qbin_files import METADATA, convert, random_bytes, write_qbin

RECORDS = [
  Record(
    "blk.0.attn_q.weight", "weight", "uint4", -1, 32, "mse",
    np.array([[0.1, 2e-30], [3.0, 1e-9]], np.float32), np.array([[0, 15], [7, 8]], np.int32),
    statistics={"mse": 0.1, "max": [1.5, -2.0], "tokens": 4096},
  ),
  Record(
    "blk.0", "key", "int8", None, 0, "minmax", np.array([0.5], np.float32), np.array([0], np.int32),
    minimum=np.array([-3.25], np.float32),
  ),
]  # fmt: skip


def assert_equal(a: Record, b: Record) -> None:
  assert a.to_json() == b.to_json() and a.scale.shape == b.scale.shape


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("layout", ["rows", "x16"])
def test_rows_of_every_format(
  layout: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  if not native:
    monkeypatch.setattr(ffi, "library", lambda: None)
  shapes = [(16, 256), (37, 512), (1, 256)]
  tensors = [Tensor(f"{f}.{n}x{k}", (n, k), f) for f in FIELDS for n, k in shapes]
  tensors += [Tensor(f"{f}.vector", (48,), f) for f in ("f32", "f16", "bf16")]
  rows = write_qbin(tmp_path / "a.qbin", tensors, layout)
  with QbinCheckpoint.open(tmp_path / "a.qbin") as checkpoint:
    assert list(checkpoint.tensors.values()) == tensors
    for tensor in tensors:
      name = tensor.name
      assert np.array_equal(checkpoint.rows(name), rows[name]), name
      assert checkpoint.is_intact(name)
      stored = checkpoint.stored(name)
      assert not stored.flags.writeable and stored.ctypes.data % 4096 == 0
      if layout == "x16" and len(tensor.shape) == 2:
        blocks = BlockArray(jnp.asarray(rows[name]), tensor.format, tensor.num_rows)
        assert np.array_equal(stored, blocks.tiles().data)
      else:
        assert np.array_equal(stored, rows[name])


@pytest.mark.parametrize("layout", ["rows", "x16"])
def test_any_range_of_rows(layout: str, tmp_path: Path) -> None:
  tensor = Tensor("m", (53, 64), "q8_0")
  rows = write_qbin(tmp_path / "a.qbin", [tensor], layout)["m"]
  with QbinCheckpoint.open(tmp_path / "a.qbin") as checkpoint:
    for start, stop in [(0, 0), (0, 1), (15, 17), (16, 32), (31, 53), (53, 53), (7, 50)]:
      found = checkpoint.rows("m", start, stop)
      assert np.array_equal(found, rows[start:stop]) and not found.flags.writeable
    with pytest.raises(ValueError, match="50..54"):
      checkpoint.rows("m", 50, 54)


def test_chunks_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """What is written in many pieces is what is written in one."""
  tensor = Tensor("m", (100, 256), "q4_k")
  write_qbin(tmp_path / "a.qbin", [tensor])
  monkeypatch.setattr("q4jax.formats.qbin_sink._CHUNK_BYTES", 5000)
  write_qbin(tmp_path / "b.qbin", [tensor])
  assert (tmp_path / "a.qbin").read_bytes() == (tmp_path / "b.qbin").read_bytes()


def test_order_of_writing_does_not_matter(tmp_path: Path) -> None:
  tensors = [Tensor(f"t{i}", (20, 32), "q4_0") for i in range(4)]
  write_qbin(tmp_path / "a.qbin", tensors)
  with (
    QbinCheckpoint.open(tmp_path / "a.qbin") as a,
    QbinSink(tmp_path / "b.qbin", a.config, METADATA, tensors) as sink,
  ):
    for tensor in reversed(tensors):
      sink.write(tensor, a.rows(tensor.name))
  assert (tmp_path / "a.qbin").read_bytes() == (tmp_path / "b.qbin").read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", ["rows", "x16"])
def test_gguf_models(architecture: str, layout: str, tmp_path: Path) -> None:
  """Rows are those of memory: llama's Q and K are not in the file's order, their values agree."""
  formats = ["q4_k", "q6_k", "f16", "bf16", "f32", "q8_0"]
  spec = ModelSpec(
    architecture, d_model=256, d_ffn=512, heads=4, head_dim=64, bias=True, tied=False,
    type=lambda name: formats[sum(name.encode()) % len(formats)],
    keys={"a.bool": True, "a.text": "\u00e9\U0001f600", "a.list": [1.5, 2.5], "a.negative": -5},
  )  # fmt: skip
  path = write(tmp_path / "a.gguf", spec)
  with GGUFCheckpoint.open(path) as source:
    convert(source, tmp_path / "a.qbin", layout)
    with QbinCheckpoint.open(tmp_path / "a.qbin") as found:
      assert found.config == source.config
      assert list(found.tensors.values()) == list(source.tensors.values())
      for name in source.tensors:
        assert np.array_equal(found.rows(name), source.rows(name)), name
        assert np.array_equal(floats(found, name), floats(source, name), equal_nan=True)
      assert list(found.metadata) == list(source.metadata)
      for key, value in source.metadata.items():
        assert type(found.metadata[key]) is type(value) and np.array_equal(
          found.metadata[key], value
        )
      q = found.rows("blk.0.attn_q.weight")
  as_written = {t.name: t.data for t in gguf.GGUFReader(str(path)).tensors}["blk.0.attn_q.weight"]
  assert np.array_equal(q, as_written.view(np.uint8).reshape(q.shape)) == (architecture == "qwen2")


VALUES: dict[str, Any] = {
  "u8": np.uint8(200), "i8": np.int8(-5), "u16": np.uint16(60000), "i16": np.int16(-30000),
  "u32": 2**32 - 1, "i32": -(2**31), "f32": 0.5, "boolean": False, "text": "", "u64": 2**64 - 1,
  "i64": -(2**63), "f64": 0.1,
}  # fmt: skip


def test_values_of_every_type(tmp_path: Path) -> None:
  arrays = {
    f"array.{dtype}": np.array([0, 1, 1], dtype)
    for dtype in ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8")
  }
  lists = {"strings": ["a", "", "\u00e9"], "none": [], "empty": np.zeros(0, np.float32)}
  metadata = METADATA | VALUES | arrays | lists
  write_qbin(tmp_path / "a.qbin", [], metadata=metadata)
  with QbinCheckpoint.open(tmp_path / "a.qbin") as checkpoint:
    entries = {entry.key: entry.value for entry in checkpoint.head.header.metadata}
    for field, value in VALUES.items():
      assert entries[field].WhichOneof("kind") == field
      assert checkpoint.metadata[field] == value
    for key, array in arrays.items():
      assert checkpoint.metadata[key].dtype == array.dtype
      assert np.array_equal(checkpoint.metadata[key], array)
    assert checkpoint.metadata["strings"] == lists["strings"]
    assert checkpoint.metadata["empty"].dtype == np.float32


@pytest.mark.parametrize(
  "value", [None, {"a": 1}, 2**64, -(2**63) - 1, [[1, 2]], ["a", 1], 1j, np.complex64(1), "\ud800"]
)
def test_values_that_gguf_has_not(value: Any, tmp_path: Path) -> None:
  with pytest.raises(ConfigError, match="a.key"):
    write_qbin(tmp_path / "a.qbin", [], metadata=METADATA | {"a.key": value})
  assert not list(tmp_path.iterdir())


def test_records_travel(tmp_path: Path) -> None:
  path = tmp_path / "a.qbin"
  write_qbin(path, [Tensor("m", (5, 32), "q4_0")], records=RECORDS)
  with QbinCheckpoint.open(path) as checkpoint:
    for found, expected in zip(checkpoint.records(), RECORDS, strict=True):
      assert_equal(found, expected)


def test_every_dtype_of_records_has_a_number() -> None:
  assert {name.lower() for name, _ in pb.QType.items()} == {"unspecified", *RANGES}
  assert pb.QType.Value("INT4") == 1 and pb.QType.Value("INT8") == 2


def test_records_are_held_to_the_rules_of_json(tmp_path: Path) -> None:
  path = tmp_path / "a.qbin"
  write_qbin(path, [], records=RECORDS)

  def broken(change: str, value: Any) -> str:
    head = qbin_header.parse(path.read_bytes(), "a")
    record = head.header.records[0]
    if change in ("scale", "zero_point"):
      getattr(record, change)[0] = value
    else:
      setattr(record, change, value)
    (tmp_path / "b.qbin").write_bytes(qbin_header.pack(head.header))
    checkpoint = QbinCheckpoint.open(tmp_path / "b.qbin")
    with checkpoint, pytest.raises(FormatError) as error:
      checkpoint.records()
    return str(error.value)

  assert "blk.0.attn_q.weight" in broken("scale", float("nan"))
  assert "outside uint4" in broken("zero_point", 16)
  assert "dtype 99" in broken("dtype", 99)
  assert "group_size" in broken("group_size", 0)
  assert "target" in broken("target", "nothing")


def unknown_field(number: int, data: bytes) -> bytes:
  """A length-delimited field, by hand."""
  tag = number << 3 | 2
  return bytes([tag & 127 | 128, tag >> 7, len(data)]) + data


def test_unknown_fields_survive(tmp_path: Path) -> None:
  """A file of a newer minor version is loaded, and changed without loss of what we do not know."""
  path = tmp_path / "a.qbin"
  tensor = Tensor("m", (20, 32), "q4_0")
  rows = write_qbin(path, [tensor])
  head = qbin_header.parse(path.read_bytes(), "a")
  header = head.header
  header.MergeFromString(unknown_field(100, b"of the header"))
  header.tensors[0].MergeFromString(unknown_field(101, b"of a tensor"))
  header.metadata[0].MergeFromString(unknown_field(102, b"of an entry"))
  data = path.read_bytes()[head.data :]
  path.write_bytes(qbin_header.pack(header, minor=7) + data)
  set_records(path, RECORDS)
  set_records(path, RECORDS[:1])
  with QbinCheckpoint.open(path) as checkpoint:
    assert np.array_equal(checkpoint.rows("m"), rows["m"]) and checkpoint.is_intact("m")
    assert checkpoint.head.minor == 7
    assert_equal(*checkpoint.records(), RECORDS[0])
  content = path.read_bytes()
  for text in (b"of the header", b"of a tensor", b"of an entry"):
    assert content.count(text) == 1


def test_newer_major_versions_are_refused_by_name(tmp_path: Path) -> None:
  path = tmp_path / "a.qbin"
  write_qbin(path, [])
  content = bytearray(path.read_bytes())
  content[8:12] = struct.pack("<HH", 2, 3)
  path.write_bytes(content)
  with pytest.raises(FormatError, match=r"version 2\.3, and this q4jax reads versions 1\.x"):
    QbinCheckpoint.open(path)


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
  tensors = [Tensor("a", (20, 32), "q4_0"), Tensor("b", (20, 32), "q4_0")]
  path = tmp_path / "a.qbin"
  before = write_qbin(path, tensors[:1])
  with QbinCheckpoint.open(path) as old:
    config = old.config
  sink = QbinSink(path, config, METADATA, tensors)
  with pytest.raises(ConfigError, match="1 tensor.s. were not written, first 'b'"), sink:
    sink.write(tensors[0], random_bytes(tensors[0], 1))
  sink = QbinSink(path, config, METADATA, tensors)
  with pytest.raises(KeyError), sink:
    raise KeyError
  sink = QbinSink(path, config, METADATA, tensors)
  with pytest.raises(ConfigError, match="opened for None"), sink:
    sink.write(Tensor("c", (20, 32), "q4_0"), random_bytes(tensors[0]))
  with pytest.raises(ConfigError, match="another model"):
    QbinSink(path, config, METADATA | {"llama.context_length": 65}, tensors)
  with pytest.raises(ConfigError, match="layout 'x8'"):
    QbinSink(path, config, METADATA, tensors, layout="x8")
  assert os.listdir(tmp_path) == ["a.qbin"]
  with QbinCheckpoint.open(path) as checkpoint:
    assert np.array_equal(checkpoint.rows("a"), before["a"])


def test_a_flipped_bit_of_a_tensor_shows(tmp_path: Path) -> None:
  path = tmp_path / "a.qbin"
  write_qbin(path, [Tensor("a", (20, 32), "q4_0"), Tensor("b", (20, 32), "q4_0")])
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with QbinCheckpoint.open(path) as checkpoint:
    assert checkpoint.is_intact("a") and checkpoint.is_intact("b") is False


def test_checksums_are_zlibs(tmp_path: Path) -> None:
  write_qbin(tmp_path / "a.qbin", [Tensor("a", (20, 32), "q4_0")], "rows")
  with QbinCheckpoint.open(tmp_path / "a.qbin") as checkpoint:
    place = checkpoint.places["a"]
  content = (tmp_path / "a.qbin").read_bytes()
  assert place.checksum == zlib.crc32(content[place.offset : place.offset + 20 * 18])
  # CRC-32's own check value, from its catalogue.
  assert zlib.crc32(b"123456789") == 0xCBF43926


def test_random_rows_of_formats_are_their_values(tmp_path: Path) -> None:
  """Read by gguf-py, not by our own code."""
  tensors = [Tensor(f, (19, 256), f) for f in random_blocks.FORMATS]
  path = tmp_path / "a.qbin"
  write_qbin(path, tensors)
  rng = np.random.default_rng(0)
  rows = {t.name: random_blocks.random_rows(rng, t.format, 19, 256) for t in tensors}
  with QbinCheckpoint.open(path) as old, QbinSink(path, old.config, METADATA, tensors) as sink:
    for tensor in tensors:
      sink.write(tensor, rows[tensor.name])
  with QbinCheckpoint.open(path) as checkpoint:
    for name in rows:
      expected = random_blocks.dequantize(rows[name], name)
      assert np.array_equal(floats(checkpoint, name), expected)
