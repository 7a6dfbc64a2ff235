"""Learning rates in the measure that counts: how far a weight may go, in steps of its grid."""

import dataclasses
from typing import Any, TypeVar

import numpy as np

from q4jax.qat.student import Student

# Of weights, and of scales and minimums, in shares of the median step, by bits; found on `tiny` by
# runs of 40 to 120 steps. Two bits forgive more, and have further to go.
_SHARES = {2: (0.01, 0.002)}
_USUAL = (0.006, 0.0007)
# A low-rank update spreads a step over its factors.
LORA = 5.0

C = TypeVar("C")


def suited(student: Student) -> tuple[float, float]:
  """AdamW's rates for a student before its first step: of weights (or of LoRA's factors), and of
  scales and minimums.

  Adam moves each value by about its rate at a step, whatever the gradient. More than a hundredth of
  a step of the grid, and so many weights change their codes at once that what GPTQ or a search had
  found is lost before training wins it back.
  """
  medians = [np.median(np.abs(np.asarray(s.get_value()))) for s in student.scales.values()]
  step = float(np.median(medians))
  weights, quantizers = _SHARES.get(student.rounding.grid.bits, _USUAL)
  return weights * step * (LORA if student.lora_a else 1), quantizers * step


def with_rates(config: C, student: Student) -> C:
  """The config (of the trainer, or of Block-AP) with `suited` rates where it has None."""
  names = ("weight_rate", "quantizer_rate")
  given: dict[str, Any] = {name: getattr(config, name) for name in names}
  found = dict(zip(names, suited(student), strict=True))
  return dataclasses.replace(  # type: ignore[type-var]
    config, **{name: found[name] if rate is None else rate for name, rate in given.items()}
  )
