"""Prints the tables of docs/accuracy.md: q4jax beside llama.cpp and float64 arithmetic.

  PYTHONPATH=.:kernels:tests python -m oracles.accuracy_tables

Needs the shared data and llama-cpp-python; takes some minutes.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

import q4jax
from oracles import questions
from oracles.float64_llama import Float64Llama
from oracles.llama_cpp_peer import VERSION, LlamaCpp
from oracles.models import SPECS, Spec, prompt, write
from oracles.questions import SHARED, SharedModel, rms
from q4jax.evaluate import perplexity
from shared_data import ROOT


def perplexity_row(model: SharedModel, text: str) -> str:
  """q4jax's perplexity beside the golden one of llama-perplexity."""
  golden = json.loads((ROOT / "golden.json").read_text())["perplexity"]
  theirs = next(entry for entry in golden if entry["model"] == f"{model.stem}.gguf")
  mine = perplexity(q4jax.load(ROOT / model.file), text, model.ctx, model.chunks)
  return _row(
    model.stem,
    f"{mine.ppl:.4f} ± {mine.stderr:.4f}",
    f"{theirs['ppl']:.4f} ± {theirs['stderr']:.4f}",
    f"{100 * (mine.ppl / theirs['ppl'] - 1):+.3f}%",
  )


def logits_row(model: SharedModel, text: str) -> str:
  """Logits on the text's first chunks: q4jax, llama.cpp here and as recorded, float64."""
  path = ROOT / model.file
  peer, exact = LlamaCpp(path, model.ctx), Float64Llama(path)
  rows = questions.chunks(peer.encode(text), model)
  theirs, truth = (np.stack([m.logits(row) for row in rows]) for m in (peer, exact))
  mine = np.asarray(q4jax.load(path).logits(rows))
  top = theirs.argmax(-1)
  with np.load(questions.DATA / "llama_cpp.npz") as file:
    recorded = file[f"top1/{model.stem}"]
  return _row(
    model.stem,
    f"{np.abs(mine - theirs).max():.1e}",
    f"{rms(mine - truth):.2e}",
    f"{rms(theirs - truth):.2e}",
    *(
      f"{100 * np.mean(other == top):.2f}%"
      for other in (mine.argmax(-1), recorded, truth.argmax(-1))
    ),
  )


def small_row(spec: Spec, path: Path) -> str:
  tokens = prompt(spec)
  theirs, truth = (m.logits(tokens) for m in (LlamaCpp(path, spec.context), Float64Llama(path)))
  mine = np.asarray(q4jax.load(path).logits(tokens))[0]
  return _row(
    spec.name,
    f"{np.abs(mine - theirs).max():.1e}",
    f"{rms(mine - truth):.2e}",
    f"{rms(theirs - truth):.2e}",
    f"{rms(mine - truth) / rms(theirs - truth):.3f}",
  )


def _row(*cells: str) -> str:
  return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> str:
  return f"\n{_row(*cells)}\n{_row(*['---'] * len(cells))}"


def main() -> None:
  print(f"q4jax {q4jax.__version__}, {VERSION}")
  text = (ROOT / questions.TEXT).read_text()
  print(_head("model", "q4jax", "llama.cpp", "difference"))
  for model in SHARED.values():
    print(perplexity_row(model, text), flush=True)
  head = ("model", "largest difference", "error of q4jax", "of llama.cpp")
  print(_head(*head, "same top token", "llama.cpp, recorded", "float64"))
  for model in SHARED.values():
    print(logits_row(model, text), flush=True)
  print(_head(*head, "ratio"))
  with tempfile.TemporaryDirectory() as folder:
    for spec in SPECS.values():
      print(small_row(spec, write(spec, Path(folder, spec.name))), flush=True)


if __name__ == "__main__":
  main()
