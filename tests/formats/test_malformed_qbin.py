"""Headers that lie: each is a FormatError that says what is wrong, in little time and memory."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.refusals import outcomes
from q4jax.errors import FormatError
from q4jax.formats import qbin_header
from q4jax.formats import qbin_pb2 as pb
from q4jax.formats.checkpoint import Tensor
from q4jax.formats.qbin import QbinCheckpoint
from qbin_files import METADATA, write_qbin

from .test_qbin import RECORDS

TENSORS = [Tensor("m", (20, 32), "q4_0"), Tensor("n", (17, 256), "q6_k"), Tensor("v", (9,), "f32")]
Change = Callable[[pb.Header], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
  path = tmp_path_factory.mktemp("good") / "a.qbin"
  arrays = {"tokens": ["a", "bc"], "scores": [0.5, 1.5]}
  write_qbin(path, TENSORS, records=RECORDS, metadata=METADATA | arrays)
  return path.read_bytes()


def sealed(fixed: bytes, body: bytes, rest: bytes = b"") -> bytes:
  """A file with a checksum that is right, so that a lie gets past it."""
  checksum = struct.pack("<I", zlib.crc32(body, zlib.crc32(fixed)))
  head = fixed + checksum + body
  return head + bytes(-len(head) % 4096) + rest


def changed(good: bytes, change: Change) -> bytes:
  head = qbin_header.parse(good, "good")
  change(head.header)
  return qbin_header.pack(head.header) + good[head.data :]


def set_array(header: pb.Header, **fields: object) -> None:
  array = header.metadata[-1].value.array
  array.CopyFrom(pb.Array(**fields))  # type: ignore[arg-type]


LIES: dict[str, tuple[Change, str]] = {
  "no name": (lambda h: setattr(h.tensors[0], "name", ""), "tensor ''.*1 to 63 bytes"),
  "a long name": (lambda h: setattr(h.tensors[0], "name", "n" * 64), "1 to 63 bytes"),
  "a name twice": (lambda h: setattr(h.tensors[0], "name", "n"), "'n' occurs twice"),
  "no shape": (lambda h: h.tensors[0].ClearField("shape"), r"shape \[\]"),
  "a dimension of 0": (lambda h: h.tensors[0].shape.insert(0, 0), r"shape \[0, 20, 32\]"),
  "many dimensions": (lambda h: h.tensors[0].shape.extend([1] * 9), "1 to 4 dimensions"),
  "huge dimensions": (
    lambda h: h.tensors[0].shape.__setitem__(0, 2**64 - 1), "expected 33[0-9]{19}",
  ),
  "rows of half a block": (
    lambda h: h.tensors[0].shape.__setitem__(1, 48), "not a multiple of q4_0's block of 32",
  ),
  "an unknown format": (lambda h: setattr(h.tensors[0], "format", "q9_z"), "format 'q9_z'"),
  "an unknown layout": (lambda h: setattr(h.tensors[0], "layout", "x8"), "layout 'x8'"),
  "a vector in tiles": (lambda h: setattr(h.tensors[2], "layout", "x16"), "layout 'x16'"),
  "a byte less": (
    lambda h: setattr(h.tensors[0], "nbytes", h.tensors[0].nbytes - 1), "has 575 bytes",
  ),
  "an offset between pages": (lambda h: setattr(h.tensors[0], "offset", 64), "multiple of 4096"),
  "an offset past the end": (
    lambda h: setattr(h.tensors[0], "offset", 2**64 - 4096), "the file ends at",
  ),
  "tensors on each other": (lambda h: setattr(h.tensors[1], "offset", 0), "overlap"),
  "an empty key": (lambda h: setattr(h.metadata[0], "key", ""), "key ''"),
  "a key twice": (lambda h: setattr(h.metadata[0], "key", "llama.vocab_size"), "there twice"),
  "a long key": (lambda h: setattr(h.metadata[0], "key", "k" * 65536), "longer than 65535"),
  "no value": (lambda h: h.metadata[0].ClearField("value"), "no value"),
  "u8 of 256": (lambda h: setattr(h.metadata[1].value, "u8", 256), "256 does not fit u8"),
  "an array of type 99": (lambda h: set_array(h, type=99), "array of type 99"),
  "an array of arrays": (lambda h: set_array(h, type=9), "array of type 9"),
  "numbers and strings": (
    lambda h: set_array(h, type=5, numbers=bytes(4), strings=["a"]), "array of type 5",
  ),
  "strings and numbers": (lambda h: set_array(h, type=8, numbers=b"a"), "array of type 8"),
  "half a number": (lambda h: set_array(h, type=5, numbers=bytes(6)), "6 bytes are no array"),
  "a bool of 2": (lambda h: set_array(h, type=7, numbers=b"\1\2"), "neither 0 nor 1"),
  "no architecture": (lambda h: h.metadata.__delitem__(0), "general.architecture"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, good: bytes, tmp_path: Path) -> None:
  change, expected = LIES[lie]
  path = tmp_path / "a.qbin"
  path.write_bytes(changed(good, change))
  with pytest.raises(FormatError, match=expected) as error:
    QbinCheckpoint.open(path)
  assert str(path) in str(error.value)


def test_another_file(good: bytes, tmp_path: Path) -> None:
  path = tmp_path / "a.qbin"
  for content, expected in [
    (b"", "0 bytes long"),
    (good[:23], "23 bytes long"),
    (b"GGUF" + good[4:], "not a .qbin file: it begins with b'GGUF"),
    (good[:4] + b"\n" + good[6:], "transferred as text"),
    (good[:30], "the header is said to have"),
    (good[:12] + b"\xff" * 8 + good[20:], "the header is said to have 18446744073709551615"),
    (good[:20] + bytes(4) + good[24:], "checksum is .* says 0x00000000"),
    (good[:-1], "'v' .* the file ends at"),
  ]:
    path.write_bytes(content)
    with pytest.raises(FormatError, match=expected):
      QbinCheckpoint.open(path)


def test_every_length(good: bytes, tmp_path: Path) -> None:
  """Whatever a file is cut to, it is refused, and never read past its end."""
  path = tmp_path / "a.qbin"
  for length in [*range(0, 200), *range(200, len(good), 101)]:
    path.write_bytes(good[:length])
    with pytest.raises(FormatError):
      QbinCheckpoint.open(path)


def try_open(content: bytes, path: Path) -> None:
  """Opens and reads all: either all of it works, or it is a FormatError."""
  path.write_bytes(content)
  try:
    with QbinCheckpoint.open(path) as checkpoint:
      for name in checkpoint.tensors:
        checkpoint.rows(name)
        checkpoint.is_intact(name)
      checkpoint.records()
  except FormatError as error:
    assert str(path) in str(error)


manners = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


@manners
@given(data=st.data())
def test_flipped_bits(data: st.DataObject, good: bytes, tmp_path: Path) -> None:
  """Bits of the header are flipped behind the checksum's back."""
  head = qbin_header.parse(good, "good")
  length = len(head.header.SerializeToString())
  body = bytearray(good[24 : 24 + length])
  for bit in data.draw(st.lists(st.integers(0, 8 * length - 1), min_size=1, max_size=8)):
    body[bit // 8] ^= 1 << bit % 8
  try_open(sealed(good[:20], bytes(body), good[head.data :]), tmp_path / "a.qbin")


@manners
@given(data=st.data())
def test_spliced_headers(data: st.DataObject, good: bytes, tmp_path: Path) -> None:
  """Bytes are cut out, doubled or put in; the length and the checksum agree with the result."""
  head = qbin_header.parse(good, "good")
  body = good[24 : 24 + len(head.header.SerializeToString())]
  a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(body))] * 2)))
  body = body[:a] + data.draw(st.sampled_from([b"", body[a:b] * 2, body])) + body[b:]
  at = data.draw(st.integers(0, len(body)))
  body = body[:at] + data.draw(st.binary(max_size=12)) + body[at:]
  fixed = good[:12] + struct.pack("<Q", len(body))
  try_open(sealed(fixed, body, good[head.data :]), tmp_path / "a.qbin")


@manners
@given(body=st.binary(max_size=200))
def test_any_bytes_as_a_header(body: bytes, tmp_path: Path) -> None:
  fixed = struct.pack("<8sHHQ", qbin_header.MAGIC, 1, 0, len(body))
  try_open(sealed(fixed, body), tmp_path / "a.qbin")


def nested(number: int, content: bytes) -> bytes:
  size, length = len(content), b""
  while size > 127:
    length += bytes([size & 127 | 128])
    size >>= 7
  return bytes([number << 3 | 2]) + length + bytes([size]) + content


BOMBS = {
  "entries": b"\x12\0" * 2**22,
  "tensors": b"\x1a\0" * 2**22,
  "records": b"\x22\0" * 2**22,
  "statistics": nested(4, b"\x5a\0" * 2**22),
  "strings": nested(2, b"\x0a\1k" + nested(2, nested(10, b"\x08\x08" + b"\x1a\0" * 2**22))),
  "dimensions": nested(3, b"\x0a\1t" + nested(2, b"\1" * 2**23)),
  "unknown": b"\xa2\x06\0" * 2**21,
}


def test_small_bombs_stay_small(tmp_path: Path) -> None:
  """Eight MiB that would become hundreds: of each kind of field that costs more than its bytes."""
  paths = []
  for name, body in BOMBS.items():
    paths.append(tmp_path / f"{name}.qbin")
    fixed = struct.pack("<8sHHQ", qbin_header.MAGIC, 1, 0, len(body))
    paths[-1].write_bytes(sealed(fixed, body))
  for path, outcome in zip(
    paths, outcomes("q4jax.formats.qbin:QbinCheckpoint.open", paths), strict=True
  ):
    assert "FormatError" in outcome.error, (path, outcome)
    assert outcome.seconds < 5 and outcome.growth < 200 << 20, (path, outcome)
