"""Gradients with respect to x through frozen int4 weights, and what JAX may do with the product."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4_weights import numpy_weights, random_q4
from q4jax_kernels import ffi
from q4jax_kernels.int4_matmul import int4_matmul
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.q4_blocks import to_blocks

WEIGHTS = [random_q4(np.random.default_rng(i), 17 + i, 256, 32, i == 0) for i in range(2)]
COEFFICIENTS = [np.random.default_rng(9).normal(size=(3, 17 + i)) for i in range(2)]
X = np.random.default_rng(8).normal(size=(3, 256)).astype(np.float32)
KINDS: dict[str, tuple[Callable, str | None]] = {
  "reference": (lambda w: w, "reference"),
  "xla": (lambda w: w, "xla"),
  "cpu_scalar": (lambda w: to_blocks(w).tiles(), "cpu_scalar"),
  "cpu_avx2": (lambda w: to_blocks(w).tiles(), "cpu_avx2"),
  "rows": (to_blocks, None),
  "planar": (PlanarArray.from_q4, None),
  "default": (lambda w: to_blocks(w).tiles(), None),
}


@pytest.fixture(params=KINDS)
def loss(request: pytest.FixtureRequest) -> Callable[[jax.Array], jax.Array]:
  """x float[..., 3, 256] -> the sum of coefficients times outputs: its gradient is known."""
  if request.param.startswith("cpu") and ffi.isa_name(request.param[4:]) is None:
    pytest.skip(f"this processor, or this build, has no {request.param[4:]}")
  make, name = KINDS[request.param]
  ws = [jax.tree.map(jnp.asarray, make(w)) for w in WEIGHTS]

  def function(x: jax.Array) -> jax.Array:
    ys = int4_matmul(x, ws, name)
    return sum((y * jnp.asarray(c, y.dtype)).sum() for y, c in zip(ys, COEFFICIENTS, strict=True))

  return function


def expected() -> np.ndarray:
  pairs = zip(COEFFICIENTS, WEIGHTS, strict=True)
  return sum(c @ numpy_weights(w).astype(np.float64) for c, w in pairs)


@pytest.mark.filterwarnings("ignore:q4jax. there is no kernel")
def test_gradient_is_the_transposed_product(loss: Callable) -> None:
  grad = jax.jit(jax.grad(loss))
  np.testing.assert_allclose(grad(X), expected(), rtol=1e-5, atol=1e-5)
  # Along a direction, against finite differences; int8 activations make them coarse.
  v = np.random.default_rng(7).normal(size=X.shape).astype(np.float32)
  value = jax.jit(loss)
  slope = (value(X + v) - value(X - v)) / 2
  scale = np.linalg.norm(expected()) * np.linalg.norm(v)
  assert abs(float(slope) - (expected() * v).sum()) <= 5e-3 * scale


@pytest.mark.filterwarnings("ignore:q4jax. there is no kernel")
def test_checkpoint_vmap_and_low_precision(loss: Callable) -> None:
  xs = np.stack([X, 2 * X])
  grads = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(xs)
  np.testing.assert_allclose(grads, np.stack([expected()] * 2), rtol=1e-5, atol=1e-5)
  low = jax.jit(jax.grad(loss))(X.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(np.float32), expected(), rtol=0.02, atol=0.02)


def test_vmap_is_one_call_with_more_rows() -> None:
  ws = [to_blocks(w).tiles() for w in WEIGHTS]
  xs = np.random.default_rng(6).normal(size=(4, 3, 256)).astype(np.float32)
  batched = jax.jit(jax.vmap(lambda x: int4_matmul(x, ws)))
  for found, plain in zip(batched(xs), int4_matmul(jnp.asarray(xs), ws), strict=True):
    np.testing.assert_array_equal(found, plain)
  if ffi.available():
    assert batched.lower(xs).as_text().count("q4jax_matmul") == 1
    assert "while" not in batched.lower(xs).as_text()


def test_vmap_over_weights() -> None:
  ws = [to_blocks(random_q4(np.random.default_rng(i), 20, 256, 64, True)).tiles() for i in range(3)]
  stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *ws)
  (ys,) = jax.jit(jax.vmap(lambda w: int4_matmul(jnp.asarray(X), [w])))(stacked)
  for y, w in zip(ys, ws, strict=True):
    np.testing.assert_array_equal(y, int4_matmul(jnp.asarray(X), [w])[0])


def test_weights_are_frozen() -> None:
  """A gradient asked of the scales is zero, not an error: they are no parameters here."""
  w = jax.tree.map(jnp.asarray, WEIGHTS[1])
  grad = jax.grad(lambda w: int4_matmul(jnp.asarray(X), [w], "xla")[0].sum(), allow_int=True)(w)
  assert not np.asarray(grad.scale).any()
