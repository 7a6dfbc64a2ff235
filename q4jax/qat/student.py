"""The model in training: float weights, the parameters of their grids, and what else it learns.

Everything is a Flax variable of a kind of its own, listed by `nnx.state(student, Quantizer)` and
the like; which kinds are trained, a variant says (variants.py). A call builds the `Llama` with
weights that are rounded on the way, so that a gradient finds its way back to all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from q4jax.config import LlamaConfig
from q4jax.model.layers import Matmul, Weight
from q4jax.model.llama import Llama
from q4jax.qat import fake_quant as fq
from q4jax.quant.grid import Grid
from q4jax_kernels import kv_format
from q4jax_kernels.kv_format import KVFormat

Arrays = Mapping[str, jax.Array]


class Quantizer(nnx.Variable):
  """A scale or minimum of a grid, float32[N, G] before it is rounded to float16."""


class Observed(nnx.Variable):
  """The largest magnitude of a matrix's input, float32[]: the range of its int8 activations."""


class LoRA(nnx.Param):
  """A factor of a low-rank update: A float32[r, K] or B float32[N, r]."""


@dataclass(frozen=True)
class Rounding:
  """What is rounded while a student runs.

  Attributes:
    grid: of the matrices that have quantisers.
    refit: whether their grid is the min-max grid of the current weights.
    fixed_codes: whether `weights` holds codes instead, so that only their grid can learn.
    lora_scale: factor of B A.
    keys, values: formats of the KV cache; None for floats.
    activations: of matmuls with such matrices: "float", "token" (int8, a range a token), or
      "observed" (int8, the range of `Observed`).
    dtype: of the operands of matrix products.
  """

  grid: Grid
  refit: bool = False
  fixed_codes: bool = False
  lora_scale: float = 1.0
  keys: KVFormat | None = None
  values: KVFormat | None = None
  activations: str = "float"
  dtype: DTypeLike = jnp.float32


class Student(nnx.Module):
  """See the module.

  Args:
    config: of the model.
    weights: all parameters, float32, by GGUF name.
    scales, minimums: of matrices on the grid; minimums only where its rule has them.
    rounding: see there.
    lora: pairs (A, B) by the matrix's name.
    observed: ranges by the number of a matmul, in the order in which they run.
  """

  def __init__(
    self,
    config: LlamaConfig,
    weights: Arrays,
    scales: Arrays,
    minimums: Arrays,
    rounding: Rounding,
    lora: Mapping[str, tuple[jax.Array, jax.Array]] | None = None,
    observed: Arrays | None = None,
  ):
    fq.check_grid(rounding.grid)
    self.config, self.rounding = config, rounding
    self.weights = nnx.Dict({n: nnx.Param(w) for n, w in weights.items()})
    self.scales = nnx.Dict({n: Quantizer(s) for n, s in scales.items()})
    self.minimums = nnx.Dict({n: Quantizer(m) for n, m in minimums.items()})
    self.lora_a = nnx.Dict({n: LoRA(a) for n, (a, _) in (lora or {}).items()})
    self.lora_b = nnx.Dict({n: LoRA(b) for n, (_, b) in (lora or {}).items()})
    self.observed = nnx.Dict({n: Observed(x) for n, x in (observed or {}).items()})

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Logits int32[B, T] -> float32[B, T, V]."""
    return Llama(self.config, lambda name, _: self.weight(name), self._matmul())(tokens)

  def weight(self, name: str) -> Weight:
    """A parameter as the forward pass sees it: rounded if it has a grid."""
    if name not in self.scales:
      return self.weights[name].get_value()
    w, (scale, minimum) = self.merged(name), self.parameters(name)
    if self.rounding.fixed_codes:
      return fq.decode(w, scale, minimum, self.rounding.grid)
    return fq.fake_quant(w, scale, minimum, self.rounding.grid)

  def merged(self, name: str) -> jax.Array:
    """A matrix before it is rounded, its low-rank update added."""
    w = self.weights[name].get_value()
    if name not in self.lora_a:
      return w
    a, b = self.lora_a[name].get_value(), self.lora_b[name].get_value()
    product = jnp.dot(b, a, precision=jax.lax.Precision.HIGHEST)
    return w + self.rounding.lora_scale * product

  def parameters(self, name: str) -> tuple[jax.Array, jax.Array | None]:
    """Scale and minimum of a matrix's grid."""
    if self.rounding.refit:
      return fq.min_max(self.merged(name), self.rounding.grid)
    minimum = self.minimums[name].get_value() if name in self.minimums else None
    return self.scales[name].get_value(), minimum

  def _matmul(self) -> "RoundedMatmul":
    r = self.rounding
    ranges = {n: jax.lax.stop_gradient(x.get_value()) for n, x in self.observed.items()}
    products = 4 * self.config.num_layers
    return RoundedMatmul(r.dtype, None, r.keys, r.values, r.activations, products, ranges)


@dataclass(frozen=True)
class RoundedMatmul(Matmul):
  """Products of activations that are rounded to int8, over keys and values rounded as a cache's.

  The head's input stays in float, as its matrix does.
  """

  keys: KVFormat | None = None
  values: KVFormat | None = None
  activations: str = "float"
  products: int = 0  # The first ones, which are rounded: those of the blocks.
  ranges: Arrays = field(default_factory=dict)
  seen: list[jax.Array] = field(default_factory=list)  # The largest magnitude of each input.

  def __call__(self, x: jax.Array, weights: list[nnx.Variable]) -> list[jax.Array]:
    if self.activations != "float" and len(self.seen) < self.products:
      number = f"{len(self.seen):05}"
      self.seen.append(jnp.max(jnp.abs(x)))
      if self.activations == "token":
        x = int8(x, jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True))
      elif number in self.ranges:
        x = int8(x, self.ranges[number].reshape((1,) * x.ndim))
    return super().__call__(x, weights)

  def attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """See `Matmul.attention`."""
    return super().attention(q, _round_trip(k, self.keys), _round_trip(v, self.values))


def int8(x: jax.Array, largest: jax.Array) -> jax.Array:
  """x on 255 steps of -largest..largest: gradient 1 inside, 0 where it is clipped."""
  step = largest * np.float32(1 / 127)
  q = x / jnp.where(step > 0, step, 1)
  inside = jnp.abs(q) <= 127.5
  y = jnp.clip(jnp.round(q), -127, 127) * step
  passed = jnp.where(inside, x, jax.lax.stop_gradient(x))
  return _straight_through(y, passed)


def _round_trip(x: jax.Array, format: KVFormat | None) -> jax.Array:
  """As it would be read from a cache of that format; the gradient is the identity's."""
  if format is None:
    return x
  if format.is_float:
    y = kv_format.to_float(x, format).astype(x.dtype)
  else:
    y = kv_format.dequantize(*kv_format.quantize(x, format), format).astype(x.dtype)
  return _straight_through(y, x)


@jax.custom_jvp
def _straight_through(y: jax.Array, x: jax.Array) -> jax.Array:
  """The value y with the gradient of x."""
  return y


@_straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  return primals[0], tangents[1]


def observe(student: Student, tokens: jax.Array) -> dict[str, jax.Array]:
  """The ranges of all inputs but the head's over int32[B, T], as `Student` takes them."""
  products = 4 * student.config.num_layers
  matmul = RoundedMatmul(student.rounding.dtype, activations="watch", products=products)
  Llama(student.config, lambda name, _: student.weight(name), matmul)(tokens)
  return {f"{i:05}": x for i, x in enumerate(matmul.seen)}


def finished(student: Student) -> Student:
  """The same model at rest: low-rank updates merged, and grids that follow the weights fixed."""
  names, r = list(student.scales), student.rounding
  if not (r.refit or student.lora_a):
    return student
  graph, state = nnx.split(student)

  @jax.jit
  def settle(state: nnx.State) -> tuple[dict, dict]:
    s = nnx.merge(graph, state)
    return {n: s.merged(n) for n in names}, {n: s.parameters(n) for n in names}

  merged, grids = settle(state)
  weights = {n: w.get_value() for n, w in student.weights.items()} | merged
  return Student(
    student.config,
    weights,
    {n: scale for n, (scale, _) in grids.items()},
    {n: minimum for n, (_, minimum) in grids.items() if minimum is not None},
    replace(r, refit=False),
    observed={n: x.get_value() for n, x in student.observed.items()},
  )


def with_rounding(student: Student, **changes: object) -> Student:
  """The same variables, rounded otherwise."""
  graph, state = nnx.split(student)
  new = nnx.merge(graph, state)
  new.rounding = replace(student.rounding, **changes)  # type: ignore[arg-type]
  return new
