"""The reader against gguf-py: on real files, on files with every type, and on split ones."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from formats.malformed_gguf import shard_name, shards_of, split_files
from formats.raw_gguf import I32, STRING, U16, U32, Gguf, Tensor, Value, array, good, scalar, text
from q4jax.errors import FormatError
from q4jax.formats import gguf_header
from q4jax.formats.gguf import GGUFFile
from q4jax_kernels.block_formats import FORMATS
from shared_data import shared

SHARED = [
  *(f"models/stories260K-{kind}.gguf" for kind in ("f32", "Q8_0")),
  *(f"models/babyllama361-{kind}.gguf" for kind in ("f32", "Q8_0", "Q5_0", "Q4_1", "Q4_0")),
  *(f"tokenizers/ggml-vocab-{name}.gguf" for name in ("gpt-2", "llama-spm")),
]


def assert_same_as_gguf_py(path: Path) -> None:
  """Every key, tensor and byte is what gguf-py reads."""
  reader = gguf.GGUFReader(path)
  with GGUFFile.open(path) as file:
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for key, field in fields.items():
      found, expected = file.metadata[key], field.contents()
      if isinstance(found, np.ndarray):
        assert found.dtype == gguf.GGUFReader.gguf_scalar_to_np[field.types[-1]]
        found = found.tolist()
      elif expected is None or expected == []:  # gguf-py's word for an empty array
        assert found == []
        continue
      assert type(found) is type(expected)
      assert found == expected, key
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
      info = file.tensors[tensor.name]
      assert info.shape == tuple(reversed(tensor.shape.tolist()))
      assert info.format == tensor.tensor_type.name.lower()
      assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
      assert info.path == path
      rows = file.read_rows(info, 0, info.num_rows)
      assert rows.shape == (info.num_rows, info.row_bytes)
      np.testing.assert_array_equal(rows.ravel(), tensor.data.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("name", SHARED)
def test_real_files(name: str) -> None:
  assert_same_as_gguf_py(shared(name))


def test_good_is_good(tmp_path: Path) -> None:
  """The file that all malformed ones are made from."""
  (tmp_path / "good.gguf").write_bytes(good().encode())
  assert_same_as_gguf_py(tmp_path / "good.gguf")


def random_tensor(rng: np.random.Generator, name: str, *rows: int) -> np.ndarray:
  """Random bytes of a row of 512 values, as many rows as given."""
  sizes = {"f32": 2048, "f16": 1024, "bf16": 1024}
  form = FORMATS.get(name)
  row_bytes = sizes[name] if form is None else 512 // form.block_size * form.block_bytes
  return rng.integers(0, 256, (*rows, row_bytes), dtype=np.uint8)


def write_all_types(
  path: Path, max_tensors: int = 0, small_first: bool = False
) -> dict[str, np.ndarray]:
  """A file, or a split one, with every value type and tensor format; the tensors' bytes."""
  rng = np.random.default_rng(0)
  writer = gguf.GGUFWriter(
    path, "llama", split_max_tensors=max_tensors, small_first_shard=small_first
  )
  for kind in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"):
    limits = np.iinfo(kind)
    for name, value in {"min": limits.min, "max": limits.max}.items():
      getattr(writer, f"add_{kind}")(f"test.{kind}.{name}", value)
    value_type = gguf.GGUFValueType[kind.upper()]
    values = [int(limits.min), 1, int(limits.max)]
    writer.add_key_value(f"test.{kind}.array", values, gguf.GGUFValueType.ARRAY, value_type)
  for kind in ("float32", "float64"):
    getattr(writer, f"add_{kind}")(f"test.{kind}", 0.1)
    value_type = gguf.GGUFValueType[kind.upper()]
    floats = [0.1, -0.0, float("inf")]
    writer.add_key_value(f"test.{kind}.array", floats, gguf.GGUFValueType.ARRAY, value_type)
  for flag in (True, False):
    writer.add_bool(f"test.{flag}", flag)
  bools = [True, False, True]
  writer.add_key_value("test.bools", bools, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL)
  writer.add_string("test.string", "Grüße, 世界 🦙\0end")
  writer.add_string("test.no string", "")
  writer.add_array("test.strings", ["", "a", "é", "🦙" * 100])
  tensors = {}
  for name in ("f32", "f16", "bf16", *FORMATS):
    for rows in ((), (3,), (2, 3), (2, 1, 3)):
      tensors[f"{name}.{len(rows) + 1}"] = random_tensor(rng, name, *rows)
  for name, data in tensors.items():
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[name.split(".")[0].upper()])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return tensors


def test_every_type(tmp_path: Path) -> None:
  path = tmp_path / "all.gguf"
  tensors = write_all_types(path)
  assert_same_as_gguf_py(path)
  with GGUFFile.open(str(path)) as file:
    assert file.version == 3
    assert file.metadata["test.uint64.max"] == 2**64 - 1
    assert file.metadata["test.True"] is True
    assert {info.format for info in file.tensors.values()} == {"f32", "f16", "bf16", *FORMATS}
    info = file.tensors["q4_k.4"]
    assert info.shape == (2, 1, 3, 512)
    assert (info.num_rows, info.row_bytes) == (6, 288)
    for name, data in tensors.items():
      info = file.tensors[name]
      np.testing.assert_array_equal(
        file.read_rows(info, 0, info.num_rows), data.reshape(-1, data.shape[-1])
      )


@pytest.mark.parametrize("small_first", [False, True])
def test_split_by_gguf_py(tmp_path: Path, small_first: bool) -> None:
  """Any shard opens all; a first shard may have no tensors."""
  tensors = write_all_types(tmp_path / "all.gguf", max_tensors=25, small_first=small_first)
  paths = sorted(tmp_path.iterdir())
  assert len(paths) == 3 + small_first
  for path in paths:
    with GGUFFile.open(path) as file:
      assert list(file.tensors) == list(tensors)
      assert file.metadata["general.architecture"] == "llama"
      assert file.metadata["split.count"] == len(paths)
      assert {info.path for info in file.tensors.values()} == set(paths[small_first:])
      for name, data in tensors.items():
        info = file.tensors[name]
        rows = file.read_rows(info, 0, info.num_rows)
        np.testing.assert_array_equal(rows, data.reshape(-1, data.shape[-1]))


def write(path: Path, file: Gguf) -> Path:
  path.write_bytes(file.encode())
  return path


def test_split_may_differ_in_alignment(tmp_path: Path) -> None:
  first, second = shards_of(good())
  aligned = Gguf(second.keys, second.tensors, alignment=64)
  second = aligned.with_key("general.alignment", scalar(U32, 64))
  for name, data in split_files([first, second]).items():
    (tmp_path / name).write_bytes(data)
  with GGUFFile.open(tmp_path / shard_name(1)) as file:
    assert list(file.tensors) == [tensor.name for tensor in good().tensors]
    for tensor in good().tensors:
      info = file.tensors[str(tensor.name)]
      assert file.read_rows(info, 0, info.num_rows).tobytes() == tensor.data


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", ["merged.gguf", "model-00001-of-00001.gguf"])
def test_one_file_that_speaks_of_splits(tmp_path: Path, count: int, name: str) -> None:
  file = good().with_key("split.no", scalar(U16, 0)).with_key("split.count", scalar(U16, count))
  path = write(tmp_path / name, file.with_key("split.tensors.count", scalar(I32, 11)))
  GGUFFile.open(path).close()


def test_version_2_alignment_and_gaps(tmp_path: Path) -> None:
  base = good()
  moved = base.with_tensor(10, offset=1 << 16)
  for alignment in (8, 32, 64, 4096):
    file = Gguf(moved.keys, moved.tensors, version=2, alignment=alignment)
    path = write(tmp_path / "x.gguf", file.with_key("general.alignment", scalar(U32, alignment)))
    with path.open("ab") as out:
      out.write(bytes(1 << 16) + base.tensors[10].data)
    assert_same_as_gguf_py(path)
    with GGUFFile.open(path) as opened:
      assert opened.version == 2


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    (text("end"), "end"),
    (text(""), ""),
    (array(STRING, ["a", "end"]), ["a", "end"]),
    (array(STRING, ["a", ""]), ["a", ""]),
    (array(STRING, []), []),
    (array(U16, [1, 2]), [1, 2]),
  ],
)
def test_nothing_follows_the_last_value(tmp_path: Path, value: Value, expected: object) -> None:
  """Vocabulary files have no data section, nor the padding before one."""
  parts = Gguf((("key", value),), ()).parts()
  path = tmp_path / "x.gguf"
  path.write_bytes(b"".join(part for label, part in parts if label != "padding"))
  with GGUFFile.open(path) as file:
    found = file.metadata["key"]
    assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected


def test_an_empty_model(tmp_path: Path) -> None:
  path = tmp_path / "x.gguf"
  path.write_bytes(Gguf((), ()).encode()[:24])
  with GGUFFile.open(path) as file:
    assert file.metadata == file.tensors == {}


def test_the_longest_names(tmp_path: Path) -> None:
  key, name = "k" * 65535, "é" * 31 + "n"
  tensor = Tensor(name, (1,), 0, bytes(4))
  with GGUFFile.open(write(tmp_path / "x.gguf", Gguf(((key, text("")),), (tensor,)))) as file:
    assert list(file.metadata) == [key]
    assert list(file.tensors) == [name]


def test_rows_are_views(tmp_path: Path) -> None:
  path = write(tmp_path / "x.gguf", good())
  with GGUFFile.open(path) as file:
    info = file.tensors["blk.0.attn_q.weight"]
    every = file.read_rows(info, 0, 32)
    some = file.read_rows(info, 5, 9)
    np.testing.assert_array_equal(some, every[5:9])
    assert some.ctypes.data == every[5:].ctypes.data  # The same memory, not a copy.
    assert not every.flags.writeable
    assert file.read_rows(info, 32, 32).shape == (0, 18)
    for start, stop in ((-1, 1), (0, 33), (5, 4), (33, 33)):
      with pytest.raises(ValueError, match="not within the 32"):
        file.read_rows(info, start, stop)
    with (
      GGUFFile.open(write(tmp_path / "y.gguf", good())) as other,
      pytest.raises(ValueError, match=r"x\.gguf"),
    ):
      other.read_rows(info, 0, 1)
  assert every.tobytes() == good().tensors[2].data  # Views outlive the file.
  with pytest.raises(ValueError, match="closed"):
    file.read_rows(info, 0, 1)
  file.close()  # Twice is no error.


def open_descriptors() -> int:
  return len(os.listdir("/proc/self/fd"))


def test_closing_frees_descriptors(tmp_path: Path) -> None:
  before = open_descriptors()
  files = split_files(shards_of(good()))
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  with GGUFFile.open(tmp_path / shard_name(0)):
    assert open_descriptors() == before + 2
  assert open_descriptors() == before
  (tmp_path / shard_name(1)).write_bytes(files[shard_name(1)][:-1])
  with pytest.raises(FormatError):
    GGUFFile.open(tmp_path / shard_name(0))
  assert open_descriptors() == before  # Those opened before the bad shard, too.


def resident_bytes(path: Path) -> int:
  """How much of a mapped file counts as this process' memory."""
  mapping = Path("/proc/self/smaps").read_text().split(str(path))[1]
  return int(mapping.split("Rss:")[1].split()[0]) * 1024


def test_release_gives_pages_back(tmp_path: Path) -> None:
  half = 8 << 20
  data = np.random.default_rng(0).integers(0, 256, 2 * half, dtype=np.uint8)
  tensors = [Tensor("a", (half // 4,), 0, data[:half].tobytes())]
  tensors += [Tensor("b", (half // 4,), 0, data[half:].tobytes())]
  path = write(tmp_path / "x.gguf", Gguf((), tuple(tensors)))
  with GGUFFile.open(path) as file:
    a, b = (file.read_rows(info, 0, 1) for info in file.tensors.values())
    total = int(a.sum()) + int(b.sum())
    assert resident_bytes(path) >= 2 * half
    file.release(file.tensors["a"])
    # A huge page (2 MiB) that both share goes whole.
    assert half - (2 << 20) <= resident_bytes(path) <= 1.05 * half
    file.release(file.tensors["b"])
    assert resident_bytes(path) < 0.1 * half
    assert int(a.sum()) + int(b.sum()) == total  # Read again from the file.


def test_beyond_4_gib(tmp_path: Path) -> None:
  """A sparse file: offsets and sizes of more than 32 bits."""
  rows, size = 5000, 5000 << 20
  tensors = (Tensor("big", (1 << 18, rows), 0, b""), Tensor("far", (8,), 0, b"", offset=size))
  path = write(tmp_path / "x.gguf", Gguf((), tensors))
  header = path.stat().st_size
  with path.open("r+b") as out:
    out.seek(header + size)
    out.write(np.arange(8, dtype="<f4").tobytes())
  with GGUFFile.open(path) as file:
    assert file.read_rows(file.tensors["far"], 0, 1).view("<f4").tolist() == [list(range(8))]
    assert not file.read_rows(file.tensors["big"], rows - 1, rows).any()


def test_a_large_vocabulary_opens_quickly(tmp_path: Path) -> None:
  tokens = [f"token{i}" for i in range(128_256)]
  path = write(tmp_path / "x.gguf", Gguf((("tokens", array(STRING, tokens)),), ()))
  start = time.perf_counter()
  with GGUFFile.open(path) as file:
    assert time.perf_counter() - start < 0.5
    assert file.metadata["tokens"] == tokens


@pytest.mark.parametrize(
  ("limit", "value"),
  [("MAX_HEADER_BYTES", 4000), ("MAX_KEYS", 16), ("MAX_TENSORS", 10), ("MAX_STRINGS", 288)],
)
def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
  path = write(tmp_path / "x.gguf", good())
  monkeypatch.setattr(gguf_header, limit, value)
  with pytest.raises(FormatError, match="limit"):
    GGUFFile.open(path)
  monkeypatch.setattr(gguf_header, limit, 8000 if limit == "MAX_HEADER_BYTES" else value + 1)
  GGUFFile.open(path).close()


def _absent(path: Path) -> None: ...


def _unreadable(path: Path) -> None:
  if os.geteuid() == 0:
    pytest.skip("root may read everything")
  path.touch(mode=0)


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (_absent, "No such file"),
    (Path.mkdir, "not a regular file"),
    (os.mkfifo, "not a regular file"),
    (lambda path: path.symlink_to(path), "symbolic links"),
    (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    (Path.touch, "0 bytes long"),
    (_unreadable, "Permission denied"),
  ],
)
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], object], says: str) -> None:
  path = tmp_path / "x.gguf"
  make(path)
  with pytest.raises(FormatError, match=says) as error:
    GGUFFile.open(path)
  assert str(path) in str(error.value)


def test_paths_that_cannot_be(tmp_path: Path) -> None:
  for name in ("nul\0.gguf", "x" * 300, "folder/x.gguf", "x.gguf/"):
    with pytest.raises(FormatError):
      GGUFFile.open(tmp_path / name)


def test_a_shard_that_is_a_folder(tmp_path: Path) -> None:
  files = split_files(shards_of(good()))
  (tmp_path / shard_name(0)).write_bytes(files[shard_name(0)])
  (tmp_path / shard_name(1)).mkdir()
  with pytest.raises(FormatError, match=rf"{shard_name(1)}: .* not a regular file"):
    GGUFFile.open(tmp_path / shard_name(0))
