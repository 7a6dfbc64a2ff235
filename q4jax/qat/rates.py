"""Learning rates in the measure that counts: how far a weight may go, in steps of its grid."""

import numpy as np

from q4jax.qat.student import Student

# Of the median step, by bits: found on `tiny` by runs of 40 to 120 steps; a model with weights a
# quarter the size wanted rates a quarter the size. Two bits forgive more, and have further to go.
_WEIGHTS, _QUANTIZERS = {2: 0.01}, {2: 0.002}
_USUAL = 0.006, 0.0007
# A low-rank update spreads a step over its factors.
LORA = 5.0


def suited(student: Student) -> tuple[float, float]:
  """AdamW's rates for a student before its first step: of weights (or of LoRA's factors), and of
  scales and minimums.

  Adam moves each value by about its rate at a step, whatever the gradient. More than a hundredth of
  a step of the grid, and so many weights change their codes at once that what GPTQ or a search had
  found is lost before training wins it back.
  """
  bits = student.rounding.grid.bits
  medians = [np.median(np.abs(np.asarray(s.get_value()))) for s in student.scales.values()]
  step = float(np.median(medians))
  weights = _WEIGHTS.get(bits, _USUAL[0]) * step * (LORA if student.lora_a else 1)
  return weights, _QUANTIZERS.get(bits, _USUAL[1]) * step
