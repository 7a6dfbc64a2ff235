"""What a run says of itself: a line of JSON a step, and TensorBoard's events where it is there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Metrics:
  """Writes `folder`/metrics.jsonl, and events if tensorboardX is installed.

  Args:
    folder: made where it is missing.
    step: what is written already counts up to this step; later lines, of a run that was killed
      after its last checkpoint, are dropped.
  """

  def __init__(self, folder: Path, step: int):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    kept = []
    if step and path.exists():
      # The last line may be cut short.
      lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
      kept = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(kept))
    self._file = path.open("a")
    self._board = _tensorboard(folder, step)

  def write(self, record: Mapping[str, float]) -> None:
    """One step's values, among them `step`."""
    self._file.write(json.dumps(dict(record)) + "\n")
    self._file.flush()
    if self._board is not None:
      for name, value in record.items():
        if name != "step":
          self._board.add_scalar(name, value, int(record["step"]))

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    if self._board is not None:
      self._board.close()


def _tensorboard(folder: Path, step: int) -> Any:
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    return None
  return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
