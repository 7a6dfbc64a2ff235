"""A reader of .qbin written from docs/formats/qbin.md alone: struct, bytes, gguf-py; no q4jax."""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

Bytes = bytes
SCALARS = ["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8"]
# size/W of each piece.
PIECES = {
  "f32": "4/4", "f16": "2/2", "bf16": "2/2", "q4_0": "2/2 16/4", "iq4_nl": "2/2 16/4",
  "q4_1": "2/2 2/2 16/4", "q5_0": "2/2 4/4 16/4", "q5_1": "2/2 2/2 4/4 16/4", "q8_0": "2/2 32/4",
  "q2_k": "16/1 64/4 2/2 2/2", "q3_k": "32/4 64/4 12/1 2/2", "q4_k": "2/2 2/2 12/1 128/4",
  "q5_k": "2/2 2/2 12/1 32/4 128/4", "iq4_xs": "2/2 2/2 4/1 128/4",
}  # fmt: skip


@dataclass
class BookTensor:
  name: str
  shape: list[int]
  format: str
  layout: str
  stored: bytes
  checksum: int | None


def read(content: Bytes) -> tuple[dict[str, Any], dict[str, BookTensor]]:
  """Metadata and tensors of a file's bytes."""
  assert content[:8] == bytes([0x89, 0x51, 0x42, 0x49, 0x4E, 0x0D, 0x0A, 0x1A])
  major, _, length, checksum = struct.unpack("<HHQI", content[8:24])
  assert major == 1
  assert zlib.crc32(content[:20] + content[24 : 24 + length]) == checksum
  data = -(-(24 + length) // 4096) * 4096
  assert not any(content[24 + length : data])
  metadata, tensors = {}, {}
  for number, value in message(content[24 : 24 + length]):
    if number == 2:
      entry = dict(message(value))
      metadata[entry[1].decode()] = gguf_value(entry[2])
    elif number == 3:
      found = tensor(value, content, data)
      tensors[found.name] = found
  return metadata, tensors


def message(content: Bytes) -> Iterator[tuple[int, Any]]:
  """(number, int or bytes) of each field."""
  at = 0

  def varint() -> int:
    nonlocal at
    value = shift = 0
    while True:
      byte = content[at]
      at += 1
      value |= (byte & 127) << shift
      shift += 7
      if byte < 128:
        return value

  while at < len(content):
    tag = varint()
    kind = tag & 7
    if kind == 0:
      yield tag >> 3, varint()
      continue
    size = {1: 8, 5: 4}.get(kind) or varint()
    yield tag >> 3, content[at : at + size]
    at += size


def varints(content: Bytes) -> list[int]:
  """A packed field: each byte of 127 or less ends a number."""
  values, value, shift = [], 0, 0
  for byte in content:
    value |= (byte & 127) << shift
    shift += 7
    if byte < 128:
      values.append(value)
      value = shift = 0
  return values


def gguf_value(content: Bytes) -> Any:
  ((number, value),) = message(content)
  if number in (2, 4, 6, 12):
    return (value >> 1) ^ -(value & 1)
  if number == 7:
    return struct.unpack("<f", value)[0]
  if number == 13:
    return struct.unpack("<d", value)[0]
  if number == 8:
    return bool(value)
  if number == 9:
    return value.decode()
  if number != 10:
    return value
  fields = list(message(value))
  kind = next((v for n, v in fields if n == 1), 0)
  if kind == 8:
    return [v.decode() for n, v in fields if n == 3]
  return np.frombuffer(next((v for n, v in fields if n == 2), b""), SCALARS[kind])


def tensor(content: Bytes, file: Bytes, data: int) -> BookTensor:
  fields = dict(message(content))
  offset, nbytes = (struct.unpack("<Q", fields.get(n, bytes(8)))[0] for n in (5, 6))
  assert offset % 4096 == 0
  stored = file[data + offset : data + offset + nbytes]
  assert len(stored) == nbytes
  checksum = struct.unpack("<I", fields[7])[0] if 7 in fields else None
  assert checksum in (None, zlib.crc32(stored))
  name, format, layout = (fields[n].decode() for n in (1, 3, 4))
  return BookTensor(name, varints(fields[2]), format, layout, stored, checksum)


def group_wise(format: str) -> tuple[int, int, str, bool]:
  """(group, block_size, NumPy type of factors, whether there are minimums)."""
  kind, group, factor = re.fullmatch(r"q4([sa])(\d+)_(f16|f32)", format).groups()  # type: ignore[union-attr]
  return (
    int(group),
    32 if int(group) <= 32 else 256,
    "<" + factor[0] + str(int(factor[1:]) // 8),
    kind == "a",
  )


def pieces(format: str) -> list[tuple[int, int, int]]:
  """(offset, size, W)."""
  if format == "q6_k":
    found = [(208, 2, 2), (192, 16, 1)]
    for h in (0, 1):
      for p in (0, 1):
        for w in range(4):
          at = 16 * p + 4 * w
          found += [(128 + 32 * h + at, 4, 4), (64 * h + at, 4, 4), (64 * h + 32 + at, 4, 4)]
    return found
  if format in PIECES:
    sizes = [tuple(map(int, piece.split("/"))) for piece in PIECES[format].split()]
  else:
    group, block, factor, has_minimum = group_wise(format)
    width = int(factor[-1])
    factors = (block // group * width, width)
    sizes = [*([factors] * (1 + has_minimum)), (block // 2, 4)]
  found, offset = [], 0
  for size, word in sizes:
    found.append((offset, size, word))
    offset += size
  return found


def rows(t: BookTensor) -> np.ndarray:
  """uint8[N, row_bytes]."""
  n = int(np.prod(t.shape[:-1], dtype=int))
  if t.layout == "rows":
    return np.frombuffer(t.stored, np.uint8).reshape(n, -1)
  block_bytes = sum(size for _, size, _ in pieces(t.format))
  tiles = -(-n // 16)
  row_bytes = len(t.stored) // tiles // 16
  out = np.zeros((tiles * 16, row_bytes), np.uint8)
  source = np.frombuffer(t.stored, np.uint8)
  at = 0
  for tile in range(tiles):
    for b in range(row_bytes // block_bytes):
      for offset, size, word in pieces(t.format):
        for w in range(size // word):
          for r in range(16):
            begin = b * block_bytes + offset + w * word
            out[tile * 16 + r, begin : begin + word] = source[at : at + word]
            at += word
      if t.layout == "x16w":
        for r in range(16):
          block = out[tile * 16 + r, b * block_bytes : (b + 1) * block_bytes]
          (separate_q5 if t.format == "q5_k" else separate_q6)(block)
  assert at == len(source) and not out[n:].any()
  return out[:n]


def separate_q6(block: np.ndarray) -> None:
  """A row's block whose words are x16w's -> the file's, in place."""
  for at in range(16):
    h, p, w = at // 8, at // 4 % 2, at % 4
    start = 16 * p + 4 * w
    places = [128 + 32 * h + start, 64 * h + start, 64 * h + 32 + start]
    for byte in range(4):
      x, y, z = (int(block[place + byte]) for place in places)
      c0, c1, c2, c3 = x & 63, y & 63, z & 63, (x >> 6) << 4 | (y >> 6) << 2 | z >> 6
      block[places[0] + byte] = c0 >> 4 | (c1 >> 4) << 2 | (c2 >> 4) << 4 | (c3 >> 4) << 6
      block[places[1] + byte] = c0 & 15 | (c2 & 15) << 4
      block[places[2] + byte] = c1 & 15 | (c3 & 15) << 4


def separate_q5(block: np.ndarray) -> None:
  words = block[16:].reshape(8, 5, 4).astype(int)
  plain = np.zeros((40, 4), np.uint8)
  for group in range(8):
    for byte in range(4):
      v = words[group, :, byte].tolist()
      codes = [word & 31 for word in v]
      codes.append(v[0] >> 5 | (v[3] >> 5 & 3) << 3)
      codes.append(v[1] >> 5 | (v[4] >> 5 & 3) << 3)
      codes.append(v[2] >> 5 | v[3] >> 7 << 3 | v[4] >> 7 << 4)
      for i, code in enumerate(codes):
        plain[i, byte] |= (code >> 4) << group
        plain[8 + 8 * (group // 2) + i, byte] |= (code & 15) << 4 * (group % 2)
  block[16:] = plain.reshape(-1)


def values(t: BookTensor) -> np.ndarray:
  """float32[N, K]."""
  plain = rows(t)
  if t.format in ("f32", "f16"):
    return plain.view("<f4" if t.format == "f32" else "<f2").astype(np.float32)
  if not t.format.startswith(("q4s", "q4a")):
    return gguf.dequantize(plain, gguf.GGMLQuantizationType[t.format.upper()])
  group, block, factor, has_minimum = group_wise(t.format)
  out = []
  width, groups, run = int(factor[-1]), block // group, 16 if block == 32 else 32
  for b in plain.reshape(-1, sum(size for _, size, _ in pieces(t.format))):
    scale = b[: groups * width].view(factor).astype(np.float32)
    rest = b[groups * width :]
    if has_minimum:
      minimum, rest = rest[: groups * width].view(factor).astype(np.float32), rest[groups * width :]
    codes: list[int] = []
    for at in range(0, block // 2, run):
      codes += [byte & 15 for byte in rest[at : at + run]]
      codes += [byte >> 4 for byte in rest[at : at + run]]
    for i, code in enumerate(codes):
      if has_minimum:
        out.append(scale[i // group] * np.float32(code) - minimum[i // group])
      else:
        out.append(scale[i // group] * np.float32(int(code) - 8))
  return np.array(out, np.float32).reshape(len(plain), -1)
