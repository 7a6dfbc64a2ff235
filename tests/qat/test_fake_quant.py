"""The law in JAX against NumPy's, bit for bit, and gradients against formulas written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.errors import ConfigError
from q4jax.qat import fake_quant as fq
from q4jax.quant import grid as grids
from q4jax.quant import rtn, search
from q4jax.quant.grid import Grid, Parameters

GRIDS = [
  Grid(bits, size, rule)  # type: ignore[arg-type]
  for bits in (2, 3, 4, 8)
  for size, rule in ((16, "minimum"), (8, "absmax"), ("channel", "signed"))
]


def matrix(seed: int, spread: float = 1.0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(37, 64)) * 10 ** rng.uniform(-3, 1, size=(37, 1)) * spread
  w[3] = 0
  w[4, :32] = 0.25
  return w.astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e-5, 3e-7])  # The latter two: subnormal float16 scales.
def test_the_bits_are_numpys(grid: Grid, spread: float) -> None:
  w = matrix(0, spread)
  for fit in (rtn.fit, search.fit):
    p = fit(w, grid)
    want = grids.quantize(w, grid, p)
    minimum = None if p.minimum is None else jnp.asarray(p.minimum, jnp.float32)
    scale = jnp.asarray(p.scale, jnp.float32)
    jitted = jax.jit(fq.fake_quant, static_argnums=3)
    got = np.asarray(jitted(w, scale, minimum, grid))
    np.testing.assert_array_equal(got, want.dequantize())
    codes = jax.jit(fq.codes, static_argnums=3)(w, scale, minimum, grid)
    np.testing.assert_array_equal(np.asarray(codes), want.codes)


def test_stored_is_float16() -> None:
  rng = np.random.default_rng(1)
  x = rng.normal(size=20000).astype(np.float32) * 10 ** rng.uniform(-9, 4, 20000).astype(np.float32)
  x[:3] = 0, 1e-30, -1e-30
  want = x.astype(np.float16).astype(np.float32)
  smallest = np.copysign(np.float32(2**-24), x)
  want = np.where((want == 0) & (x != 0), smallest, want)
  np.testing.assert_array_equal(np.asarray(jax.jit(fq.stored)(x)), want)
  assert float(jax.grad(fq.stored)(0.3)) == 1


@pytest.mark.parametrize("rule", ["minimum", "absmax", "signed"])
def test_min_max_is_rtn(rule: grids.Rule) -> None:
  grid, w = Grid(4, 16, rule), matrix(2)
  scale, minimum = jax.jit(fq.min_max, static_argnums=1)(w, grid)
  want = rtn.fit(w, grid)
  # XLA multiplies by the inverse of a constant: a scale in the middle of two float16 may differ.
  np.testing.assert_allclose(scale, want.scale.astype(np.float32), rtol=2**-10)
  assert np.mean(np.asarray(scale) == want.scale.astype(np.float32)) > 0.98
  if want.minimum is not None:
    np.testing.assert_array_equal(np.asarray(minimum), want.minimum.astype(np.float32))


def by_hand(w: np.ndarray, p: Parameters, grid: Grid, dy: np.ndarray) -> tuple[np.ndarray, ...]:
  """One weight at a time in float64: the table of the module."""
  n, k = w.shape
  length = k // p.scale.shape[1]
  zero = 0 if p.minimum is not None else 2 ** (grid.bits - 1)
  top = 2**grid.bits - 1
  dw, ds, dm = np.zeros((n, k)), np.zeros(p.scale.shape), np.zeros(p.scale.shape)
  for i in range(n):
    for j in range(k):
      s = float(p.scale[i, j // length])
      m = 0.0 if p.minimum is None else float(p.minimum[i, j // length])
      v = (float(w[i, j]) + m) / s
      c = round(v) + zero
      if 0 <= c <= top:
        dw[i, j] = dy[i, j]
        ds[i, j // length] += dy[i, j] * (round(v) - v)
      else:
        q = min(max(c, 0), top) - zero
        ds[i, j // length] += dy[i, j] * q
        dm[i, j // length] -= dy[i, j]
  factor = 1 / np.sqrt(length * (top - zero))
  return dw, ds * factor, dm * factor


@pytest.mark.parametrize("rule", ["minimum", "absmax", "signed"])
def test_gradients_are_the_formulas(rule: grids.Rule) -> None:
  grid, rng = Grid(3, 16, rule), np.random.default_rng(3)
  w = rng.normal(size=(5, 32)).astype(np.float32)
  p = rtn.fit(w, grid).map(lambda x: (x * np.float16(0.6)).astype(np.float16))  # Some are clipped.
  dy = rng.normal(size=w.shape).astype(np.float32)

  def loss(w: jax.Array, scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    return (fq.fake_quant(w, scale, minimum, grid) * dy).sum()

  minimum = None if p.minimum is None else jnp.asarray(p.minimum, jnp.float32)
  got = jax.jit(jax.grad(loss, (0, 1, 2)))(w, jnp.asarray(p.scale, jnp.float32), minimum)
  want = by_hand(w, p, grid, dy)
  assert 0 < (want[0] == 0).mean() < 0.5  # Clipped ones get nothing, the others dy itself.
  np.testing.assert_array_equal(np.asarray(got[0]), want[0].astype(np.float32))
  np.testing.assert_allclose(got[1], want[1], rtol=2e-5, atol=1e-5)
  if minimum is not None:
    np.testing.assert_allclose(got[2], want[2], rtol=2e-5, atol=1e-5)


def test_fixed_codes_teach_the_grid() -> None:
  grid = Grid(4, 8, "minimum")
  c = np.arange(16).reshape(2, 8).astype(np.float32)
  scale, minimum = jnp.full((2, 1), 0.5), jnp.full((2, 1), 0.25)
  got = jax.grad(lambda s, m: fq.decode(c, s, m, grid).sum(), (0, 1))(scale, minimum)
  np.testing.assert_array_equal(got[0][:, 0], c.sum(axis=1))
  np.testing.assert_array_equal(got[1][:, 0], [-8, -8])


@pytest.mark.parametrize(
  "grid", [Grid(4, 8, "zero_point"), Grid(4, 8, "signed", "float32"), Grid(4, "tensor", "absmax")]
)
def test_grids_that_training_does_not_know(grid: Grid) -> None:
  with pytest.raises(ConfigError, match="training rounds to groups of a row"):
    fq.check_grid(grid)
