"""Our GGUF quantisers against gguf-py's (bit for bit), llama.cpp's errors, exhaustive search."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize

from q4jax.errors import ConfigError
from q4jax.quant.kquants import FORMATS, quantize

K_QUANTS = ("q4_k", "q5_k", "q6_k")
SIMPLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")

# Mean squared error of llama.cpp's quantiser (ggml_quantize_chunk, ggml 0.25.3 as vendored by
# llama-cpp-python 0.3.36) on `matrix(name)`, and the mean of importance * error^2 with IMPORTANCE.
LLAMA_CPP_MSE = {
  ("q4_k", "normal"): (2.035340e-06, 7.590671e-07),
  ("q4_k", "heavy_tailed"): (9.752750e-06, 3.819840e-06),
  ("q4_k", "positive"): (2.838322e-04, 1.091711e-04),
  ("q5_k", "normal"): (5.232239e-07, 1.988221e-07),
  ("q5_k", "heavy_tailed"): (2.497504e-06, 1.024441e-06),
  ("q5_k", "positive"): (6.911894e-05, 2.638286e-05),
  ("q6_k", "normal"): (1.259615e-07, 4.758227e-08),
  ("q6_k", "heavy_tailed"): (7.164625e-07, 3.024127e-07),
  ("q6_k", "positive"): (5.734794e-05, 2.089091e-05),
}


def matrices():
  rng = np.random.default_rng(7)
  shape = (128, 1024)
  result = {
    "normal": rng.standard_normal(shape).astype(np.float32) * np.float32(0.02),
    "heavy_tailed": rng.standard_t(3, shape).astype(np.float32) * np.float32(0.02),
    "positive": rng.uniform(0, 1, shape).astype(np.float32),
  }
  return result, rng.gamma(0.5, 1, 1024).astype(np.float32) + np.float32(1e-3)


MATRICES, IMPORTANCE = matrices()


def decode(blocks, format):
  return dequantize(blocks, gguf.GGMLQuantizationType[format.upper()])


@pytest.mark.parametrize("format, name", LLAMA_CPP_MSE)
def test_k_quant_error_is_at_most_that_of_llama_cpp(format, name):
  x = MATRICES[name]
  plain, weighted = LLAMA_CPP_MSE[format, name]
  error = np.square(decode(quantize(x, format), format) - x)
  assert error.mean(dtype=np.float64) <= plain
  error = np.square(decode(quantize(x, format, IMPORTANCE), format) - x) * IMPORTANCE
  assert error.mean(dtype=np.float64) <= weighted


@pytest.mark.parametrize("format", SIMPLE)
@pytest.mark.parametrize("name", MATRICES)
def test_simple_formats_are_bit_equal_to_gguf(format, name):
  x = MATRICES[name]
  expected = gguf_quantize(x, gguf.GGMLQuantizationType[format.upper()])
  np.testing.assert_array_equal(quantize(x, format), expected)


@pytest.mark.parametrize("format", SIMPLE)
def test_simple_formats_at_edges_are_bit_equal_to_gguf(format):
  x = np.zeros((6, 32), np.float32)
  x[1], x[2], x[3, 5] = 3.5, -0.25, -1e-8
  x[4] = np.arange(32) / 2 - 8
  x[5, :2] = 1000, -1000
  expected = gguf_quantize(x, gguf.GGMLQuantizationType[format.upper()])
  np.testing.assert_array_equal(quantize(x, format), expected)


@pytest.mark.parametrize("bits", [4, 5])
def test_affine_k_quants_are_near_the_best_of_a_dense_grid(bits):
  # Eight equal groups: all share one scale and minimum, which d and d_min can express freely.
  for seed in range(4):
    group = np.random.default_rng(seed).standard_normal(32).astype(np.float32)
    x = np.tile(group, 8)[None]
    error = np.square(decode(quantize(x, f"q{bits}_k"), f"q{bits}_k") - x).mean(dtype=np.float64)
    top = 2**bits - 1
    span, low = np.ptp(group), -group.min()
    scale = np.linspace(0.7, 1.1, 300)[:, None, None] * span / top
    minimum = np.linspace(0.7, 1.1, 300)[None, :, None] * low
    codes = np.rint((group + minimum) / scale).clip(0, top)
    best = np.square(codes * scale - minimum - group).mean(axis=-1).min()
    assert error <= 1.12 * best


def test_q6_k_is_near_the_best_of_a_dense_grid():
  for seed in range(4):
    group = np.random.default_rng(seed).standard_normal(16).astype(np.float32)
    x = np.tile(group, 16)[None]
    error = np.square(decode(quantize(x, "q6_k"), "q6_k") - x).mean(dtype=np.float64)
    scale = np.abs(group).max() / np.linspace(28, 36, 20_000)[:, None]
    scale = np.concatenate([scale, -scale])
    codes = np.rint(group / scale).clip(-32, 31)
    best = np.square(codes * scale - group).mean(axis=-1).min()
    assert error <= 1.12 * best


@pytest.mark.parametrize("format", K_QUANTS)
def test_codes_on_the_grid_come_back_exactly(format):
  # Weights that a block can hold exactly: the optimum has error 0 and must be found.
  low, high = {"q4_k": (0, 15), "q5_k": (0, 31), "q6_k": (-32, 31)}[format]
  codes = np.random.default_rng(3).integers(low, high + 1, (4, 256))
  codes[:, ::16] = low
  codes[:, 1::16] = high
  x = codes.astype(np.float32) * np.float32(0.5)
  np.testing.assert_allclose(decode(quantize(x, format), format), x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("format", K_QUANTS)
def test_constant_and_zero_blocks(format):
  x = np.zeros((5, 512), np.float32)
  x[1], x[2], x[3] = 0.75, -0.75, 1e-38
  x[4, :256] = 2.0  # A whole super-block of zeros beside one that is not.
  y = decode(quantize(x, format), format)
  assert not y[[0, 3]].any()
  np.testing.assert_allclose(y[[1, 2, 4]], x[[1, 2, 4]], rtol=1e-3)


@pytest.mark.parametrize("format", K_QUANTS)
@pytest.mark.parametrize("size", [2e-4, 1e4])
def test_error_does_not_depend_on_size(format, size):
  x = MATRICES["normal"][:8]
  error = np.square(decode(quantize(x, format), format) - x).mean(dtype=np.float64)
  y = x * np.float32(size / np.abs(x).max())
  scaled = np.square((decode(quantize(y, format), format) - y).astype(np.float64)).mean()
  relative = scaled / (size / np.abs(x).max()) ** 2 / error
  # Below float16's normal range a scale has few bits: Q6_K (d = largest / 4096) loses one of its 6.
  assert 0.95 < relative < (1.05 if size > 1 else 4.0)


@pytest.mark.parametrize("format", FORMATS)
def test_row_bytes_and_chunks(format):
  x = np.random.default_rng(0).standard_normal((600, 512)).astype(np.float32)
  blocks = quantize(x, format)  # 600 * 512 weights are more than one chunk.
  size, type_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format.upper()]]
  assert blocks.dtype == np.uint8 and blocks.shape == (600, 512 // size * type_bytes)
  np.testing.assert_array_equal(blocks[595:], quantize(x[595:], format))
  assert quantize(x[:0], format).shape == (0, blocks.shape[1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(format, bad):
  x = np.zeros((300, 1024), np.float32)
  x[290, 1000] = bad
  with pytest.raises(ConfigError, match=rf"{format}: weight \[290, 1000\] is {bad}"):
    quantize(x, format)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_beyond_float16_scales_are_refused(format):
  x = np.ones((2, 256), np.float32)
  x[1, 7] = -3e38
  with pytest.raises(ConfigError, match=f"{format}: a weight is too large"):
    quantize(x, format)


def test_wrong_arguments_are_named():
  x = np.ones((2, 288), np.float32)
  with pytest.raises(ConfigError, match="'q3_k'.*choose one of"):
    quantize(x, "q3_k")
  with pytest.raises(ConfigError, match=r"multiple of 256 long; found shape \(2, 288\)"):
    quantize(x, "q4_k")
  with pytest.raises(ConfigError, match="needs a matrix"):
    quantize(x[0], "q8_0")
  with pytest.raises(ConfigError, match="importance must be 288"):
    quantize(x, "q8_0", np.ones(287, np.float32))
  with pytest.raises(ConfigError, match="importance must be 288"):
    quantize(x, "q8_0", np.full(288, -1, np.float32))
