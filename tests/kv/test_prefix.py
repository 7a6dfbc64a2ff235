"""Names of prefixes: equal exactly when the contents must be."""

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest

import q4jax
from q4jax.kv.prefix import prefix_hashes


def test_by_hand() -> None:
  def h(data: str) -> bytes:
    return hashlib.blake2b(bytes.fromhex(data), digest_size=32, person=b"q4jax.kv").digest()

  root = h("0200000000000000" + "7334")
  first = h(root.hex() + "0100000002000000")
  second = h(first.hex() + "ffffffff00000000")
  assert prefix_hashes([1, 2, 2**32 - 1, 0, 9], 2, b"s4") == [first, second]


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (41, 10)])
def test_only_full_blocks_have_a_name(tokens: int, blocks: int) -> None:
  names = prefix_hashes(range(tokens), 4, b"")
  assert len(names) == len(set(names)) == blocks
  for first in range(12):
    assert prefix_hashes(range(tokens), 4, b"", first) == names[first:]


def test_a_changed_token_renames_its_block_and_all_after() -> None:
  tokens = list(range(20))
  names = prefix_hashes(tokens, 4, b"salt")
  for i in range(20):
    changed = prefix_hashes([*tokens[:i], 99, *tokens[i + 1 :]], 4, b"salt")
    assert [a == b for a, b in zip(names, changed, strict=True)] == [
      block < i // 4 for block in range(5)
    ]


def test_equal_prefixes_have_equal_names_whatever_holds_the_tokens() -> None:
  tokens = [random.Random(0).randrange(2**32) for _ in range(64)]
  names = prefix_hashes(tokens, 16, b"s")
  assert prefix_hashes((*tokens, 5, 6, 7), 16, b"s") == names
  assert prefix_hashes(list(np.array(tokens)), 16, b"s") == names


def test_salts_and_block_sizes_never_meet() -> None:
  tokens = [0] * 64
  named = [
    name
    for salt in (b"", b"int4", b"int8", b"\0", b"int4\0")
    for size in (1, 2, 4, 8)
    for name in prefix_hashes(tokens, size, salt)
  ]
  assert len(named) == len(set(named)) == 5 * (64 + 32 + 16 + 8)


def test_names_are_the_same_in_every_process() -> None:
  program = "from q4jax.kv.prefix import *; print(prefix_hashes([1, 2], 1, b'x')[1].hex())"
  for seed in ("1", "2"):
    out = subprocess.run(
      [sys.executable, "-c", program],
      env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
      capture_output=True,
      text=True,
      check=True,
    )
    assert out.stdout.strip() == prefix_hashes([1, 2], 1, b"x")[1].hex()


@pytest.mark.parametrize(
  ("message", "tokens", "size", "first"),
  [
    ("block_size is 0", [1], 0, 0),
    ("first is -1", [1], 1, -1),
    ("Tokens 2 to 3 cannot be hashed.*expected integers from 0", [1, 2, 3, -1], 2, 0),
    ("Tokens 0 to 0 cannot be hashed", [2**32], 1, 0),
    ("Tokens 0 to 0 cannot be hashed", [1.5], 1, 0),
  ],
)
def test_refuses(message: str, tokens: list[int], size: int, first: int) -> None:
  with pytest.raises(q4jax.ConfigError, match=message):
    prefix_hashes(tokens, size, b"", first)
