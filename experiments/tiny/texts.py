r"""Writes the texts that come with q4jax: what `tiny` was trained on, and what it never saw.

  python -m experiments.tiny.texts --out=q4jax/data

Needs two minutes. Writes calibration.txt (of training documents) and held_out.txt (no line of which
was trained on): whole documents of Python, NumPy, SciPy and JAX, drawn by their names' hashes; and
texts.json, which says from which versions and under which licences.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.tiny import corpus

SOURCES = ("python", "python reference", "numpy", "scipy", "jax")
SIZES = {"calibration": ("train", 600_000), "held_out": ("held_out", 200_000)}
_OUT = flags.DEFINE_string("out", "q4jax/data", "Folder to write to.")


def run(raw: list[corpus.Document], out: Path) -> dict[str, Any]:
  """Writes the three files; returns what texts.json says."""
  splits = corpus.filtered(raw)
  used: dict[str, Any] = {}
  for name, (split, size) in SIZES.items():
    documents = [d for d in splits[split] if d.source in SOURCES]
    documents.sort(key=lambda d: hashlib.sha256(f"text {d.name}".encode()).digest())
    chosen: list[corpus.Document] = []
    for document in documents:
      if sum(len(d.text) for d in chosen) + len(document.text) <= size:
        chosen.append(document)
    text = "\n\n\n".join(d.text for d in chosen) + "\n"
    (out / f"{name}.txt").write_text(text)
    used[name] = {
      "documents": [d.name for d in chosen],
      "bytes": len(text.encode()),
      "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
  sources = {k: v for k, v in corpus.provenance().items() if k in SOURCES}
  record = {"sources": sources, **used}
  (out / "texts.json").write_text(json.dumps(record, indent=1) + "\n")
  return record


def main(_: list[str]) -> None:
  record = run(list(corpus.documents()), Path(_OUT.value))
  print({name: (len(record[name]["documents"]), record[name]["bytes"]) for name in SIZES})


if __name__ == "__main__":
  app.run(main)
