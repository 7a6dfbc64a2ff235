r"""Weights: methods x bits x group sizes, what each costs in bits and in quality.

  python -m experiments.group_size
  python -m experiments.group_size --bits=4,3,2 --group_sizes=32,64,128,channel --chunks=40
  python -m experiments.group_size --model=babyllama361-f32.gguf --text=tinystories.txt --ctx=256 \
    --calibration_text=tinystories_b.txt --group_sizes=8,16,32

For each method, number of bits, group size and rule (symmetric: absmax; asymmetric: minimum) the
matrices of all layers are quantised, embeddings and norms left as they are, and the model's
predictions for --text are compared with the float model's: perplexity, KL divergence, top-1.

  rtn      from the smallest to the largest weight      hqq    least |error|^0.7, asymmetric alone
  mse      searched for least squared error             awq    inputs scaled by what text shows
  imatrix  the same, weighted by mean squared inputs    gptq   errors made up for, one by one
  rotated  rtn of a model with a rotation folded into its weights; rotated_gptq  gptq of it

Weights are multiplied with float activations, so that rows differ by their weights alone. The error
is |w - w'| / |w|, not given for awq, whose weights are scaled. "recovered" is the share of rtn's KL
that a method takes away. Expected on `tiny` at 4 bits in groups of 128: rtn costs 3-4 % of
perplexity, gptq under 1 %. A row of gptq or awq takes 20 s on two cores, of the others 5 s.
`python -m experiments.reproduce --only=group_size --full` keeps each row as it is made.
"""

import dataclasses
import functools
import itertools
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments import inputs, plots
from experiments.config_flags import option
from experiments.experiment import Claim, command, each
from q4jax.compare import Reference
from q4jax.formats.checkpoint import Checkpoint, floats
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.formats.open import open_checkpoint
from q4jax.loading import load_checkpoint
from q4jax.offline.layerwise import SHARED, LayerRunner, input_of
from q4jax.offline.quantize import quantize_model
from q4jax.offline.rotate import RotatedCheckpoint
from q4jax.offline.scheme import NEEDS_TEXT, Scheme
from q4jax.offline.sequences import sequences
from q4jax.quant.error import weight_error
from q4jax.quant.grid import Grid
from q4jax.quant.observers import Moments

Record = dict[str, Any]
METHODS = ("rtn", "mse", "imatrix", "hqq", "awq", "gptq", "rotated", "rotated_gptq")
# What a row's method is called where it is not the quantiser's name.
_NAMES = {"imatrix": "mse", "rotated": "rtn", "rotated_gptq": "gptq"}
RULES = ("absmax", "minimum")
SIZES = ("8", "16", "32", "64", "128", "256", "channel")
VERSION = 1
CLAIMS: tuple[Claim, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
  """A row for each method, number of bits, group size and rule."""

  model: str = option("tiny_f16", "A float model.")
  text: str = option("held_out", "Text to score.")
  calibration_text: str = option("calibration", "Text for imatrix, awq and gptq.")
  methods: tuple[str, ...] = option(METHODS, "Methods.")
  bits: tuple[int, ...] = option((4,), "Bits.")
  group_sizes: tuple[str, ...] = option(SIZES, "Weights that share a scale; channel, tensor.")
  rules: tuple[str, ...] = option(RULES, "Symmetric (absmax) or with a minimum.")
  ctx: int = option(512, "Tokens in a chunk.")
  chunks: int = option(40, "Chunks to score.")
  sequences: int = option(64, "Sequences to calibrate with.")
  seed: int = option(0, "Of the draw of these, and of the rotation.")


def run(config: Config) -> list[Record]:
  """A record for each row of the table. HQQ has none without a minimum."""
  records = []
  every = (config.bits, config.group_sizes, config.rules, config.methods)
  for bits, size, rule, method in itertools.product(*every):
    if method == "hqq" and rule != "minimum":
      continue
    grid = Grid(bits, int(size) if size.isdigit() else size, rule)  # type: ignore[arg-type]
    records.append(_row(_Prepared.of(config), grid, method))
    r = records[-1]
    print(
      f"int{bits} g{size} {rule} {method}: {100 * r['ppl_change']:+.2f} %, KL {r['kl']:.5f}",
      file=sys.stderr,
      flush=True,
    )
  return records


@dataclasses.dataclass(frozen=True, eq=False)
class _Prepared:
  """What all rows of a model and its texts share."""

  source: Checkpoint
  reference: Reference
  tokens: NDArray[np.int32]
  seed: int

  @classmethod
  def of(cls, config: Config) -> "_Prepared":
    return _prepared(
      config.model, config.text, config.calibration_text,
      config.ctx, config.chunks, config.sequences, config.seed,
    )  # fmt: skip

  @functools.cached_property
  def rotated(self) -> Checkpoint:
    """The model with a rotation in its weights, in float32."""
    return _float(RotatedCheckpoint(self.source, self.seed))

  @functools.cached_property
  def importance(self) -> dict[str, NDArray[np.float32]]:
    """Mean squares of the inputs of all layers' matrices."""
    runner, found = LayerRunner(self.source, self.tokens), {}
    for _ in range(self.source.config.num_layers):
      prefix, watches = runner.prefix, dict[str, Moments]()

      def visit(flow: Any, watches: dict[str, Moments] = watches) -> None:
        for name, x in flow.inputs.items():
          watches[name] = watches.get(name, Moments.init(x.shape[-1])).update(x)

      runner.advance(runner.read_block(), visit)
      for shared in SHARED:
        found[input_of(f"{prefix}{shared[0]}.weight")] = watches[shared[0]].mean_square()
    return found


@functools.lru_cache(1)
def _prepared(
  model: str, text: str, calibration: str, ctx: int, chunks: int, count: int, seed: int
) -> _Prepared:
  source = open_checkpoint(inputs.ALIASES.get(model, model))
  reference = Reference(_float_model(source), inputs.text(text), ctx, chunks)
  tokens = sequences(source, inputs.text(calibration), ctx, count, seed)
  return _Prepared(source, reference, tokens, seed)


def _row(prepared: _Prepared, grid: Grid, method: str) -> Record:
  source = prepared.rotated if method.startswith("rotated") else prepared.source
  made = MemoryCheckpoint(source.config, source.metadata)
  name: Any = _NAMES.get(method, method)
  begin = time.perf_counter()
  quantize_model(
    source,
    lambda _: made,
    Scheme(grid=grid, method=name, head="keep"),
    importance=prepared.importance if method == "imatrix" else None,
    tokens=prepared.tokens if name in NEEDS_TEXT else None,
  )
  seconds = time.perf_counter() - begin
  matrices = [n for n, t in source.tensors.items() if n.startswith("blk.") and len(t.shape) == 2]
  error = None
  if method != "awq":
    errors = [weight_error(floats(source, n), floats(made, n)).relative_l2 for n in matrices]
    error = float(np.mean(errors))
  result = prepared.reference.compare(_float_model(made))
  weights = sum(floats(source, n).size for n in matrices)
  groups = sum(int(np.prod(grid.groups(source.tensors[n].shape))) for n in matrices)
  return {
    "method": method,
    "bits": grid.bits,
    "group_size": str(grid.group_size),
    "rule": grid.rule,
    "bpw": grid.bits + 16 * (1 if grid.symmetric else 2) * groups / weights,
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


def _float_model(source: Checkpoint) -> Any:
  """The model with all weights in float32: no rounding of activations."""
  return load_checkpoint(_float(source))


def _float(source: Checkpoint) -> MemoryCheckpoint:
  plain = MemoryCheckpoint(source.config, source.metadata)
  for name, tensor in source.tensors.items():
    values = floats(source, name)
    rows = np.ascontiguousarray(values.reshape(tensor.num_rows, -1)).view(np.uint8)
    plain.write(dataclasses.replace(tensor, format="f32"), rows)
  return plain


def table(records: list[Record]) -> list[list[str]]:
  """Rows for Markdown."""
  rows = [["bits", "group", "rule", "method", "bpw", "error", "perplexity", "KL", "top-1",
           "recovered", "s"]]  # fmt: skip
  for r in records:
    same = ("bits", "group_size", "rule")
    base = [x for x in records if x["method"] == "rtn" and all(x[k] == r[k] for k in same)]
    known = base and r["method"] != "rtn"
    rows.append(
      [
        str(r["bits"]),
        r["group_size"],
        r["rule"],
        r["method"],
        f"{r['bpw']:.3f}",
        "" if r["relative_l2"] is None else f"{100 * r['relative_l2']:.2f} %",
        f"{100 * r['ppl_change']:+.2f} ± {100 * r['ppl_change_stderr']:.2f} %",
        f"{r['kl']:.5f} ± {r['kl_stderr']:.5f}",
        f"{100 * r['top1']:.2f} %",
        f"{100 * (1 - r['kl'] / base[0]['kl']):.0f} %" if known else "",
        f"{r['seconds']:.1f}",
      ]
    )
  return rows


def plot(records: list[Record], path: str) -> None:
  """KL against bits a weight, a line for each method and rule."""
  bits = sorted({r["bits"] for r in records})
  colors = {m: f"C{i}" for i, m in enumerate(METHODS)}
  with plots.figure(path, len(bits)) as every:
    for axes, b in zip(every, bits, strict=True):
      for method, rule in itertools.product(METHODS, RULES):
        kind = (b, method, rule)
        mine = [r for r in records if (r["bits"], r["method"], r["rule"]) == kind]
        points = sorted((r["bpw"], r["kl"]) for r in mine)
        if points:
          line = "o-" if rule == "absmax" else "s--"
          axes.plot(*zip(*points, strict=True), line, color=colors[method], markersize=4,
                    label=f"{method}, {rule}")  # fmt: skip
      axes.set(xlabel="bits a weight", title=f"{b} bits", yscale="log", ylabel="KL, nats")
      axes.grid(alpha=0.3, which="both")
    every[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1))


def quick() -> list[Config]:
  """RTN and GPTQ in groups of 32 and 128, a search and AWQ in the latter, on little text."""
  some = Config(rules=("minimum",), chunks=8, sequences=8)
  both = dataclasses.replace(some, methods=("rtn", "gptq"), group_sizes=("32", "128"))
  large = dataclasses.replace(some, methods=("mse", "awq"), group_sizes=("128",))
  return [*each(both, "group_sizes", "methods"), *each(large, "methods")]


def full() -> list[Config]:
  """All methods, rules and group sizes at 4 bits, and groups of 32 and 128 at 3 and 2."""
  low = Config(bits=(3, 2), group_sizes=("32", "128"))
  fields = ("bits", "group_sizes", "rules", "methods")
  return each(Config(), *fields) + each(low, *fields)


if __name__ == "__main__":
  command(__name__)
