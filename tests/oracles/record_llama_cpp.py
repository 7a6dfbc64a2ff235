"""Records llama.cpp's answers in tests/data/llama_cpp.{npz,json}, which run in every `make test`.

  pip install llama-cpp-python
  PYTHONPATH=tests python -m oracles.record_llama_cpp --llama_perplexity=/path/to/llama-perplexity

Needs the shared data (see tests/shared_data.py), gguf and numpy; not q4jax. LLAMA_CPP_LIB_PATH
makes the binding load another build of llama.cpp's libraries.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from oracles import questions
from oracles.float64_llama import Float64Llama
from oracles.llama_cpp_peer import VERSION, LlamaCpp
from oracles.models import SPECS, Spec, prompt, write
from oracles.questions import DATA, SharedModel
from shared_data import ROOT


def small_answer(spec: Spec, path: Path) -> np.ndarray:
  """Logits [16, V] of one of our small models; float16 is ample where activations are int8."""
  logits = LlamaCpp(path, spec.context).logits(prompt(spec))[questions.SMALL]
  return logits if spec.type == "f32" else logits.astype(np.float16)


def shared_answers(model: SharedModel, path: Path, text: str) -> dict[str, np.ndarray]:
  """The answers about one shared model, with a float32 KV cache; see `questions`."""
  peer = LlamaCpp(path, model.ctx)
  rows = questions.chunks(peer.encode(text), model)
  logits = np.stack([peer.logits(row) for row in rows])
  answers = {
    f"top1/{model.stem}": logits.argmax(-1).astype(np.int16),
    f"greedy/{model.stem}": np.array(
      peer.greedy(np.array([questions.BOS]), model.greedy_tokens), np.int16
    ),
  }
  if model.is_float:
    return answers | {f"logits/{model.stem}": logits[0, questions.TEXT_TOKENS]}
  exact = Float64Llama(path)
  error = questions.rms(logits - np.stack([exact.logits(row) for row in rows]))
  return answers | {f"error/{model.stem}": np.array(error)}


def tool_perplexity(tool: Path, model: Path, text: Path, ctx: int, chunks: int) -> dict[str, float]:
  """What the program llama-perplexity prints, with its default float16 KV cache."""
  run = subprocess.run(
    [tool, "-m", model, "-f", text, "-c", str(ctx), "--chunks", str(chunks)],
    capture_output=True,
    text=True,
    check=True,
  )
  found = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", run.stdout + run.stderr)
  assert found, run.stderr[-2000:]
  return {"ctx": ctx, "chunks": chunks, "ppl": float(found[1]), "stderr": float(found[2])}


def tool_version(tool: Path) -> str:
  run = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
  found = re.search(r"version: (.+)", run.stdout + run.stderr)
  return found[1] if found else "unknown"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--llama_perplexity", type=Path, required=True)
  tool = parser.parse_args().llama_perplexity
  text = (ROOT / questions.TEXT).read_text()
  answers: dict[str, np.ndarray] = {}
  with tempfile.TemporaryDirectory() as folder:
    paths = {name: write(spec, Path(folder, name)) for name, spec in SPECS.items()}
    for name, path in paths.items():
      answers[f"small/{name}"] = small_answer(SPECS[name], path)
    spec = SPECS[questions.PERPLEXITY_SPEC]
    file = Path(folder, "text")
    file.write_text(questions.perplexity_text(spec))
    perplexity = tool_perplexity(
      tool, paths[spec.name], file, questions.PERPLEXITY_CTX, questions.PERPLEXITY_CHUNKS
    )
  for model in questions.SHARED.values():
    answers |= shared_answers(model, ROOT / model.file, text)
    if model.is_float:
      name = f"logits/{model.stem}"
      answers[name] = answers[name][questions.RECORDED]
  DATA.mkdir(exist_ok=True)
  np.savez_compressed(DATA / "llama_cpp.npz", allow_pickle=False, **answers)
  about = {
    "peer": VERSION,
    "llama_perplexity": tool_version(tool),
    "recorded_by": "tests/oracles/record_llama_cpp.py",
    "kv_cache": "float32 for the arrays, float16 for the perplexity",
    "perplexity": {spec.name: perplexity},
  }
  (DATA / "llama_cpp.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
  main()
