"""Malformed files are refused with our own error, at once, in little memory, whatever they say."""

import random
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.malformed_gguf import corpus
from formats.raw_gguf import I32, STRING, array, good
from formats.refusals import Outcome, outcomes
from q4jax.errors import FormatError
from q4jax.formats.gguf import GGUFFile

CASES = {name: case for name, case in corpus().items() if case.stage == "open"}
SECONDS, BYTES = 1.0, 200 << 20


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
  root = tmp_path_factory.mktemp("malformed")
  paths = {name: case.write(root / name) for name, case in CASES.items()}
  # The good file comes first: it pays for the imports, and shows that the opener works.
  control = root / "good.gguf"
  control.write_bytes(good().encode())
  found = outcomes("q4jax.formats.gguf:GGUFFile.open", [control, *paths.values()])
  assert not found[0].error, found[0].message
  return dict(zip(paths, found[1:], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, refusals: dict[str, Outcome]) -> None:
  found = refusals[name]
  assert "Q4JaxError" in found.error, f"{found.error[:1] or 'opened'}: {found.message}"
  assert f"{name}/" in found.message, "the error names no file"
  assert CASES[name].says in found.message.replace(name, "")
  assert found.message.endswith("."), "the error says what to do in a sentence"
  assert len(found.message) < 1000
  assert found.seconds < SECONDS
  assert found.growth < BYTES


def test_the_corpus_is_large() -> None:
  assert len(CASES) >= 80


def test_cases_for_the_loader_are_valid_files(tmp_path: Path) -> None:
  """Else they would test the reader and not the loader."""
  for name, case in corpus().items():
    if case.stage == "load":
      path = case.write(tmp_path / name)
      GGUFFile.open(path).close()
      gguf.GGUFReader(path)


# Small enough that a random byte hits a count, a length or an offset more often than a weight.
SEED = (
  good()
  .with_key("tokenizer.ggml.tokens", array(STRING, ["a", "bc", "é"]))
  .with_key("tokenizer.ggml.scores", array(I32, [1, 2, 3]))
  .with_key("tokenizer.ggml.token_type", None)
)
PARTS = [part for _, part in SEED.parts()]
ODD = st.sampled_from([0, 1, 7, 31, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 32, 2**64 - 1])


def assert_opens_or_refuses(data: bytes, path: Path) -> None:
  path.write_bytes(data)
  try:
    file = GGUFFile.open(path)
  except FormatError as error:
    assert str(path) in str(error)
    return
  with file:
    for info in file.tensors.values():
      rows = file.read_rows(info, 0, info.num_rows)
      assert rows.nbytes == info.nbytes
      rows.sum()  # Touches every byte: all lie within the file.


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tmp_path_factory.mktemp("fuzz") / "fuzz.gguf"


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(scratch: Path, flips: list[tuple[int, int]]) -> None:
  data = bytearray(SEED.encode())
  for at, byte in flips:
    data[at] = byte
  assert_opens_or_refuses(bytes(data), scratch)


@settings(max_examples=400)
@given(st.integers(0, len(PARTS) - 1), ODD, st.integers(0, 8), st.booleans())
def test_odd_numbers(scratch: Path, part: int, number: int, at: int, cut: bool) -> None:
  """A u64 written over, or into, any part of the file."""
  odd = number.to_bytes(8, "little")
  changed = PARTS[part][:at] + odd + PARTS[part][at + (8 if cut else 0) :]
  assert_opens_or_refuses(b"".join([*PARTS[:part], changed, *PARTS[part + 1 :]]), scratch)


@settings(max_examples=200)
@given(st.randoms(use_true_random=False), st.integers(0, len(PARTS)))
def test_parts_lost_or_moved(scratch: Path, order: random.Random, kept: int) -> None:
  parts = PARTS[:kept] + order.sample(PARTS[kept:], order.randint(0, len(PARTS) - kept))
  assert_opens_or_refuses(b"".join(parts), scratch)
