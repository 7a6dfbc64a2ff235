"""Windows of a row of tokens, each step's a pure function of seed and step: nothing to resume."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import PromptError


@dataclass(frozen=True)
class Windows:
  """Random windows of a text.

  Attributes:
    row: int32[total], the text's tokens without BOS.
    start: int32[s], what each window begins with: BOS where the model wants it.
    ctx: tokens in a window, `start` included, that are read; one more is to be predicted.
    batch: windows in a step.
    seed: of the draws.
  """

  row: NDArray[np.int32]
  start: NDArray[np.int32]
  ctx: int
  batch: int
  seed: int

  def __post_init__(self) -> None:
    need = self.ctx + 1 - len(self.start)
    if len(self.row) < need or need < 1:
      raise PromptError(
        f"the text has {len(self.row)} tokens; a window of ctx={self.ctx} needs {need}. Give a "
        "longer text, or a smaller ctx."
      )

  @property
  def digest(self) -> str:
    """Of the text, to tell another one."""
    return hashlib.sha256(self.row.tobytes()).hexdigest()[:16]

  def __getitem__(self, step: int) -> NDArray[np.int32]:
    """int32[batch, ctx + 1]."""
    length = self.ctx + 1 - len(self.start)
    rng = np.random.default_rng((self.seed, step))
    begins = rng.integers(0, len(self.row) - length + 1, self.batch)
    rows = self.row[begins[:, None] + np.arange(length)]
    head = np.broadcast_to(self.start, (self.batch, len(self.start)))
    return np.concatenate([head, rows], axis=1).astype(np.int32)
