r"""Our quantiser of llama.cpp's mixes beside llama-quantize, from the same float16 model.

  python -m experiments.vs_llama_quantize --model=experiments/tiny/tiny.f16.gguf

For each of --types, with and without an importance matrix (the same for both sides, calibrated on
--calibration_text), both files are scored on --file twice: by q4jax with exact float activations
(perplexity, KL to the float16 model, top-1), and by llama.cpp itself, which thereby loads our file.
Expected on `tiny`: equal sizes to the byte, our KL lower. Needs the Python binding llama-cpp-python
(pip install 'q4jax[oracle]') and 6 minutes on two cores. Writes --out as JSON and as Markdown.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from numpy.typing import NDArray

from experiments import provenance
from q4jax.compare import Reference
from q4jax.formats import imatrix
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.gguf_sink import GGUFSink
from q4jax.loading import load
from q4jax.offline.calibrate import Options, calibrate
from q4jax.offline.calibration import IMATRIX, read_importance
from q4jax.offline.quantize import quantize_model
from q4jax.offline.scheme import Scheme
from q4jax.offline.sequences import sequences
from q4jax.quant.recipes import MIXES

TYPES = ("q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k")


def quantize_by_llama(
  source: Path, out: Path, mix: str, moments: Mapping[str, imatrix.Moments] | None
) -> None:
  """Runs llama.cpp's quantiser on one thread."""
  import llama_cpp

  options = llama_cpp.llama_model_quantize_default_params()
  options.ftype, options.nthread = MIXES[mix][1], 1
  kept: list[Any] = []  # What C points to.
  if moments is not None:
    rows = (llama_cpp.llama_model_imatrix_data * (len(moments) + 1))()
    for row, (name, m) in zip(rows, moments.items(), strict=False):
      values = np.ascontiguousarray(m.mean_squares)
      kept.append(values)
      row.name = name.encode()
      row.data = values.ctypes.data_as(type(row.data))
      row.size = len(values)
    options.imatrix = rows
    kept.append(rows)
  if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), options):
    raise SystemExit(f"llama.cpp cannot quantise {source} to {mix}.")


def quantize_by_us(
  source: Path, out: Path, mix: str, importance: Mapping[str, NDArray[np.float32]] | None
) -> None:
  """As `q4jax quantize --type=MIX`."""
  with GGUFCheckpoint.open(source) as checkpoint:
    quantize_model(
      checkpoint,
      lambda tensors: GGUFSink(out, checkpoint.config, checkpoint.metadata, tensors, file_type=mix),
      Scheme(mix=mix),
      importance=importance,
    )


def llama_perplexity(path: Path, rows: NDArray[np.int32]) -> float:
  """Of the second halves of the rows, by llama.cpp's own logits."""
  import llama_cpp

  ctx = rows.shape[1]
  llama = llama_cpp.Llama(
    str(path), n_ctx=ctx, n_batch=ctx, n_ubatch=ctx, logits_all=True, verbose=False
  )
  losses = []
  for row in rows:
    llama.reset()
    llama.eval(row.tolist())
    logits = llama.scores[:ctx].astype(np.float64)
    for t in range(ctx // 2, ctx - 1):
      x = logits[t] - logits[t].max()
      losses.append(np.log(np.exp(x).sum()) - x[row[t + 1]])
  return float(np.exp(np.mean(losses)))


@dataclass(frozen=True)
class Config:
  """What to compare; see the flags."""

  model: str
  file: str
  calibration_text: str
  types: tuple[str, ...] = TYPES
  ctx: int = 512
  chunks: int = 40
  seed: int = 0


def run(config: Config) -> list[dict[str, Any]]:
  """A record for each type, with and without importances, and side."""
  model, ctx = Path(config.model), config.ctx
  reference = Reference(load(model), Path(config.file).read_text(), ctx, config.chunks)
  calibration_text = Path(config.calibration_text).read_text()
  records = []
  with tempfile.TemporaryDirectory() as folder:
    calibration = Path(folder) / "calibration"
    with GGUFCheckpoint.open(model) as checkpoint:
      tokens = sequences(checkpoint, calibration_text, ctx, 128, config.seed)
      calibrate(checkpoint, tokens, calibration, Options())
    for mix in config.types:
      for guided in (False, True):
        ours, theirs = Path(folder) / "ours.gguf", Path(folder) / "theirs.gguf"
        quantize_by_us(model, ours, mix, read_importance(calibration) if guided else None)
        moments = imatrix.read(calibration / IMATRIX) if guided else None
        quantize_by_llama(model, theirs, mix, moments)
        for side, path in (("q4jax", ours), ("llama.cpp", theirs)):
          found = load(path)
          result = reference.compare(load(path, implementation="cpu_exact"))
          records.append(
            {
              "type": mix,
              "importance": guided,
              "quantiser": side,
              "bytes": found.nbytes,
              "ppl": result.ppl,
              "ppl_change": result.ratio - 1,
              "ppl_change_stderr": result.ratio_stderr,
              "kl": result.kl,
              "kl_stderr": result.kl_stderr,
              "top1": result.top1,
              "ppl_by_llama_cpp": llama_perplexity(path, reference.rows),
            }
          )
          print(json.dumps(records[-1]), flush=True)
  return records


def table(records: list[dict[str, Any]]) -> str:
  """Markdown: a row for each type, both sides beside each other."""
  lines = [
    "| type | importance | KL, q4jax | KL, llama.cpp | ratio | perplexity, q4jax | llama.cpp "
    "| by llama.cpp: q4jax | llama.cpp |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for a, b in zip(records[::2], records[1::2], strict=True):
    lines.append(
      f"| {a['type']} | {'yes' if a['importance'] else 'no'} | {a['kl']:.5f} | {b['kl']:.5f} "
      f"| {a['kl'] / b['kl']:.3f} | {a['ppl']:.3f} | {b['ppl']:.3f} "
      f"| {a['ppl_by_llama_cpp']:.3f} | {b['ppl_by_llama_cpp']:.3f} |"
    )
  return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
  f = flags.FLAGS
  config = Config(f.model, f.file, f.calibration_text, tuple(f.types), f.ctx, f.chunks, f.seed)
  records = run(config)
  out = Path(f.out)
  provenance.save(out, config, records)
  out.with_suffix(".md").write_text(table(records))
  print(table(records))


if __name__ == "__main__":
  flags.DEFINE_string("model", "experiments/tiny/tiny.f16.gguf", "A float GGUF.")
  flags.DEFINE_string("file", "q4jax/data/held_out.txt", "Text to score.")
  flags.DEFINE_string("calibration_text", "q4jax/data/calibration.txt", "Text for importances.")
  flags.DEFINE_list("types", list(TYPES), "Mixes.")
  flags.DEFINE_integer("ctx", 512, "Tokens in a chunk.")
  flags.DEFINE_integer("chunks", 40, "Chunks to score.")
  flags.DEFINE_integer("seed", 0, "Of the draw of calibration sequences.")
  flags.DEFINE_string("out", "experiments/results/vs_llama_quantize.json", "File to write.")
  app.run(main)
