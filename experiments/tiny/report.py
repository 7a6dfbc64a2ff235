r"""What the embedded model is worth: bits per byte, loss by position, float16 against Q4_K_M.

  python -m experiments.tiny.report --models=runs/tiny --data=runs/tiny

Scores the held-out documents (no line of which was trained on) with tiny.f16.gguf and
tiny.Q4_K_M.gguf, beside general compressors on the same text. Needs 4 minutes on two cores. Writes
experiments/results/tiny.json, and what `q4jax demo` shows to q4jax/data/tiny.json.
"""

import bz2
import gzip
import itertools
import json
import lzma
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

import q4jax
from experiments.tiny import checkpoint
from q4jax.evaluate import token_nll
from q4jax.model.model import Model

_MODELS = flags.DEFINE_string("models", "runs/tiny", "Folder of the GGUF files and checkpoint.")
_DATA = flags.DEFINE_string("data", "runs/tiny", "Folder of held_out.bin and corpus.json.")
_RESULTS = flags.DEFINE_string("results", "experiments/results/tiny.json", "File to write.")
_PACKAGE = flags.DEFINE_string("package", "q4jax/data/tiny.json", "File that the demo reads.")

FORMATS = ("f16", "Q4_K_M")
BUCKETS = (0, 16, 64, 256, 512, 1024, 1536, 2047)
CONTEXTS = (256, 512, 1024, 1792)  # Tokens before the 256 that are scored.
SCORED = 256


def documents(tokens: np.ndarray, bos: int, eos: int) -> list[np.ndarray]:
  """The documents of a row of tokens, each with its BOS and without its EOS."""
  ends = np.flatnonzero(tokens == eos)
  parts = np.split(tokens, ends + 1)
  kept = [p[:-1] if len(p) and p[-1] == eos else p for p in parts]
  assert all(p[0] == bos for p in kept if len(p))
  return [p for p in kept if len(p) > 1]


def document_nats(model: Model, ids: np.ndarray) -> float:
  """-ln p of a document, each token given at least half a context of what precedes it."""
  context, bos = model.config.context_length, ids[:1]
  total, begin = 0.0, 0
  while True:
    # After the first window: BOS, then half a window that is only read, then half that is scored.
    window = (
      ids[:context] if begin == 0 else np.concatenate([bos, ids[begin : begin + context - 1]])
    )
    scored = len(window) - 1 if begin == 0 else len(window) - context // 2
    padded = np.pad(window, (0, -len(window) % 256))[:context]
    losses = token_nll(model, padded)[0, : len(window) - 1]
    total += float(losses[len(losses) - scored :].astype(np.float64).sum())
    end = begin + len(window) - (begin > 0)
    if end >= len(ids):
      return total
    begin = end - context // 2 + 1


def by_position(model: Model, long: list[np.ndarray]) -> list[dict[str, float]]:
  """Mean nats a token by position within the first context of long documents."""
  losses = np.concatenate([token_nll(model, d[: model.config.context_length]) for d in long])
  rows = []
  for begin, end in itertools.pairwise(BUCKETS):
    part = losses[:, begin:end].astype(np.float64)
    error = part.mean(axis=1).std(ddof=1) / len(long) ** 0.5
    rows.append({"begin": begin, "end": end, "nats": float(part.mean()), "stderr": float(error)})
  return rows


def by_context(model: Model, long: list[np.ndarray]) -> list[dict[str, float]]:
  """Mean nats of the same tokens of long documents, given more or less of what precedes them.

  The tokens are the last SCORED of the first context; `gain` is how much better they are known than
  with the shortest context, with the standard error of that difference over documents.
  """
  end, bos = model.config.context_length, long[0][:1]

  def given(context: int) -> np.ndarray:
    windows = [np.concatenate([bos, d[end - SCORED - context + 1 : end]]) for d in long]
    return np.array([token_nll(model, w)[0, -SCORED:].mean(dtype=np.float64) for w in windows])

  nats = {context: given(context) for context in CONTEXTS}
  rows = []
  for context, mine in nats.items():
    gain = nats[CONTEXTS[0]] - mine
    error = gain.std(ddof=1) / len(long) ** 0.5
    rows.append(
      {"context": context, "nats": mine.mean(), "gain": gain.mean(), "gain_stderr": float(error)}
    )
  return rows


def compressors(text: bytes) -> dict[str, float]:
  """Bits per byte of general compressors at their strongest."""
  packed = {
    "gzip -9": gzip.compress(text, 9),
    "bzip2 -9": bz2.compress(text, 9),
    "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
  }
  return {name: 8 * len(data) / len(text) for name, data in packed.items()}


def run(models: Path, data: Path) -> dict[str, Any]:
  """The whole report as a JSON-able record."""
  row = np.fromfile(data / "held_out.bin", np.uint16).astype(np.int32)
  record: dict[str, Any] = {"models": {}}
  for name in FORMATS:
    path = models / f"tiny.{name}.gguf"
    model = q4jax.load(path)
    bos, eos = model.tokenizer.bos_id, model.tokenizer.eos_id
    assert bos is not None and eos is not None
    parts = documents(row, bos, eos)
    texts = [model.tokenizer.decode(part.tolist()).encode() for part in parts]
    size, count = sum(map(len, texts)), sum(len(p) - 1 for p in parts)
    nats = 0.0
    for i, part in enumerate(parts):
      nats += document_nats(model, part)
      print(f"\r{name}: {i + 1}/{len(parts)} documents", end="", file=sys.stderr)
    print(file=sys.stderr)
    long = [p for p in parts if len(p) >= model.config.context_length]
    record["models"][name] = {
      "bytes": path.stat().st_size,
      "bits_per_byte": nats / np.log(2) / size,
      "nats_per_token": nats / count,
      "perplexity": float(np.exp(nats / count)),
      "by_position": by_position(model, long),
      "by_context": by_context(model, long),
    }
    record["parameters"] = model.num_params
    record["held_out"] = {
      "documents": len(parts),
      "bytes": size,
      "tokens": count,
      "long": len(long),
    }
    record["compressors_bits_per_byte"] = compressors(b"\n\n".join(texts))
  training = checkpoint.load(models)[2]
  return record | {"training": training, "provenance": provenance()}


def provenance() -> dict[str, Any]:
  """Where and with what this was measured."""

  def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()

  return {
    "command": " ".join(["python -m experiments.tiny.report", *sys.argv[1:]]),
    "git_sha": git("rev-parse", "HEAD"),
    "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    "device": jax.devices()[0].device_kind,
    "machine": platform.machine(),
    "jax": jax.__version__,
    "python": platform.python_version(),
  }


def for_demo(record: dict[str, Any]) -> dict[str, Any]:
  """The few figures that come with the package."""
  f16, q4 = (record["models"][name] for name in FORMATS)
  return {
    "params": record["parameters"],
    "bytes_f16": f16["bytes"],
    "bytes_q4_k_m": q4["bytes"],
    "held_out_bits_per_byte_f16": f16["bits_per_byte"],
    "held_out_bits_per_byte_q4_k_m": q4["bits_per_byte"],
    "xz_bits_per_byte": record["compressors_bits_per_byte"]["xz -9e"],
    "perplexity_f16": f16["perplexity"],
    "perplexity_q4_k_m": q4["perplexity"],
  }


def main(_: list[str]) -> None:
  record = run(Path(_MODELS.value), Path(_DATA.value))
  for path, value in ((_RESULTS.value, record), (_PACKAGE.value, for_demo(record))):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value, indent=1) + "\n")
  print(json.dumps(for_demo(record), indent=1))


if __name__ == "__main__":
  app.run(main)
