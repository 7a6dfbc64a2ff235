"""Our files read by a reader that knows only the document, and a file that must stay readable."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from formats import qbin_by_the_book as book
from formats.make_golden_qbin import GOLDEN, KEYS, RECORD, TENSORS, rows
from gguf_model import ModelSpec, write
from q4jax.formats.checkpoint import Tensor, floats
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.qbin import QbinCheckpoint
from q4jax_kernels.block_array import FIELDS, block_shape, dequantize_blocks
from qbin_files import convert, write_qbin


@pytest.mark.parametrize("layout", ["rows", "x16"])
def test_every_format_by_the_book(layout: str, tmp_path: Path) -> None:
  tensors = [Tensor(format, (18, 256), format) for format in FIELDS]
  expected = write_qbin(tmp_path / "a.qbin", tensors, layout)
  _, found = book.read((tmp_path / "a.qbin").read_bytes())
  assert list(found) == list(FIELDS)
  for name, tensor in found.items():
    own = "x16w" if layout == "x16" and name in ("q5_k", "q6_k") else layout
    assert (tensor.format, tensor.layout, tensor.shape) == (name, own, [18, 256])
    assert np.array_equal(book.rows(tensor), expected[name]), name
    if layout == "rows":  # Values follow from rows.
      blocks = expected[name].reshape(18, -1, block_shape(name)[1])
      with np.errstate(all="ignore"):
        ours = np.asarray(dequantize_blocks(blocks, name)).reshape(18, 256)
        assert np.array_equal(ours, book.values(tensor), equal_nan=True), name


def test_a_model_by_the_book(tmp_path: Path) -> None:
  path = write(tmp_path / "a.gguf", ModelSpec(type="q8_0", d_ffn=128))
  with GGUFCheckpoint.open(path) as source:
    convert(source, tmp_path / "a.qbin")
    metadata, tensors = book.read((tmp_path / "a.qbin").read_bytes())
    assert list(metadata) == list(source.metadata)
    for key, value in source.metadata.items():
      assert np.array_equal(metadata[key], value), key
    for name in source.tensors:
      assert np.array_equal(book.rows(tensors[name]), source.rows(name)), name


def test_the_golden_file_is_what_it_was() -> None:
  content = GOLDEN.read_bytes()
  assert len(content) < 1 << 16
  assert hashlib.sha256(content).hexdigest() == (
    "773ccccb1f92b7546b83167b8d7cfec3cc2675b186491394c8571c7cee9fd3bc"
  )


def test_the_golden_file_is_read() -> None:
  """By us and by the book, with these rows, keys and records."""
  metadata, by_the_book = book.read(GOLDEN.read_bytes())
  with QbinCheckpoint.open(GOLDEN) as checkpoint:
    assert checkpoint.head.minor == 0 and list(checkpoint.tensors.values()) == TENSORS
    for tensor in TENSORS:
      name = tensor.name
      assert checkpoint.is_intact(name)
      assert np.array_equal(checkpoint.rows(name), rows(tensor))
      assert np.array_equal(book.rows(by_the_book[name]), rows(tensor))
      expected = book.values(by_the_book[name]).reshape(tensor.shape)
      assert np.array_equal(floats(checkpoint, name), expected)
    for key, value in KEYS.items():
      assert np.array_equal(checkpoint.metadata[key], value)
      assert np.array_equal(metadata[key], value)
    assert checkpoint.config.vocab_size == 3
    (record,) = checkpoint.records()
    assert record.to_json() == RECORD.to_json()


def test_values_of_the_golden_file_by_hand() -> None:
  with QbinCheckpoint.open(GOLDEN) as checkpoint:
    # Bytes 1 2 make the float16 0x0201 = 513 * 2^-24; the codes are the bytes 3, 4, 5, ...
    assert floats(checkpoint, "eight")[0, :3].tolist() == [513 * 2**-24 * c for c in (3, 4, 5)]
    # Byte 3's nibbles are weights 0 and 16 of a q4_0 block: codes 3 and 0, of 8 in the middle.
    assert floats(checkpoint, "old")[0, [0, 16]].tolist() == [513 * 2**-24 * c for c in (-5, -8)]
