r"""Weights: methods x bits x group sizes, what each costs in bits and in quality.

  python -m experiments.group_size
  python -m experiments.group_size --bits=4,3,2 --group_sizes=32,64,128,channel --chunks=40
  python -m experiments.group_size --model=babyllama361-f32.gguf --file=tinystories.txt --ctx=256 \
    --calibration_text=tinystories_b.txt --group_sizes=8,16,32

For each method, number of bits, group size and rule (symmetric: absmax; asymmetric: minimum) the
matrices of all layers are quantised, embeddings and norms left as they are, and the model's
predictions for --file are compared with the float model's: perplexity, KL divergence, top-1.

  rtn      from the smallest to the largest weight      hqq    least |error|^0.7, asymmetric alone
  mse      searched for least squared error             awq    inputs scaled by what text shows
  imatrix  the same, weighted by mean squared inputs    gptq   errors made up for, one by one

Weights are multiplied with float activations, so that rows differ by their weights alone. The error
is |w - w'| / |w|, not given for awq, whose weights are scaled. "recovered" is the share of rtn's KL
that a method takes away. Expected on `tiny` at 4 bits in groups of 128: rtn costs 3-4 % of
perplexity, gptq under 1 %. 30 minutes on two cores for 4 bits; --methods=rtn,mse takes 2. Writes
--out as JSON, Markdown and a plot.
"""

import dataclasses
import functools
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from numpy.typing import NDArray

from experiments import provenance
from q4jax.compare import Reference
from q4jax.formats.checkpoint import Checkpoint, floats
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.formats.open import open_checkpoint
from q4jax.loading import load_checkpoint
from q4jax.offline.layerwise import SHARED, LayerRunner, input_of
from q4jax.offline.quantize import quantize_model
from q4jax.offline.scheme import NEEDS_TEXT, Scheme
from q4jax.offline.sequences import sequences
from q4jax.quant.error import weight_error
from q4jax.quant.grid import Grid
from q4jax.quant.observers import Moments

METHODS = ("rtn", "mse", "imatrix", "hqq", "awq", "gptq")
RULES = ("absmax", "minimum")


@dataclasses.dataclass(frozen=True)
class Config:
  """One row of the table, but for the text: see the flags."""

  model: str = "experiments/tiny/tiny.f16.gguf"
  file: str = "q4jax/data/held_out.txt"
  calibration_text: str = "q4jax/data/calibration.txt"
  method: str = "rtn"
  bits: int = 4
  group_size: int | str = 128
  rule: str = "absmax"
  ctx: int = 512
  chunks: int = 40
  sequences: int = 64
  seed: int = 0


def run(config: Config) -> list[dict[str, Any]]:
  """One record."""
  source, reference, tokens = _prepared(
    config.model, config.file, config.calibration_text,
    config.ctx, config.chunks, config.sequences, config.seed,
  )  # fmt: skip
  grid = Grid(config.bits, config.group_size, config.rule)  # type: ignore[arg-type]
  made = MemoryCheckpoint(source.config, source.metadata)
  method: Any = "mse" if config.method == "imatrix" else config.method
  importance = None
  if config.method == "imatrix":
    importance = _importance(config.model, config.calibration_text, config.ctx, config.sequences,
                             config.seed, config.file, config.chunks)  # fmt: skip
  begin = time.perf_counter()
  quantize_model(
    source,
    lambda _: made,
    Scheme(grid=grid, method=method, head="keep"),
    importance=importance,
    tokens=tokens if method in NEEDS_TEXT else None,
  )
  seconds = time.perf_counter() - begin
  matrices = [n for n, t in source.tensors.items() if n.startswith("blk.") and len(t.shape) == 2]
  error = None
  if method != "awq":
    errors = [weight_error(floats(source, n), floats(made, n)).relative_l2 for n in matrices]
    error = float(np.mean(errors))
  result = reference.compare(_float_model(made))
  factor = 16 * (1 if grid.symmetric else 2)
  weights = sum(floats(source, n).size for n in matrices)
  groups = sum(int(np.prod(grid.groups(source.tensors[n].shape))) for n in matrices)
  return [
    {
      **dataclasses.asdict(config),
      "bpw": config.bits + factor * groups / weights,
      "relative_l2": error,
      "ppl": result.ppl,
      "reference_ppl": result.reference_ppl,
      "ppl_change": result.ratio - 1,
      "ppl_change_stderr": result.ratio_stderr,
      "kl": result.kl,
      "kl_stderr": result.kl_stderr,
      "top1": result.top1,
      "seconds": round(seconds, 3),
    }
  ]


@functools.lru_cache(1)
def _prepared(
  model: str, file: str, calibration: str, ctx: int, chunks: int, count: int, seed: int
) -> tuple[Checkpoint, Reference, NDArray[np.int32]]:
  source = open_checkpoint(model)
  reference = Reference(_float_model(source), Path(file).read_text(), ctx, chunks)
  return source, reference, sequences(source, Path(calibration).read_text(), ctx, count, seed)


def _float_model(source: Checkpoint) -> Any:
  """The model with all weights in float32: no rounding of activations."""
  plain = MemoryCheckpoint(source.config, source.metadata)
  for name, tensor in source.tensors.items():
    values = floats(source, name)
    rows = np.ascontiguousarray(values.reshape(tensor.num_rows, -1)).view(np.uint8)
    plain.write(dataclasses.replace(tensor, format="f32"), rows)
  return load_checkpoint(plain)


@functools.lru_cache(1)
def _importance(
  model: str, calibration: str, ctx: int, count: int, seed: int, file: str, chunks: int
) -> dict[str, NDArray[np.float32]]:
  """Mean squares of the inputs of all layers' matrices."""
  source, _, tokens = _prepared(model, file, calibration, ctx, chunks, count, seed)
  runner, found = LayerRunner(source, tokens), {}
  for _ in range(source.config.num_layers):
    prefix, watches = runner.prefix, dict[str, Moments]()

    def visit(flow: Any, watches: dict[str, Moments] = watches) -> None:
      for name, x in flow.inputs.items():
        watches[name] = watches.get(name, Moments.init(x.shape[-1])).update(x)

    runner.advance(runner.read_block(), visit)
    for shared in SHARED:
      found[input_of(f"{prefix}{shared[0]}.weight")] = watches[shared[0]].mean_square()
  return found


def configs(base: Config, bits: list[int], sizes: list[int | str], methods: list[str],
            rules: list[str]) -> list[Config]:  # fmt: skip
  """All rows of the table, those that exist: HQQ needs a minimum."""
  return [
    dataclasses.replace(base, bits=b, group_size=g, rule=r, method=m)
    for b, g, r, m in itertools.product(bits, sizes, rules, methods)
    if not (m == "hqq" and r != "minimum")
  ]


def table(records: list[dict[str, Any]]) -> str:
  """Markdown."""
  rows = [["bits", "group", "rule", "method", "bpw", "error", "perplexity", "KL", "top-1",
           "recovered", "s"]]  # fmt: skip
  for r in records:
    same = ("bits", "group_size", "rule", "model")
    base = [x for x in records if x["method"] == "rtn" and all(x[k] == r[k] for k in same)]
    recovered = f"{100 * (1 - r['kl'] / base[0]['kl']):.0f} %" if base and r not in base else ""
    rows.append(
      [
        str(r["bits"]),
        str(r["group_size"]),
        r["rule"],
        r["method"],
        f"{r['bpw']:.3f}",
        "" if r["relative_l2"] is None else f"{100 * r['relative_l2']:.2f} %",
        f"{100 * r['ppl_change']:+.2f} ± {100 * r['ppl_change_stderr']:.2f} %",
        f"{r['kl']:.5f} ± {r['kl_stderr']:.5f}",
        f"{100 * r['top1']:.2f} %",
        recovered,
        f"{r['seconds']:.1f}",
      ]
    )
  return provenance.markdown(rows) + "\n"


def plot(records: list[dict[str, Any]], path: Path) -> None:
  """KL against bits a weight, a line for each method and rule."""
  from matplotlib.figure import Figure

  bits = sorted({r["bits"] for r in records})
  figure = Figure(figsize=(5 * len(bits), 4.2), layout="constrained")
  every = figure.subplots(1, len(bits), squeeze=False, sharey=True)[0]
  colors = {m: f"C{i}" for i, m in enumerate(METHODS)}
  for axes, b in zip(every, bits, strict=True):
    for method, rule in itertools.product(METHODS, RULES):
      points = sorted(
        (r["bpw"], r["kl"])
        for r in records
        if (r["bits"], r["method"], r["rule"]) == (b, method, rule)
      )
      if points:
        axes.plot(
          *zip(*points, strict=True),
          marker="o" if rule == "absmax" else "s",
          linestyle="-" if rule == "absmax" else "--",
          color=colors[method],
          label=f"{method}, {rule}",
        )
    axes.set(xlabel="bits a weight", title=f"{b} bits", yscale="log")
  every[0].set_ylabel("KL divergence from the float model, nats")
  every[-1].legend(fontsize="small")
  figure.savefig(path, dpi=120)


def _size(text: str) -> int | str:
  return int(text) if text.isdigit() else text


def main(_: list[str]) -> None:
  f = flags.FLAGS
  base = Config(
    f.model, f.file, f.calibration_text, ctx=f.ctx, chunks=f.chunks, sequences=f.sequences,
    seed=f.seed,
  )  # fmt: skip
  todo = configs(
    base, [int(b) for b in f.bits], [_size(g) for g in f.group_sizes], f.methods, f.rules
  )
  records = []
  for i, config in enumerate(todo):
    records += run(config)
    r = records[-1]
    print(f"{i + 1}/{len(todo)} int{r['bits']} g{r['group_size']} {r['rule']} {r['method']}: "
          f"{100 * r['ppl_change']:+.2f} %, KL {r['kl']:.5f}, {r['seconds']:.1f} s",
          flush=True)  # fmt: skip
  out = Path(f.out)
  provenance.save(out, base, records)
  out.with_suffix(".md").write_text(table(records))
  plot(records, out.with_suffix(".png"))
  print(table(records))


if __name__ == "__main__":
  flags.DEFINE_string("model", Config.model, "A float model.")
  flags.DEFINE_string("file", Config.file, "Text to score.")
  flags.DEFINE_string("calibration_text", Config.calibration_text, "Text for imatrix, awq, gptq.")
  flags.DEFINE_list("bits", ["4"], "Bits.")
  flags.DEFINE_list("group_sizes", ["8", "16", "32", "64", "128", "256", "channel"], "Group sizes.")
  flags.DEFINE_list("methods", list(METHODS), "Methods.")
  flags.DEFINE_list("rules", list(RULES), "Rules.")
  flags.DEFINE_integer("ctx", Config.ctx, "Tokens in a chunk.")
  flags.DEFINE_integer("chunks", Config.chunks, "Chunks to score.")
  flags.DEFINE_integer("sequences", Config.sequences, "Sequences to calibrate with.")
  flags.DEFINE_integer("seed", Config.seed, "Of the draw of these.")
  flags.DEFINE_string("out", "experiments/results/group_size.json", "File to write.")
  app.run(main)
