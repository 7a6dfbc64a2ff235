"""matplotlib, drawing into files, where it is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from q4jax.errors import MissingDependencyError


def pyplot() -> Any:
  """matplotlib.pyplot, which draws into files. MissingDependencyError where it is not installed."""
  try:
    import matplotlib  # type: ignore[import-not-found,unused-ignore]
  except ImportError as error:
    raise MissingDependencyError(
      "plots need matplotlib, which is not installed. Install it: pip install 'q4jax[viz]'"
    ) from error
  matplotlib.use("Agg")
  from matplotlib import pyplot as found

  return found


@contextmanager
def figure(path: str, columns: int = 1, rows: int = 1, width: float = 5.5) -> Iterator[list[Any]]:
  """Axes to draw on, row by row; the figure is written to `path` at the end."""
  plt = pyplot()
  fig, axes = plt.subplots(rows, columns, figsize=(width * columns, 4 * rows), squeeze=False)
  try:
    yield list(axes.reshape(-1))
    fig.tight_layout()
    fig.savefig(path, dpi=90)
  finally:
    plt.close(fig)


def change_axis(axis: Any, **settings: Any) -> None:
  """An axis for changes of perplexity in per cent."""
  axis.axhline(0, color="grey", lw=0.8)
  axis.set(ylabel="change of perplexity, %", **settings)
  axis.grid(alpha=0.3)


def with_interval(axis: Any, x: list[float], records: list[dict[str, Any]], **style: Any) -> None:
  """A line of perplexity changes (stepping.measure), with bars of their intervals."""
  y = [100 * (r["ratio"] - 1) for r in records]
  low = [max(0.0, 100 * (r["ratio"] - r["ratio_low"])) for r in records]
  high = [max(0.0, 100 * (r["ratio_high"] - r["ratio"])) for r in records]
  axis.errorbar(x, y, [low, high], marker="o", capsize=3, markersize=4, **style)
