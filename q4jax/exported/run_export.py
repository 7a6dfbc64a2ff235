"""Runs an export of q4jax greedily, with jax, numpy and flatbuffers alone.

  python run.py FOLDER 1 450 4996 --tokens=16     token ids in, token ids out

Where manifest.json lists custom calls, the package q4jax_kernels is needed too, for its kernels.
"""

import argparse
import json
import math
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np


class Exported:
  """prefill and decode of a folder, and its weights; see manifest.json."""

  def __init__(self, folder: str | Path) -> None:
    folder = Path(folder)
    self.manifest = json.loads((folder / "manifest.json").read_text())
    if any(name.startswith("q4jax_") for name in self.manifest["custom_calls"]):
      from q4jax_kernels import ffi

      ffi.library()  # Registers the kernels.
    data = np.memmap(folder / "weights.bin", np.uint8, "r")
    self.weights = []
    for w in self.manifest["weights"]:
      dtype, begin = jnp.dtype(w["dtype"]), w["offset"]
      part = data[begin : begin + math.prod(w["shape"]) * dtype.itemsize]
      if part.size != math.prod(w["shape"]) * dtype.itemsize:
        raise ValueError(f"{folder}/weights.bin ends within {w['name']}; export again.")
      self.weights.append(jax.device_put(part.view(dtype).reshape(w["shape"])))
    self.functions = {}
    for name, function in self.manifest["functions"].items():
      code = jax.export.deserialize(bytearray((folder / function["file"]).read_bytes()))
      self.functions[name] = jax.jit(code.call, donate_argnums=(1, 2))

  def empty_cache(self) -> tuple[jax.Array, jax.Array]:
    """Keys and values of no tokens."""
    keys, values = self.manifest["functions"]["decode"]["inputs"][:2]
    return jnp.zeros(keys["shape"], keys["dtype"]), jnp.zeros(values["shape"], values["dtype"])

  def generate(self, prompt: list[int], count: int) -> tuple[list[int], list[np.ndarray]]:
    """The likeliest tokens after a prompt, and the logits float32[V] that each was chosen by."""
    m, (keys, values) = self.manifest, self.empty_cache()
    if not prompt or len(prompt) + count > m["max_context"]:
      raise ValueError(f"{len(prompt)} + {count} tokens; this export has {m['max_context']} slots.")
    tokens: list[int] = []
    logits: list[np.ndarray] = []
    at, new = 0, list(prompt)
    while len(tokens) < count and (not tokens or tokens[-1] not in m["stop_ids"]):
      name, width = ("prefill", m["chunk"]) if at < len(prompt) else ("decode", 1)
      part = new[at : at + width]
      padded = np.zeros((m["batch"], width), np.int32)
      padded[:, : len(part)] = part
      start, length = (np.full(m["batch"], n, np.int32) for n in (at, len(part)))
      out, keys, values = self.functions[name](self.weights, keys, values, padded, start, length)
      at += len(part)
      if at >= len(prompt):
        logits.append(np.asarray(out[0]))
        tokens.append(int(logits[-1].argmax()))
        new.append(tokens[-1])
    return tokens, logits


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder")
  parser.add_argument("prompt", type=int, nargs="+")
  parser.add_argument("--tokens", type=int, default=16)
  flags = parser.parse_args()
  print(*Exported(flags.folder).generate(flags.prompt, flags.tokens)[0])
