"""What a quantised model shall be: the format of each tensor, and the method that rounds it."""

from dataclasses import dataclass
from typing import Literal

from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import FLOAT_FORMATS, Tensor
from q4jax.quant.convert import block_format
from q4jax.quant.grid import Grid
from q4jax.quant.recipes import MIXES, mix_format

Method = Literal["rtn", "mse", "hqq", "gptq", "awq"]
# What needs text to run through the model while it is being quantised.
NEEDS_TEXT = ("gptq", "awq")
METHODS: tuple[Method, ...] = ("rtn", "mse", "hqq", "gptq", "awq")
HEADS = ("same", "q8_0", "q6_k", "keep")


@dataclass(frozen=True)
class Scheme:
  """How to quantise a model.

  Attributes:
    mix: one of llama.cpp's (`q4jax.quant.recipes.MIXES`); None for group-wise integers.
    grid: the integers, where mix is None.
    method: that finds them. The k-quants of a mix are always searched, by importance where there is
      one; the other types of a mix are rounded as ggml rounds them.
    head: format of the embedding table and the output matrix beside integers: "same" for the grid
      too, "keep" for the source's.
  """

  mix: str | None = None
  grid: Grid | None = None
  method: Method = "rtn"
  head: str = "q6_k"

  def __post_init__(self) -> None:
    if (self.mix is None) == (self.grid is None):
      raise ConfigError("a scheme has a mix or a grid, one of the two.")
    if self.mix is not None and self.mix not in MIXES:
      raise ConfigError(f"there is no type '{self.mix}'; choose int2..int8 or {', '.join(MIXES)}.")
    if self.method not in METHODS:
      raise ConfigError(f"method is '{self.method}'; choose one of {', '.join(METHODS)}.")
    if self.head not in HEADS:
      raise ConfigError(f"head is '{self.head}'; choose one of {', '.join(HEADS)}.")
    if self.mix is not None and self.method != "rtn":
      raise ConfigError(
        f"method '{self.method}' is for group-wise integers (--type=int4); {self.mix} has a search "
        "of its own, which --calibration guides."
      )

  def plan(self, tensor: Tensor, config: LlamaConfig, importance: bool) -> Grid | str:
    """What becomes of a tensor: integers of a grid, or a block or float format.

    Raises:
      ConfigError: the tensor cannot have what the scheme asks for; it says which would do.
    """
    if len(tensor.shape) == 1:
      return "f32"
    name, columns = tensor.name, tensor.shape[1]
    if self.mix is not None:
      return mix_format(self.mix, name, columns, config, importance)
    assert self.grid is not None
    if not name.startswith("blk.") and self.head != "same":
      return tensor.format if self.head == "keep" else _fitting(self.head, columns)
    self.grid.groups(tensor.shape)  # Raises where groups do not divide the rows.
    return self.grid

  def target(self, tensor: Tensor, config: LlamaConfig, importance: bool) -> Tensor:
    """The tensor as it will be stored."""
    plan = self.plan(tensor, config, importance)
    format = block_format(plan, tensor.shape[1]) if isinstance(plan, Grid) else plan
    return Tensor(tensor.name, tensor.shape, format)


def _fitting(format: str, columns: int) -> str:
  """The format, or the next wider one whose blocks divide rows of so many columns."""
  if format == "q6_k" and columns % 256:
    format = "q8_0"
  return format if columns % 32 == 0 else "f16"


def check_source(tensor: Tensor) -> None:
  """Refuses to quantise what is quantised already, but for the nearly exact Q8_0."""
  if len(tensor.shape) == 2 and tensor.format not in (*FLOAT_FORMATS, "q8_0"):
    raise ConfigError(
      f"'{tensor.name}' is {tensor.format} already: rounding it again loses more than rounding the "
      "original. Start from the f16, bf16 or f32 model, or give --requantize to do it anyway."
    )
