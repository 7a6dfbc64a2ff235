r"""How far rounded weights are from real ones: methods x bits x group size x rule.

  python -m experiments.quant_error --out=experiments/results/quant_error.json

reads a float GGUF (the float16 twin of the packaged model by default), rounds each matrix of its
layers and measures the error of the weights themselves; no activations, no text. Writes JSON, and
beside it .md and, with matplotlib, .png: error by layer, and a row's weights over two grids.
About two minutes on two CPU cores.

  method   rtn (min-max), search (clipping with least squares), hqq (rule minimum only), rotated
           (Hadamard, then rtn; errors are of rotated weights, which have the same size)
  kquants  GGUF formats by q4jax.quant.kquants, as rows of their own

GPTQ and AWQ are not here: they lower the error of outputs, and raise this one.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app

import q4jax
from experiments import config_flags, plots
from experiments.config_flags import option
from experiments.experiment import Claim
from experiments.provenance import markdown, save
from q4jax.errors import ConfigError, MissingDependencyError
from q4jax.formats import checkpoint
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.quant import hqq, kquants, rtn, search
from q4jax.quant.error import WeightError, weight_error
from q4jax.quant.grid import Fit, Floats, Grid, fake_quant, quantize
from q4jax.quant.rotate import rotate
from q4jax_kernels.block_array import block_shape
from q4jax_kernels.block_formats import FORMATS

METHODS: dict[str, Fit] = {"rtn": rtn.fit, "search": search.fit, "hqq": hqq.fit, "rotated": rtn.fit}


@dataclasses.dataclass(frozen=True)
class Config:
  """What to round, and how."""

  model: str = option("experiments/tiny/tiny.f16.gguf", "A GGUF of float weights.")
  methods: tuple[str, ...] = option(("rtn", "search", "hqq", "rotated"), "See above.")
  bits: tuple[int, ...] = option((2, 3, 4, 5, 6, 8), "Bits of a code.")
  groups: tuple[str, ...] = option(
    ("8", "32", "128", "channel", "tensor"), "Weights that share a scale."
  )
  rules: tuple[str, ...] = option(("absmax", "signed", "minimum"), "Of scales; see quant/grid.py.")
  kquants: tuple[str, ...] = option(("q4_0", "q4_k", "q5_k", "q6_k", "q8_0"), "GGUF formats.")
  rows: int = option(128, "At most these rows of a matrix, evenly spaced; 0 for all.")
  out: str = option("", "File to write the records to, as JSON.")


def matrices(config: Config) -> dict[str, Floats]:
  """The matrices of the model's layers, float32[rows, K], by name."""
  out = {}
  with GGUFCheckpoint.open(config.model) as model:
    for name, tensor in model.tensors.items():
      if not name.startswith("blk.") or len(tensor.shape) != 2:
        continue
      if tensor.format not in checkpoint.FLOAT_FORMATS:
        raise ConfigError(
          f"--model={config.model}: {name} is {tensor.format}; errors are measured from floats."
        )
      step = max(1, tensor.shape[0] // config.rows) if config.rows else 1
      out[name] = checkpoint.floats(model, name)[::step]
      model.release(name)
  return out


def run(config: Config) -> list[dict[str, Any]]:
  """A record for each row of the table."""
  unknown = set(config.methods) - set(METHODS)
  if unknown:
    raise ConfigError(f"--methods: {', '.join(unknown)} is none of {', '.join(METHODS)}.")
  weights = matrices(config)
  records = []
  for row, measure in _rows(config):
    errors = {name: measure(w) for name, w in weights.items()}
    records.append({**row, **_mean(errors)})
    print(f"{list(row.values())}: {records[-1]['relative']:.4f}", file=sys.stderr, flush=True)
  return records


def _rows(config: Config) -> Iterator[tuple[dict[str, Any], Callable[[Floats], WeightError]]]:
  """What each row is, and how it measures a matrix."""
  for bits in config.bits:
    for group in config.groups:
      for rule in config.rules:
        size: Any = int(group) if group.isdigit() else group
        grid = Grid(bits, size, rule)  # type: ignore[arg-type]
        for method in config.methods:
          if method == "hqq" and rule != "minimum":
            continue
          row = {"method": method, "bits": bits, "group": group, "rule": rule}
          yield row, _measure(method, grid)
  for format in config.kquants:
    block, nbytes = block_shape(format)
    row = {"method": format, "bits": int(format[1]), "group": f"{block}", "rule": format[3:]}
    yield row, _measure_blocks(format, 8 * nbytes / block)


def _measure(method: str, grid: Grid) -> Callable[[Floats], WeightError]:
  def measure(w: Floats) -> WeightError:
    x = rotate(w) if method == "rotated" else w
    return weight_error(x, quantize(x, grid, METHODS[method](x, grid)))

  return measure


def _measure_blocks(format: str, bpw: float) -> Callable[[Floats], WeightError]:
  def measure(w: Floats) -> WeightError:
    form = FORMATS[format]
    blocks = kquants.quantize(w, format).reshape(len(w), -1, form.block_bytes)
    return weight_error(w, form.dequantize(blocks, np).reshape(w.shape), bits_per_weight=bpw)

  return measure


def _mean(errors: dict[str, WeightError]) -> dict[str, Any]:
  """Means over matrices, each of which counts the same; and `layers`, by layer."""

  def mean(pick: Callable[[WeightError], float | None]) -> float | None:
    values = [pick(e) for e in errors.values()]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None

  layers: dict[int, list[float]] = {}
  for name, e in errors.items():
    layers.setdefault(int(name.split(".")[1]), []).append(e.relative)
  return {
    "relative": mean(lambda e: e.relative),
    "relative_l2": mean(lambda e: e.relative_l2),
    "snr_db": mean(lambda e: e.snr_db),
    "clipped": mean(lambda e: None if e.clipping is None else e.clipping / (e.mse or 1)),
    "bpw": mean(lambda e: e.bpw),
    "layers": [float(np.mean(layers[layer])) for layer in sorted(layers)],
  }


def table(records: list[dict[str, Any]]) -> list[list[str]]:
  """Rows for Markdown."""
  head = ["method", "bits", "group", "rule", "bpw", "relative", "l2", "SNR dB", "clipped"]
  return [head] + [
    [
      r["method"],
      str(r["bits"]),
      r["group"],
      r["rule"],
      f"{r['bpw']:.3f}",
      f"{100 * r['relative']:.2f} %",
      f"{100 * r['relative_l2']:.2f} %",
      f"{r['snr_db']:.2f}",
      "" if r["clipped"] is None else f"{100 * r['clipped']:.1f} %",
    ]
    for r in records
  ]


def claim(records: list[dict[str, Any]]) -> str:
  """One sentence on the reference table's figures; empty where the rows it needs were not run."""
  parts = []
  for bits, claimed in ((8, 1.2), (4, 5.8)):
    mine = {r["group"]: r["relative"] for r in records
            if (r["method"], r["bits"], r["rule"]) == ("rtn", bits, "absmax")}  # fmt: skip
    if not {"tensor", "channel", "32"} <= set(mine):
      return ""
    found = " / ".join(f"{100 * mine[group]:.2f}" for group in ("tensor", "channel", "32"))
    parts.append(f"INT{bits} {found} % (claimed {claimed} %)")
  return (
    "Average relative error of plain symmetric rounding, one scale a tensor / channel / 32 "
    f"weights: {', '.join(parts)}; the steps of the two are as 127 to 7, so that no one way of "
    "sharing scales gives both claims."
  )


def plot(records: list[dict[str, Any]], path: str, config: Config = Config()) -> None:
  """Left: error by layer. Right: a row's weights and the grids that two methods put over them."""
  with plots.figure(path, columns=2, width=6) as (left, right):
    for r in records:
      if r["bits"] in (4, 8) and r["group"] in ("128", "256") and r["rule"] in ("minimum", "k"):
        label = f"{r['method']} {r['bits']} bits, {r['bpw']:.2f} bpw"
        left.semilogy([100 * e for e in r["layers"]], "o-", label=label)
    left.set(title="groups of 128, with a minimum", xlabel="layer", ylabel="relative error, %")
    left.set_xticks(range(len(records[0]["layers"])))
    if left.lines:
      left.legend(fontsize="small")
    name, w = next((n, w) for n, w in matrices(config).items() if "ffn_down" in n)
    right.hist(w[0], bins=100, color="lightgrey")
    for (method, height), color in zip((("rtn", 0.9), ("search", 0.8)), ("C0", "C1"), strict=True):
      grid = Grid(4, "channel", "signed")
      points = np.unique(fake_quant(w[:1], grid, METHODS[method](w[:1], grid)))
      for i, point in enumerate(points):
        right.axvline(
          point, ymax=height, color=color, lw=1, label=None if i else f"{method}, 4 bits"
        )
    right.set(
      title=f"{name}, row 0: weights and the points in use", xlabel="weight", ylabel="count"
    )
    right.legend(fontsize="small")


def quick() -> list[Config]:
  """4 and 8 bits, half a minute."""
  return [Config(methods=("rtn", "search"), bits=(4, 8), kquants=("q4_k", "q8_0"), rows=32)]


def full() -> list[Config]:
  """The whole table, of all rows of every matrix."""
  return [Config(rows=0)]


def _plain(bits: int) -> Callable[[list[dict[str, Any]]], float | None]:
  def measure(records: list[dict[str, Any]]) -> float | None:
    found = [r for r in records if (r["method"], r["bits"], r["group"], r["rule"])
             == ("rtn", bits, "32", "absmax")]  # fmt: skip
    return 100 * found[0]["relative"] if found else None

  return measure


CLAIMS = tuple(
  Claim(
    f"quantisation error, INT{bits}", claimed, "%",
    "mean relative error of weights, plain symmetric rounding in groups of 32", _plain(bits),
    "the steps of 8 and 4 bits are as 1 to 18, so no one way of sharing scales gives both claims",
  )
  for bits, claimed in ((8, 1.2), (4, 5.8))
)  # fmt: skip
VERSION = 1


def main(_: list[str]) -> None:
  config = config_flags.read(Config)
  try:
    records = run(config)
  except (q4jax.Q4JaxError, OSError) as error:
    raise app.UsageError(str(error)) from error
  text = f"{markdown(table(records))}\n\n{claim(records)}".strip() + "\n"
  print(text)
  if not config.out:
    return
  save(config.out, config, records)
  Path(config.out).with_suffix(".md").write_text(text)
  try:
    plot(records, str(Path(config.out).with_suffix(".png")), config)
  except MissingDependencyError as error:
    print(f"no plot: {error}", file=sys.stderr)


if __name__ == "__main__":
  config_flags.define(Config)
  app.run(main)
