"""Probabilities of a few queries over all slots, against a float64 softmax."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax_kernels import ffi
from q4jax_kernels.attention import cpu, reference, window_attention

ISAS = ("scalar", "avx2", "avx512", "neon")


def window(implementation: str) -> Callable[..., Any]:
  if implementation in ("door", "reference"):
    return jax.jit(window_attention if implementation == "door" else reference.window_attention)
  isa = implementation
  if ffi.isa_name(isa) is None:
    pytest.skip(f"this processor, or this build, has no {isa}")
  return jax.jit(functools.partial(cpu.window_attention, isa=isa))


@pytest.mark.parametrize("implementation", ["door", "reference", *ISAS])
@pytest.mark.parametrize(
  ("w", "heads", "kv_heads", "head_dim", "cache"),
  [(1, 6, 2, 16, "f16"), (5, 4, 1, 8, "f32"), (32, 8, 2, 64, "f16"), (17, 3, 3, 24, "f32")],
)
def test_window(
  implementation: str, w: int, heads: int, kv_heads: int, head_dim: int, cache: str
) -> None:
  """Rows that see nothing, something else than their neighbours, everything; NaN in the rest."""
  b, s = 4, 100
  rng = np.random.default_rng(0)
  q = rng.standard_normal((b, w, heads, head_dim), np.float32)
  k = rng.standard_normal((b, kv_heads, s, head_dim), np.float32).astype(
    {"f16": np.float16, "f32": np.float32}[cache]
  )
  last = np.array([s, 3, 0, 61])
  seen = np.clip(last[:, None] - np.arange(w)[::-1] * 2, 0, s).astype(np.int32)
  for row, most in enumerate(last):
    k[row, :, most:] = np.nan
  found = window(implementation)(jnp.array(q), jnp.array(k), jnp.array(seen))
  expected = np.zeros((b, heads, w, s))
  for row, head, i in np.ndindex(b, heads, w):
    count = seen[row, i]
    keys = k[row, head * kv_heads // heads, :count].astype(np.float64)
    e = np.exp(keys @ q[row, i, head] / np.sqrt(head_dim))
    expected[row, head, i, :count] = e / e.sum()
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_window_that_cannot_be() -> None:
  q, k = jnp.ones((1, 2, 2, 16)), jnp.ones((1, 1, 20, 16))
  with pytest.raises(NotImplementedError, match="keys in float16 or float32; got bfloat16"):
    window_attention(q, k.astype(jnp.bfloat16), jnp.ones((1, 2), jnp.int32), "cpu")
  with pytest.raises(ValueError, match="'flash' is not one of reference, cpu"):
    window_attention(q, k, jnp.ones((1, 2), jnp.int32), "flash")
  if not ffi.available():
    return
  for seen, message in (((5, 4), "query 1 sees 4 of 20"), ((5, 21), "query 1 sees 21 of 20")):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
      jax.block_until_ready(window_attention(q, k, jnp.array([seen], jnp.int32), "cpu"))
