"""Calibration that a running model applies: parameters that are arguments of its programs.

A module with `Slots` rounds the inputs of its matrices, and keys and values, as records say
(q4jax/records.py):

  code = clip(round(x / scale) + zero_point, low, high)      x' = scale * (code - zero_point)

All parameters of a model are one array (docs/adr/0006), a row for each input and for each head of
keys and values. Programs take it as they take weights, so that other values need no other program.
A module without has `PLAIN` in place of slots, and neither the array nor the arithmetic.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

# The columns of a row. A scale of 0 leaves x as it is.
COLUMNS = ("scale", "zero_point", "low", "high")
Rows = tuple[tuple[str, int, int], ...]


class Calib(nnx.Variable):
  """Quantiser parameters found by watching: float32[R, 4], listed and saved, never trained."""


@dataclass(frozen=True)
class Plain:
  """In place of `Slots` where nothing is calibrated."""

  def input(self, name: str, x: jax.Array) -> jax.Array:
    return x

  def heads(self, name: str, x: jax.Array) -> jax.Array:
    return x


PLAIN = Plain()


class Slots(nnx.Module):
  """A block's part of the calibration, or the head's.

  Args:
    calib: that of the whole model, shared by all slots.
    rows: (name, first row, rows) of each stream.
  """

  def __init__(self, calib: Calib, rows: Rows):
    self.calib, self.rows = calib, rows

  def input(self, name: str, x: jax.Array) -> jax.Array:
    """What a matrix gets in place of x [B, T, K] (or [..., K])."""
    return fake_quant(x, self._of(name).reshape(4, *(1,) * x.ndim))

  def heads(self, name: str, x: jax.Array) -> jax.Array:
    """What the cache gets in place of keys or values x [B, T, K, H]."""
    return fake_quant(x, self._of(name).T.reshape(4, 1, 1, -1, 1))

  def _of(self, name: str) -> jax.Array:
    [(row, count)] = [(row, count) for found, row, count in self.rows if found == name]
    return self.calib.get_value()[row : row + count]


@jax.custom_jvp
def fake_quant(x: jax.Array, parameters: jax.Array) -> jax.Array:
  """x rounded by parameters [4, ...] (see COLUMNS), which broadcast with it; bit for bit where 0.

  The gradient passes x where it is in range (straight-through, arXiv 1308.3432) and nothing ever
  reaches the parameters.
  """
  scale, zero, low, high = parameters
  code = _code(x, scale, zero)
  rounded = scale * (jnp.clip(code, low, high) - zero)
  return jnp.where(scale > 0, rounded.astype(x.dtype), x)


@fake_quant.defjvp
def _fake_quant_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  (x, parameters), (dx, _) = primals, tangents
  scale, zero, low, high = parameters
  code = _code(x, scale, zero)
  passes = (scale <= 0) | ((code >= low) & (code <= high))
  return fake_quant(x, parameters), jnp.where(passes, dx, 0)


def _code(x: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
  return jnp.round(x.astype(jnp.float32) / jnp.where(scale > 0, scale, 1)) + zero
