"""Shows what a model file holds, without loading it: any shard of a split model speaks for all.

  q4jax info tiny
  q4jax info model.gguf --tensors
  q4jax info model.gguf --json | python -m json.tool

Works on files that q4jax cannot run too (a vocabulary without tensors, another architecture), and
says why. The memory plan counts the weights, which stay as they are in the file, and the KV cache
at two bytes a value (--kv_dtype=f32 would double that); compiled programs and JAX itself add about
0.4 GiB.

--json prints one object: path, format, gguf_version (null of other formats), architecture, name,
runs (whether q4jax runs it) and reason (why not), context_length, dimensions, parameters,
bits_per_weight, tensor_bytes, tensor_types (type, tensors, weights, bytes), tokenizer,
chat_template, memory, and tensors if asked for.
"""

from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from q4jax.cli import common
from q4jax.errors import FormatError

ARGUMENTS = ("MODEL",)
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_boolean(
  "tensors", False, "List every tensor: name, type, shape, bytes.", flag_values=FLAGS
)
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Prints the file's description."""
  path = common.find_model(arguments[0], flags)
  from q4jax.formats.gguf import GGUFFile
  from q4jax.formats.open import kind_of, open_checkpoint

  kind = kind_of(path)
  with GGUFFile.open(path) if kind == "gguf" else open_checkpoint(path) as file:
    about = describe(file.metadata, file.tensors, path)
    about |= {"format": kind, "gguf_version": getattr(file, "version", None)}
    tensors = [
      {"name": t.name, "type": t.format, "shape": list(t.shape), "bytes": t.nbytes}
      for t in file.tensors.values()
    ]
  if flags.json:
    common.print_json(about | ({"tensors": tensors} if flags.tensors else {}))
  else:
    lines = _page(about)
    if flags.tensors:
      lines += [_tensor_line(tensor) for tensor in tensors]
    for line in lines:  # Names are a stranger's: no escape sequences for the terminal.
      print("".join(char if char.isprintable() else "?" for char in line))
  return 0


def describe(metadata: Mapping[str, Any], tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
  """What `--json` prints, but for the format and the list of tensors."""
  from q4jax import config as config_lib

  config, reason = None, None
  try:
    config = config_lib.from_gguf(metadata, frozenset(tensors), str(path))
    if not tensors:
      reason = f"{path}: the file holds a vocabulary only, no tensors."
  except FormatError as error:
    reason = str(error)
  architecture = _string(metadata, "general.architecture")
  types: dict[str, dict[str, Any]] = {}
  for tensor in tensors.values():
    row = types.setdefault(
      tensor.format, {"type": tensor.format, "tensors": 0, "weights": 0, "bytes": 0}
    )
    row["tensors"] += 1
    row["weights"] += prod(tensor.shape)
    row["bytes"] += tensor.nbytes
  weights, nbytes = (sum(row[key] for row in types.values()) for key in ("weights", "bytes"))
  context = _number(metadata, f"{architecture}.context_length")
  memory = {"weights_bytes": nbytes, "available_bytes": available_bytes()}
  if config is not None and tensors:
    memory["kv_bytes_per_1024_tokens"] = 1024 * config.kv_bytes_per_token
    memory["kv_bytes_full_context"] = config.context_length * config.kv_bytes_per_token
  return {
    "path": str(path),
    "name": _string(metadata, "general.name"),
    "architecture": architecture,
    "runs": reason is None,
    "reason": reason,
    "context_length": context,
    "dimensions": asdict(config) if config is not None else None,
    "parameters": weights,
    "bits_per_weight": round(8 * nbytes / weights, 3) if weights else None,
    "tensor_bytes": nbytes,
    "tensor_types": sorted(types.values(), key=lambda row: -row["bytes"]),
    "tokenizer": _tokenizer(metadata),
    "chat_template": "tokenizer.chat_template" in metadata,
    "memory": memory,
  }


def available_bytes() -> int | None:
  """Memory that a new program could take without swapping; None where the system does not tell."""
  try:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
  except (OSError, StopIteration):
    return None


def _tensor_line(tensor: Mapping[str, Any]) -> str:
  shape = " x ".join(map(str, tensor["shape"]))
  return f"  {tensor['name']:40} {tensor['type']:7} {shape:>16} {common.size(tensor['bytes']):>12}"


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
  model = _string(metadata, "tokenizer.ggml.model")
  if model is None:
    return None
  tokens = metadata.get("tokenizer.ggml.tokens")
  return {
    "model": model,
    "pre": _string(metadata, "tokenizer.ggml.pre"),
    "vocab_size": len(tokens) if isinstance(tokens, list) else None,
    "bos_id": _number(metadata, "tokenizer.ggml.bos_token_id"),
    "eos_id": _number(metadata, "tokenizer.ggml.eos_token_id"),
  }


def _string(metadata: Mapping[str, Any], key: str) -> str | None:
  value = metadata.get(key)
  return value if isinstance(value, str) else None


def _number(metadata: Mapping[str, Any], key: str) -> int | None:
  value = metadata.get(key)
  return value if isinstance(value, int) else None


def _format(about: Mapping[str, Any]) -> str:
  return f"GGUF {about['gguf_version']}" if about["format"] == "gguf" else about["format"]


_KINDS = {"llama": "SentencePiece", "gpt2": "byte-level BPE"}


def _page(about: Mapping[str, Any]) -> list[str]:
  lines = [
    ("file", f"{about['path']} ({_format(about)})"),
    ("model", f"{about['name'] or 'unnamed'}, architecture {about['architecture'] or 'not given'}"),
    ("runs", "yes" if about["runs"] else f"no: {about['reason']}"),
  ]
  if dims := about["dimensions"]:
    text = (
      f"{dims['num_layers']} layers, width {dims['d_model']}, ffn {dims['d_ffn']}, "
      f"{dims['num_heads']} heads of {dims['head_dim']} ({dims['num_kv_heads']} KV heads)"
    )
    lines.append(("size", text))
  if about["context_length"]:
    lines.append(("context", f"{about['context_length']} tokens"))
  if tokenizer := about["tokenizer"]:
    kind = _KINDS.get(tokenizer["model"], "unknown kind")
    pre = f", pre-tokenizer {tokenizer['pre']}" if tokenizer["pre"] else ""
    text = f"{tokenizer['model']} ({kind}{pre}), {tokenizer['vocab_size']} tokens"
    lines.append(("tokenizer", text))
  lines.append(("chat", "has a template" if about["chat_template"] else "no template"))
  if about["parameters"]:
    text = (
      f"{about['parameters']:,} parameters in {common.size(about['tensor_bytes'])}, "
      f"{about['bits_per_weight']:.2f} bits each"
    )
    lines.append(("weights", text))
  for row in about["tensor_types"]:
    text = f"{row['type']:7} {row['tensors']:5} tensors {common.size(row['bytes']):>12}"
    lines.append(("", text))
  memory = about["memory"]
  if "kv_bytes_full_context" in memory:
    full = memory["weights_bytes"] + memory["kv_bytes_full_context"]
    text = (
      f"weights {common.size(memory['weights_bytes'])} + KV cache "
      f"{common.size(memory['kv_bytes_per_1024_tokens'])} for each 1024 tokens "
      f"= {common.size(full)} at full context"
    )
    lines.append(("memory", text))
    if memory["available_bytes"] is not None:
      lines.append(("", f"{common.size(memory['available_bytes'])} are free on this machine"))
  return [f"{label:10} {text}" for label, text in lines]
