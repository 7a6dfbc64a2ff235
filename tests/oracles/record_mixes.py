"""Records which type llama.cpp's quantiser gives each tensor, for tests/quant/test_recipes.py.

  PYTHONPATH=.:kernels:tests python -m oracles.record_mixes > tests/data/llama_cpp_mixes.json

Needs llama-cpp-python (`make oracles` installs it) and a minute.
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import llama_cpp

from oracles import models
from q4jax.formats.gguf import GGUFFile
from q4jax.quant.recipes import MIXES


def quantize(source: Path, out: Path, mix: str) -> None:
  """Runs llama.cpp's quantiser."""
  options = llama_cpp.llama_model_quantize_default_params()
  options.ftype, options.nthread = MIXES[mix][1], 2
  code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), options)
  if code:
    raise SystemExit(f"llama.cpp cannot quantise {source} to {mix}: code {code}")


def main() -> None:
  """Prints the record: for each model and mix, the names of matrices by type."""
  record: dict[str, dict[str, dict[str, list[str]]]] = {}
  with tempfile.TemporaryDirectory() as folder:
    for name, spec in models.MIX_SPECS.items():
      source = models.write(spec, Path(folder) / f"{name}.gguf")
      record[name] = {}
      for mix in MIXES:
        out = Path(folder) / "out.gguf"
        quantize(source, out, mix)
        types = defaultdict(list)
        with GGUFFile.open(out) as file:
          for tensor in file.tensors.values():
            if len(tensor.shape) == 2:
              types[tensor.format].append(tensor.name.removesuffix(".weight"))
        record[name][mix] = {type: sorted(names) for type, names in sorted(types.items())}
        print(name, mix, {t: len(n) for t, n in types.items()}, file=sys.stderr)
  version = f"llama-cpp-python {llama_cpp.__version__}"
  print(
    json.dumps({"version": version, "models": _without_the_most(record)}, separators=(",", ":"))
  )


def _without_the_most(record: dict) -> dict:
  """The type that most matrices have becomes a count: the others say which they are."""
  for mixes in record.values():
    for types in mixes.values():
      most = max(types, key=lambda t: len(types[t]))
      types[most] = len(types[most])
  return record


if __name__ == "__main__":
  main()
