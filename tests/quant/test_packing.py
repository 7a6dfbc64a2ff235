"""Packing against vectors by hand and against Python's big integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4jax.errors import ConfigError
from q4jax.quant.packing import BITS, pack, unpack
from q4jax_kernels.q4_array import pack_pairs


@pytest.mark.parametrize(
  "bits, codes, packed",
  [
    (2, [0, 1, 2, 3], [0b11_10_01_00]),
    (4, [1, 2, 15, 0], [0x21, 0x0F]),
    # From the least significant bit up: 3 is 11 atop byte 0, its 0 is the first bit of byte 1.
    (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
    (
      5,
      [1, 2, 3, 4, 5, 6, 7, 31],
      [0b010_00001, 0b0_00011_00, 0b0101_0010, 0b11_00110_0, 0b11111_001],
    ),
    (6, [1, 2, 3, 63], [0b10_000001, 0b0011_0000, 0b111111_00]),
    (8, [7, 255], [7, 255]),
  ],
)
def test_by_hand(bits, codes, packed):
  assert pack(np.array(codes, np.uint8), bits).tolist() == packed
  assert unpack(np.array(packed, np.uint8), bits).tolist() == codes


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_is_a_little_endian_number_and_comes_back(bits, n, runs, seed):
  codes = np.random.default_rng(seed).integers(0, 2**bits, (n, 8 * runs), np.uint8)
  packed = pack(codes, bits)
  for row, line in zip(codes.tolist(), packed, strict=True):
    number = sum(code << bits * k for k, code in enumerate(row))
    assert line.tobytes() == number.to_bytes(bits * runs, "little")
  np.testing.assert_array_equal(unpack(packed, bits), codes)


def test_four_bits_are_those_of_a_q4_array():
  codes = np.random.default_rng(0).integers(0, 16, (5, 64), np.uint8)
  np.testing.assert_array_equal(pack(codes, 4), pack_pairs(codes))


def test_wrong_arguments_are_named():
  codes = np.zeros((2, 4), np.uint8)
  with pytest.raises(ConfigError, match="7 bits have no packing"):
    pack(codes, 7)
  with pytest.raises(ConfigError, match="4 codes of 3 bits do not fill"):
    pack(codes, 3)
  with pytest.raises(ConfigError, match="code 4 does not fit 2 bits"):
    pack(codes + np.uint8(4), 2)
  with pytest.raises(ConfigError, match="4 bytes are no whole number of runs of 5"):
    unpack(codes, 5)
