"""The grid of `q4jax.quant.grid` inside a differentiated, compiled program: the same bits.

Rounding has no useful gradient, so that of the nearest point of the grid is by convention (LSQ,
arXiv:1902.08153, and the straight-through estimator, arXiv:1308.3432). With v = w / scale or
(w + minimum) / scale, c the nearest code, z the code of 0, L weights to a scale:

                      nearest code on the grid     off it: clipped to c
  d w' / d w          1                            0
  d w' / d scale      (c - z) - v                  c - z
  d w' / d minimum    0                            -1

The last two are summed over a group and multiplied by 1 / sqrt(L * Qp), Qp the largest c - z. A
weight is clipped where its *rounded* code is off the grid; the paper clips before it rounds, which
differs in the outer half step alone.

Scales and minimums are kept in float32 and rounded to float16 here, with the gradient of the
identity. Products of a code and a float16 are exact in float32, so that it does not matter whether
XLA contracts scale * code - minimum into one operation.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.errors import ConfigError
from q4jax.quant.grid import Grid

_NORMAL = np.float32(2.0**-14)  # The smallest normal float16.
_STEP = np.float32(2.0**-24)  # Its smallest subnormal.


def check_grid(grid: Grid) -> None:
  """Raises ConfigError for a grid that training does not know."""
  if grid.rule == "zero_point" or grid.scale_dtype != "float16" or grid.group_size == "tensor":
    raise ConfigError(
      f"training rounds to groups of a row, by rule signed, absmax or minimum, with float16 scales;"
      f" the grid has group_size={grid.group_size}, rule {grid.rule}, {grid.scale_dtype} scales."
    )


@jax.custom_jvp
def stored(x: jax.Array) -> jax.Array:
  """Float32 as a float16 holds it, in float32; 0 only where x is 0. Its gradient is 1."""
  # Not two casts: XLA may drop them as excess precision. reduce_precision flushes subnormals.
  narrow = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
  narrow = jnp.where(jnp.abs(x) < _NORMAL, jnp.round(x * (1 / _STEP)) * _STEP, narrow)
  return jnp.where((narrow == 0) & (x != 0), jnp.copysign(_STEP, x), narrow)


@stored.defjvp
def _stored_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  return stored(primals[0]), tangents[0]


def min_max(w: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array | None]:
  """Scale and minimum float32[N, G] of the weights' range, as `rtn.fit` but for an ulp.

  They are rounded to float16 already, and no gradient flows through them.
  """
  x = _split(jax.lax.stop_gradient(w), grid)
  low, high = x.min(axis=-1), x.max(axis=-1)
  if grid.rule == "minimum":
    minimum = stored(-low)
    return stored(jnp.maximum(high + minimum, 0) / np.float32(grid.top)), minimum
  if grid.rule == "absmax":
    return stored(jnp.maximum(-low, high) / np.float32(grid.half - 1)), None
  return stored(jnp.where(-low > high, low, high) / np.float32(-grid.half)), None


def codes(w: jax.Array, scale: jax.Array, minimum: jax.Array | None, grid: Grid) -> jax.Array:
  """The nearest codes, uint8[N, K], of w float32[N, K]; scale and minimum float32[N, G]."""
  c = _nearest(_split(w, grid), scale, minimum, grid)[1]
  return jnp.clip(c, 0, grid.top).astype(jnp.uint8).reshape(w.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def fake_quant(w: jax.Array, scale: jax.Array, minimum: jax.Array | None, grid: Grid) -> jax.Array:
  """Weights as the quantised matrix has them: float32[N, K].

  Args:
    w: float32[N, K].
    scale: float32[N, G], not yet rounded.
    minimum: float32[N, G] under rule "minimum", else None.
    grid: see `check_grid`.
  """
  c = jnp.clip(_nearest(_split(w, grid), scale, minimum, grid)[1], 0, grid.top)
  return decode(c.reshape(w.shape), scale, minimum, grid)


def decode(c: jax.Array, scale: jax.Array, minimum: jax.Array | None, grid: Grid) -> jax.Array:
  """What codes stand for, float32[N, K]; differentiable in scale and minimum for fixed codes."""
  x, step = _split(c.astype(jnp.float32), grid), stored(scale)[..., None]
  y = step * (x - _zero(grid)) if minimum is None else step * x - stored(minimum)[..., None]
  return y.reshape(c.shape)


def _forward(
  w: jax.Array, scale: jax.Array, minimum: jax.Array | None, grid: Grid
) -> tuple[jax.Array, tuple]:
  return fake_quant(w, scale, minimum, grid), (w, scale, minimum)


def _backward(
  grid: Grid, saved: tuple, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  w, scale, minimum = saved
  v, c = _nearest(_split(w, grid), scale, minimum, grid)
  g, inside = _split(dy, grid), (c >= 0) & (c <= grid.top)
  q = jnp.clip(c, 0, grid.top) - _zero(grid)
  largest = grid.top - float(_zero(grid))
  factor = 1 / (v.shape[-1] * largest) ** 0.5
  d_scale = (g * jnp.where(inside, q - v, q)).sum(axis=-1) * factor
  d_minimum = None
  if minimum is not None:
    d_minimum = -(g * ~inside).sum(axis=-1) * factor
  return (g * inside).reshape(w.shape), d_scale, d_minimum


fake_quant.defvjp(_forward, _backward)


def _nearest(
  x: jax.Array, scale: jax.Array, minimum: jax.Array | None, grid: Grid
) -> tuple[jax.Array, jax.Array]:
  """v (see the module) and the nearest codes, not clipped, of groups [N, G, L]."""
  step = stored(scale)[..., None]
  if minimum is not None:
    x = x + stored(minimum)[..., None]
  v = x / jnp.where(step == 0, jnp.float32(jnp.inf), step)
  return v, jnp.round(v) + _zero(grid)


def _zero(grid: Grid) -> np.float32:
  return np.float32(grid.half if grid.symmetric else 0)


def _split(x: jax.Array, grid: Grid) -> jax.Array:
  return x.reshape(*grid.groups(x.shape), -1)
