"""The curves of experiments/kv_retrieval.py."""

from typing import Any

from experiments import plots

FAMILIES = {
  "attention of the last queries": ("threshold", "snapkv", "value_snap", "tova"),
  "attention of all queries": ("h2o", "scissorhands", "vatp"),
  "formulas": ("expected_attention", "cake", "morph", "lag_kv", "leverage", "cur"),
  "keys, values": ("knorm", "keydiff", "value_norm"),
  "baselines": ("streaming", "random"),
}
_COLOURS = ("tab:blue", "tab:green", "tab:orange", "tab:purple", "black")
_STYLES = ("-o", "--s", ":^", "-.D", "-x", "--+")


def plot(records: list[dict[str, Any]], path: str) -> None:
  """Accuracy against keep: a column for each task, a row for each mode, a line for each policy."""
  pyplot = plots.pyplot()
  tasks, modes = (list(dict.fromkeys(r[key] for r in records)) for key in ("task", "mode"))
  figure, axes = pyplot.subplots(
    len(modes), len(tasks), figsize=(11, 6.5), sharex=True, sharey=True, squeeze=False
  )
  for i, mode in enumerate(modes):
    for j, task in enumerate(tasks):
      axis = axes[i][j]
      mine = [r for r in records if (r["task"], r["mode"]) == (task, mode)]
      whole = [r["accuracy"] for r in mine if r["row"] == "f16"]
      for (_, names), colour in zip(FAMILIES.items(), _COLOURS, strict=True):
        for name, style in zip(names, _STYLES, strict=False):
          points = {r["keep"]: r["accuracy"] for r in mine if _is_curve(r) and r["policy"] == name}
          if not points:
            continue
          if whole:
            points[1.0] = whole[0]
          x = sorted(points)
          axis.plot(
            x, [points[k] for k in x], style, color=colour, label=name, markersize=4, linewidth=1.2
          )
      axis.set(title=f"{task}, {mode}", ylim=(-0.03, 1.03))
      axis.grid(alpha=0.3)
  for axis in axes[-1]:
    axis.set_xlabel("keep")
  for row in axes:
    row[0].set_ylabel("samples answered right")
  lines, labels = axes[0][0].get_legend_handles_labels()
  figure.legend(lines, labels, loc="center right", fontsize="small", frameon=False)
  figure.tight_layout(rect=(0, 0, 0.86, 1))
  figure.savefig(path, dpi=80)
  pyplot.close(figure)


def _is_curve(record: dict[str, Any]) -> bool:
  return record["policy"] is not None and record["row"].startswith("keep")
