r"""Writes the embedded model's tokenizer and token arrays from what this Python has installed.

  pip install -r experiments/tiny/requirements.txt       # the versions that `tiny` was trained on
  python -m experiments.tiny.prepare --out=runs/tiny

Needs 2 minutes on one core and 1 GB. Writes tokenizer.json, {train,validation,held_out}.bin
(uint16, documents between BOS and EOS) and corpus.json (sizes, versions, licences, digests).
Expected: 29 MB of text, 8.7 million training tokens, 3.4 bytes a token. The same Python and
packages give the same bytes.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.tiny import corpus, tokenizer

_OUT = flags.DEFINE_string("out", "runs/tiny", "Folder to write to.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Tokens, of them 2 special and 256 bytes.")


def run(raw: list[corpus.Document], out: Path, vocab_size: int) -> dict[str, Any]:
  """Writes the files into `out`, and returns the record that is also written as corpus.json."""
  splits = corpus.filtered(raw)
  model = tokenizer.train((d.text for d in splits["train"]), vocab_size)
  out.mkdir(parents=True, exist_ok=True)
  model.save(str(out / "tokenizer.json"))
  record: dict[str, Any] = {"sources": corpus.provenance(), "vocab_size": vocab_size}
  for split, part in splits.items():
    tokens = tokenizer.encode(model, [d.text for d in part])
    tokens.tofile(out / f"{split}.bin")
    by_source = corpus.sizes(part)
    record[split] = {
      "documents": len(part),
      "bytes": sum(by_source.values()),
      "tokens": len(tokens),
      "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
      "bytes_by_source": by_source,
    }
  record["tokenizer_sha256"] = hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest()
  (out / "corpus.json").write_text(json.dumps(record, indent=1) + "\n")
  return record


def main(_: list[str]) -> None:
  print("reading source files...", file=sys.stderr)
  raw = list(corpus.documents())
  print(f"filtering and encoding {len(raw)} documents...", file=sys.stderr)
  record = run(raw, Path(_OUT.value), _VOCAB_SIZE.value)
  for split in ("train", "validation", "held_out"):
    sizes = {k: v for k, v in record[split].items() if isinstance(v, int)}
    print(split, sizes, file=sys.stderr)


if __name__ == "__main__":
  app.run(main)
