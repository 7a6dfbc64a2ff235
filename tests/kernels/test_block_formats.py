"""Every block format against gguf-py, bit by bit, and against bytes done by hand."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax_kernels.block_formats import FORMATS

NAMES = list(FORMATS)
# Where the float16 factors of a block lie.
HALVES = {
  "q4_0": [0],
  "q4_1": [0, 2],
  "q5_0": [0],
  "q5_1": [0, 2],
  "q8_0": [0],
  "q2_k": [80, 82],
  "q3_k": [108],
  "q4_k": [0, 2],
  "q5_k": [0, 2],
  "q6_k": [208],
  "iq4_nl": [0],
  "iq4_xs": [0],
}
# +-0, subnormals, the largest finite, infinities, NaNs (quiet and signalling).
ODD_HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7D01]


def blocks_of(name: str, tame: bool = False) -> np.ndarray:
  """uint8[n, block_bytes]: random, constant, and with every odd float16; `tame`: finite factors."""
  form = FORMATS[name]
  rng = np.random.default_rng(NAMES.index(name))
  blocks = rng.integers(0, 256, (512, form.block_bytes), dtype=np.uint8)
  if tame:
    for at in HALVES[name]:
      scale = rng.normal(0, 0.01, len(blocks)).astype(np.float16)
      blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks
  constant = np.repeat(np.arange(256, dtype=np.uint8)[:, None], form.block_bytes, axis=1)
  odd = blocks[: len(ODD_HALVES)].copy()
  for at in HALVES[name]:
    odd[:, at : at + 2] = np.array(ODD_HALVES, "<u2").view(np.uint8).reshape(-1, 2)
  return np.concatenate([blocks, constant, odd])


def oracle(name: str, blocks: np.ndarray) -> np.ndarray:
  with np.errstate(all="ignore"):
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
  """Bit patterns are equal, -0 and +0 told apart; any NaN equals any NaN."""
  assert found.dtype == expected.dtype == np.float32
  assert found.shape == expected.shape
  nan = np.isnan(expected)
  np.testing.assert_array_equal(np.isnan(found), nan)
  np.testing.assert_array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_names_and_sizes_are_ggmls() -> None:
  assert len(FORMATS) == 12
  for name, form in FORMATS.items():
    assert form.name == name
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert (form.block_size, form.block_bytes) == sizes


@pytest.mark.parametrize("name", NAMES)
def test_numpy_is_bit_equal(name: str) -> None:
  blocks = blocks_of(name)
  expected = oracle(name, blocks)
  assert np.isnan(expected).any() and np.isfinite(expected).any()
  with np.errstate(all="ignore"):
    assert_same_bits(FORMATS[name].dequantize(blocks, xp=np), expected)


@pytest.mark.parametrize("name", NAMES)
def test_jax_op_by_op_is_bit_equal(name: str) -> None:
  blocks = blocks_of(name)
  with jax.disable_jit():
    found = FORMATS[name].dequantize(jnp.asarray(blocks))
  assert_same_bits(np.asarray(found), oracle(name, blocks))


@pytest.mark.parametrize("name", NAMES)
def test_jax_jitted_rounds_at_most_once_less(name: str) -> None:
  """The product may stay exact in a fused multiply-add, so the error is half a step of it."""
  blocks = blocks_of(name, tame=True).reshape(8, 64, -1)
  expected = oracle(name, blocks)
  assert np.isfinite(expected).all()
  found = np.asarray(jax.jit(FORMATS[name].dequantize)(blocks))
  assert found.shape == (8, 64, FORMATS[name].block_size)
  largest = np.abs(expected).max(axis=-1, keepdims=True)
  assert (np.abs(found - expected) <= 2 * np.finfo(np.float32).eps * largest).all()


@pytest.mark.parametrize("name", NAMES)
def test_jax_jitted_agrees_on_odd_values(name: str) -> None:
  """Infinities, NaNs, zeros and subnormal factors survive compilation."""
  blocks = blocks_of(name)
  expected = oracle(name, blocks)
  found = np.asarray(jax.jit(FORMATS[name].dequantize)(blocks))
  np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
  np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_any_leading_axes(name: str) -> None:
  form = FORMATS[name]
  blocks = blocks_of(name, tame=True)[:6]
  flat = form.dequantize(blocks, xp=np)
  nested = form.dequantize(blocks.reshape(1, 3, 2, form.block_bytes), xp=np)
  np.testing.assert_array_equal(nested.reshape(flat.shape), flat)
  np.testing.assert_array_equal(form.dequantize(blocks[0], xp=np), flat[0])
  for xp in (np, jnp):
    assert form.dequantize(xp.zeros((0, form.block_bytes), xp.uint8), xp).shape == (
      0,
      form.block_size,
    )


def test_q4_0_by_hand() -> None:
  # d = 0.5; byte 0 holds weight 0 in its low nibble (1) and weight 16 in its high nibble (0xF).
  block = np.array([0x00, 0x38, 0xF1, *[0x88] * 15], np.uint8)
  w = FORMATS["q4_0"].dequantize(block, xp=np)
  assert (w[0], w[16]) == (0.5 * (1 - 8), 0.5 * (15 - 8))
  assert not np.delete(w, [0, 16]).any()


def test_q4_k_by_hand() -> None:
  block = np.zeros(144, np.uint8)
  block[0:4] = [0x00, 0x3C, 0x00, 0x40]  # d = 1, d_min = 2
  block[4] = 0b10_000011  # scale 0 = 3; top bits of scale 4 = 0b10
  block[8] = 0b01_000101  # minimum 0 = 5; top bits of minimum 4 = 0b01
  block[12] = 0x76  # low bits of scale 4 = 6, of minimum 4 = 7
  block[16] = 0xB9  # weight 0 (group 0) = 9, weight 32 (group 1) = 11
  block[16 + 64] = 0x0D  # weight 128 (group 4) = 13
  w = FORMATS["q4_k"].dequantize(block, xp=np)
  assert w[0] == 1 * 3 * 9 - 2 * 5
  assert w[1] == -2 * 5
  assert w[32] == 0
  assert w[128] == 1 * 0b10_0110 * 13 - 2 * 0b01_0111
