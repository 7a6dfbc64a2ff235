"""Q4Array: its law by hand and in NumPy, and what it refuses."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from q4_weights import Q4_KINDS, numpy_weights, random_q4
from q4jax_kernels.q4_array import Q4Array

U8 = jnp.uint8


def test_layout_by_hand() -> None:
  # Byte 0x21 holds k=0 -> code 1 (low nibble) and k=1 -> code 2; byte 0xF0 codes 0 and 15.
  packed = jnp.array([[0x21, 0xF0]], U8)
  asymmetric = Q4Array(packed, jnp.array([[10.0, 2.0]]), jnp.array([[3.0, 1.0]])).validated()
  assert asymmetric.dequantize().tolist() == [[7.0, 17.0, -1.0, 29.0]]
  assert (asymmetric.shape, asymmetric.group_size) == ((1, 4), 2)
  symmetric = Q4Array(packed, jnp.array([[10.0]])).validated()
  assert symmetric.dequantize().tolist() == [[-70.0, -60.0, -80.0, 70.0]]
  assert symmetric.group_size == 4


@pytest.mark.parametrize("group, symmetric, dtype", Q4_KINDS)
def test_dequantize_is_numpys(group: int | str, symmetric: bool, dtype: str) -> None:
  w = random_q4(np.random.default_rng(0), 5, 512, group, symmetric, dtype).validated()
  assert w.shape == (5, 512)
  assert w.group_size == (group if isinstance(group, int) else 512)
  found = w.dequantize()
  np.testing.assert_array_equal(found.view(np.uint32), numpy_weights(w).view(np.uint32))


def test_sizes() -> None:
  w = random_q4(np.random.default_rng(0), 4, 256, 32, False, "float16")
  assert w.nbytes == 4 * 128 + 2 * 4 * 8 * 2
  assert w.bits_per_weight == 4 + 2 * 16 / 32


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [8, 64, 256])
def test_round_to_nearest_stays_within_half_a_step(group: int, symmetric: bool) -> None:
  values = np.random.default_rng(1).normal(size=(6, 256)).astype(np.float32)
  values[0] = 0  # A group of zeros has scale 0 and must stay zero.
  w = Q4Array.round_to_nearest(
    jnp.asarray(values), group, symmetric=symmetric, scale_dtype=jnp.float32
  )
  step = np.repeat(np.asarray(w.scale), group, axis=1)
  assert (np.abs(np.asarray(w.dequantize()) - values) <= 0.5001 * step).all()
  assert not np.asarray(w.dequantize())[0].any()


BYTES, ONES = jnp.zeros((4, 32), U8), jnp.ones((4, 2))


@pytest.mark.parametrize(
  "parts, message",
  [
    ((BYTES.astype(jnp.int8), ONES), r"packed is int8\[4, 32\]"),
    ((BYTES[0], ONES), r"packed is uint8\[32\]"),
    ((BYTES, ONES.astype(jnp.int32)), "scale is int32"),
    ((BYTES, jnp.ones((3, 2))), r"scale has shape \[3, 2\].*\[4, 64\]"),
    ((BYTES, jnp.ones((1, 2))), r"scale has shape \[1, 2\]"),
    ((BYTES, jnp.ones((4, 2, 1))), r"scale has shape \[4, 2, 1\]"),
    ((BYTES, jnp.ones((4, 3))), "K=64 does not divide into the 3 groups"),
    ((BYTES, jnp.ones((4, 64))), "K=64 does not divide into the 64 groups"),
    ((BYTES, jnp.ones((4, 0))), "0 groups"),
    ((BYTES, ONES, jnp.ones((4, 1))), r"minimum is float32\[4, 1\] where scale is float32\[4, 2\]"),
    ((BYTES, ONES, ONES.astype(jnp.float16)), "minimum is float16"),
  ],
)
def test_refusals_name_the_values(parts: tuple, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    Q4Array(*parts).validated()


def test_round_to_nearest_refuses_a_group_that_does_not_fit() -> None:
  with pytest.raises(ValueError, match="group_size=48 must be even and divide K=64"):
    Q4Array.round_to_nearest(jnp.zeros((2, 64)), 48)


def test_is_a_pytree() -> None:
  w = random_q4(np.random.default_rng(0), 4, 64, 32, False, "bfloat16")
  assert len(jax.tree.leaves(w)) == 3
  assert w.scale.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(jax.jit(lambda w: w)(w).codes(), w.codes())
