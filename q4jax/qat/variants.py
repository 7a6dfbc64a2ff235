"""The ways to train: which variables learn, and where their grids begin."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Checkpoint, floats
from q4jax.offline.blockwise import BLOCK_METHODS
from q4jax.offline.layerwise import LayerRunner
from q4jax.offline.scheme import check_source
from q4jax.qat.fake_quant import check_grid
from q4jax.qat.student import LoRA, Quantizer, Rounding, Student
from q4jax.quant.fits import FITS
from q4jax.quant.grid import Floats, Grid, GroupArray, Parameters, dequantize, quantize
from q4jax_kernels.kv_format import KVFormat

Variant = Literal["ptq", "ste_minmax", "ste_search", "lsq", "lsq_zero", "block_ap", "lora"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
Init = Literal["rtn", "mse", "hqq", "gptq"]
INITS: tuple[Init, ...] = get_args(Init)
ACTIVATIONS = ("float", "token", "observed")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a model is trained to be.

  Attributes:
    variant: ptq trains nothing; ste_minmax weights, on the min-max grid they have at each step;
      ste_search weights on the grid that `init` finds, which stays; lsq weights and scales
      (arXiv:1902.08153); lsq_zero minimums too, as real numbers; block_ap each block against its
      float output, then scales alone on fixed codes (EfficientQAT, arXiv:2407.11062); lora a
      low-rank update of frozen weights, rounded together with them, so that merging is exact.
    grid: of the matrices of all blocks. Embeddings and the head stay as they are.
    init: finds the first grid. With gptq each weight also moves to the nearest point that rounds to
      GPTQ's code.
    kv_bits: 8 or 4 to train over a cache rounded as that of `--kv_bits` (groups of 32); or 16.
    activations: of the blocks' products: float, or int8 with a range a token or an observed one.
    lora_rank, lora_alpha: B A counts lora_alpha / lora_rank times.
  """

  variant: Variant = "lsq"
  grid: Grid = dataclasses.field(default_factory=lambda: Grid(4, 128, "absmax"))
  init: Init = "mse"
  kv_bits: int = 16
  activations: str = "float"
  lora_rank: int = 16
  lora_alpha: float = 16.0

  def __post_init__(self) -> None:
    for name, known in (
      ("variant", VARIANTS), ("init", INITS), ("activations", ACTIVATIONS), ("kv_bits", (16, 8, 4)),
    ):  # fmt: skip
      if getattr(self, name) not in known:
        raise ConfigError(
          f"{name}={getattr(self, name)!r} is none of {', '.join(map(str, known))}."
        )
    check_grid(self.grid)
    if self.variant == "lsq_zero" and self.grid.rule != "minimum":
      raise ConfigError(
        f"lsq_zero learns minimums, and rule {self.grid.rule} has none; take rule minimum."
      )
    if self.variant == "ste_minmax" and self.init != "rtn":
      raise ConfigError(
        f"ste_minmax fits the grid itself; init={self.init} would be lost: take rtn."
      )
    if self.lora_rank < 1:
      raise ConfigError(f"lora_rank={self.lora_rank} must be at least 1.")

  @property
  def rounding(self) -> Rounding:
    cache = None if self.kv_bits == 16 else KVFormat(self.kv_bits, 32)
    return Rounding(
      self.grid,
      refit=self.variant == "ste_minmax",
      lora_scale=self.lora_alpha / self.lora_rank,
      keys=cache,
      values=cache,
      activations=self.activations,
    )


# Of a step, from its centre. GPTQ's codes make up for each other's errors. At 0.499 so many of them
# sit on an edge that one step of Adam undoes it (tiny, 4 bits: KL from 0.01 to 0.97).
_MARGIN = 0.4

Filter = Callable[[tuple, Any], bool]


def trained(recipe: Recipe) -> dict[str, Filter]:
  """What learns end to end, by the name of its learning rate: filters of Flax variables."""
  weights = recipe.variant in ("ste_minmax", "ste_search", "lsq", "lsq_zero")
  grids = {"lsq": ("scales",), "lsq_zero": ("scales", "minimums"), "block_ap": ("scales",)}

  def is_weight(path: tuple, variable: Any) -> bool:
    if isinstance(variable, LoRA):
      return recipe.variant == "lora"
    return weights and path[0] == "weights" and str(path[1]).startswith("blk.")

  def is_grid(path: tuple, variable: Any) -> bool:
    return isinstance(variable, Quantizer) and path[0] in grids.get(recipe.variant, ())

  return {"weights": is_weight, "quantizers": is_grid}


def float_weights(source: Checkpoint) -> dict[str, Floats]:
  """All parameters in float32.

  Raises:
    ConfigError: the source is quantised: there is nothing exact to learn from.
  """
  for tensor in source.tensors.values():
    check_source(tensor)
  return {name: floats(source, name) for name in source.tensors}


def on_grid(source: Checkpoint, grid: Grid) -> list[str]:
  """Names of the matrices that get the grid; ConfigError where its groups do not fit."""
  names = [n for n, t in source.tensors.items() if n.startswith("blk.") and len(t.shape) == 2]
  for name in names:
    grid.groups(source.tensors[name].shape)
  return names


def initial(
  source: Checkpoint, recipe: Recipe, tokens: NDArray[np.int32] | None = None, seed: int = 0
) -> Student:
  """A student before its first step: as PTQ by `recipe.init` would leave the model.

  Args:
    source: in float.
    recipe: see there.
    tokens: int32[B, T], what GPTQ watches flow.
    seed: of LoRA's A; B begins at 0.

  Raises:
    ConfigError: groups that do not fit, weights that are not finite, GPTQ without tokens.
  """
  names, weights = on_grid(source, recipe.grid), float_weights(source)
  parameters: dict[str, Parameters] = {}
  if recipe.init == "gptq":
    if tokens is None:
      raise ConfigError("init=gptq needs text that runs through the model.")
    for name, array in _gptq(source, tokens, recipe.grid):
      parameters[name] = array.parameters
      weights[name] = nearest_with_codes(weights[name], array)
  else:
    for name in names:
      parameters[name] = FITS[recipe.init](weights[name], recipe.grid)
  scales = {n: jnp.asarray(p.scale, jnp.float32) for n, p in parameters.items()}
  minimums = {
    n: jnp.asarray(p.minimum, jnp.float32) for n, p in parameters.items() if p.minimum is not None
  }
  lora = None
  if recipe.variant == "lora":
    keys = jax.random.split(jax.random.key(seed), len(names))
    lora = {
      n: _factors(weights[n].shape, recipe.lora_rank, k) for n, k in zip(names, keys, strict=True)
    }
  arrays = {n: jnp.asarray(w) for n, w in weights.items()}
  return Student(source.config, arrays, scales, minimums, recipe.rounding, lora)


def nearest_with_codes(w: Floats, array: GroupArray) -> Floats:
  """The weights nearest to w that round to the codes of `array`, a margin from where they would
  not: float32[N, K].

  So a student begins as GPTQ left the model, with each weight as near to where it was as is safe.
  """
  centre = array.dequantize()
  p, grid = array.parameters, array.grid
  step = np.abs(p.scale.astype(np.float32)).repeat(w.shape[1] // p.scale.shape[1], axis=1)
  moved = centre + np.clip(w - centre, -_MARGIN * step, _MARGIN * step)
  again = quantize(moved, grid, p).codes
  # Rounding may take a large minimum's neighbour; the centre itself is safe.
  safe: Floats = np.where(again == array.codes, moved, centre).astype(np.float32)
  return safe


def _gptq(source: Checkpoint, tokens: NDArray[np.int32], grid: Grid) -> Any:
  runner = LayerRunner(source, tokens)
  for _ in range(source.config.num_layers):
    prefix, block = runner.prefix, runner.read_block()
    for name, value in BLOCK_METHODS["gptq"](runner, block, grid).items():
      if isinstance(value, GroupArray):
        block[name] = jnp.asarray(value.dequantize())
        yield prefix + name, value
    runner.advance(block)


def _factors(shape: tuple[int, ...], rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  n, k = shape
  return jax.random.normal(key, (rank, k), jnp.float32) / k**0.5, jnp.zeros((n, rank), jnp.float32)


def variables(student: Student) -> Mapping[str, int]:
  """How many values of each kind a student has."""
  kinds = {"Param": nnx.Param, "Quantizer": Quantizer, "LoRA": LoRA}
  return {n: sum(x.size for x in jax.tree.leaves(nnx.state(student, k))) for n, k in kinds.items()}


__all__ = ["INITS", "VARIANTS", "Recipe", "dequantize", "initial", "trained"]
