"""A model as StableHLO and a file of weights: for runtimes that have JAX, or a compiler for
StableHLO, and none of this project's code.

An export is a folder (docs/export.md):

  manifest.json       what follows: functions, their arguments, the weights' places, versions
  prefill.stablehlo   a chunk of a prompt -> logits of its last token, cache
  decode.stablehlo    one token -> logits, cache
  weights.bin         the weights as the functions take them, each at a multiple of 64 bytes
  run.py              loads and runs the folder with jax, numpy and flatbuffers alone

The functions are those of the engine over its dense cache, and JAX's serialisation of them holds to
its promises of compatibility: https://docs.jax.dev/en/latest/export/export.html.
"""

import dataclasses
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

import q4jax
from q4jax.calibrated import Source, with_calibration
from q4jax.errors import ConfigError, MissingDependencyError
from q4jax.formats.atomic import replacing
from q4jax.loading import Progress, load
from q4jax.model.caches import Span
from q4jax.model.llama import Llama
from q4jax.model.model import Model
from q4jax_kernels import ffi

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DTYPES = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32}
VERSION = 1
_ALIGNMENT = 64
_CUSTOM_CALL = re.compile(r"custom_call\s*@([\w.$]+)")


@dataclasses.dataclass(frozen=True)
class Options:
  """What is exported.

  Attributes:
    platforms: for which the functions are lowered.
    native: with the CPU kernels of q4jax_kernels, which must be there to run it; for CPUs alone.
      Without, matrices are dequantised by XLA, and nothing but StableHLO is called.
    max_context: slots of the cache; what the model allows, at most 2048, if None.
    chunk: tokens of a prompt in one call.
    batch: sequences side by side.
    kv_dtype: of the cache, one of DTYPES.
  """

  platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
  native: bool = False
  max_context: int | None = None
  chunk: int = 64
  batch: int = 1
  kv_dtype: str = "f32"

  def __post_init__(self) -> None:
    if not self.platforms or set(self.platforms) - set(PLATFORMS):
      raise ConfigError(
        f"platforms are {', '.join(self.platforms) or 'none'}; choose of {', '.join(PLATFORMS)}."
      )
    if self.native and self.platforms != ("cpu",):
      raise ConfigError(
        f"native kernels run on a CPU; platforms are {', '.join(self.platforms)}. Give cpu alone, "
        "or leave the kernels out."
      )
    if self.kv_dtype not in DTYPES:
      raise ConfigError(f"kv_dtype is '{self.kv_dtype}'; expected one of {', '.join(DTYPES)}.")
    for name in ("chunk", "batch"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")


@dataclasses.dataclass(frozen=True)
class Exported:
  """What `export` wrote.

  Attributes:
    custom_calls: that the functions make; those that XLA brings with it need nothing.
    weights_bytes, out_bytes: of the weights, and of the whole folder.
  """

  out: str
  platforms: tuple[str, ...]
  custom_calls: tuple[str, ...]
  max_context: int
  weights_bytes: int
  out_bytes: int


def export(
  source: str | Path,
  out: Path,
  options: Options,
  calibration: Source | None = None,
  progress: Progress | None = None,
) -> Exported:
  """Loads a model and writes it as described above; the folder appears whole or not at all.

  Args:
    source: what `q4jax.load` takes.
    calibration: what `q4jax.with_calibration` takes; the functions then round activations by the
      weight called "calibration", which whoever runs them may replace.

  Raises:
    ConfigError: options that do not fit the model; a program that would need custom calls on
      platforms that do not have them.
    MissingDependencyError: flatbuffers, by which JAX serialises, is not there.
  """
  if importlib.util.find_spec("flatbuffers") is None:
    raise MissingDependencyError(
      "jax.export serialises by the package flatbuffers, which is not installed: "
      "pip install 'q4jax[export]'."
    )
  with nullcontext() if options.native else ffi.unused():
    model = load(source, device=jax.local_devices(backend="cpu")[0], progress=progress)
    if calibration is not None:
      model = with_calibration(model, calibration)
    return export_model(model, out, options)


def export_model(model: Model, out: Path, options: Options) -> Exported:
  """`export` of a model in memory, as it was loaded."""
  slots = min(options.max_context or 2048, model.config.context_length)
  if (options.max_context or 1) > model.config.context_length:
    raise ConfigError(
      f"max_context is {options.max_context}; the model has {model.config.context_length}."
    )
  chunk = min(options.chunk, slots)
  functions = {name: _lowered(model, options, t, slots) for name, t in _tokens(chunk).items()}
  calls = sorted({call for f in functions.values() for call in _custom_calls(f)})
  if calls and options.platforms != ("cpu",):
    raise ConfigError(
      f"the functions call {', '.join(calls)}, which {', '.join(options.platforms)} do not all "
      "have. Load the model without native kernels, or export for cpu alone."
    )
  with replacing(out) as folder:
    folder.mkdir()
    weights = _write_weights(model, folder / "weights.bin")
    described = {}
    for name, function in functions.items():
      data = bytes(function.serialize())
      (folder / f"{name}.stablehlo").write_bytes(data)
      described[name] = _described(function, data) | {"file": f"{name}.stablehlo"}
    manifest = {
      "format": "q4jax-export",
      "version": VERSION,
      "model": str(model.metadata.get("general.name", Path(model.path).name)),
      "config": dataclasses.asdict(model.config),
      "platforms": list(options.platforms),
      "custom_calls": calls,
      "batch": options.batch,
      "chunk": chunk,
      "max_context": slots,
      "stop_ids": sorted(model.tokenizer.stop_ids),
      "versions": {"q4jax": q4jax.__version__, "jax": jax.__version__, "jaxlib": version("jaxlib")},
      "functions": described,
      "weights": weights,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (folder / "run.py").write_bytes(files("q4jax.exported").joinpath("run_export.py").read_bytes())
  size = sum(path.stat().st_size for path in out.iterdir())
  return Exported(str(out), options.platforms, tuple(calls), slots, model.nbytes, size)


def _tokens(chunk: int) -> dict[str, int]:
  """Tokens that each function takes."""
  return {"prefill": chunk, "decode": 1}


def _lowered(model: Model, options: Options, tokens: int, slots: int) -> jax.export.Exported:
  c, batch, int32 = model.config, options.batch, jnp.int32
  dtype = DTYPES[options.kv_dtype]
  cache = jax.ShapeDtypeStruct((c.num_layers, batch, c.num_kv_heads, slots, c.head_dim), dtype)
  vector = jax.ShapeDtypeStruct((batch,), int32)
  leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in model.leaves]
  # Keys and values are updated in place where the caller donates them.
  function: Any = model.jit(_step, donate_argnums=(1, 2))
  native = [f"q4jax_{name}" for name in ("matmul", "take_rows", "attention")]
  allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in native]
  lower = jax.export.export(
    function, platforms=options.platforms, disabled_checks=allowed if options.native else ()
  )
  tokens_bt = jax.ShapeDtypeStruct((batch, tokens), int32)
  return lower(leaves, cache, cache, tokens_bt, vector, vector)


def _step(
  module: Llama,
  keys: jax.Array,
  values: jax.Array,
  tokens: jax.Array,
  start: jax.Array,
  count: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Appends count[b] of tokens int32[B, T] behind start[b]: (logits of the last, keys, values)."""
  x, cache = module.hidden(tokens, (keys, values), Span(start, count))
  assert isinstance(cache, tuple)
  last = jnp.maximum(count - 1, 0).reshape(-1, 1, 1)
  return module.unembed(jnp.take_along_axis(x, last, axis=1)[:, 0]), *cache


def _custom_calls(function: jax.export.Exported) -> set[str]:
  """Targets that are no part of StableHLO; marks for the compiler are left out."""
  found = set(_CUSTOM_CALL.findall(function.mlir_module()))
  return found - {"Sharding", "annotate_device_placement", "shape_assertion"}


_ARGUMENTS = ("keys", "values", "tokens", "start", "count")
_RESULTS = ("logits", "keys", "values")


def _described(function: jax.export.Exported, data: bytes) -> dict[str, Any]:
  inputs = function.in_avals[-len(_ARGUMENTS) :]
  return {
    "sha256": hashlib.sha256(data).hexdigest(),
    "arguments": ["weights (a list)", *_ARGUMENTS],
    "inputs": _shapes(_ARGUMENTS, inputs),
    "outputs": _shapes(_RESULTS, function.out_avals),
    "platforms": list(function.platforms),
    "calling_convention_version": function.calling_convention_version,
  }


def _shapes(names: Sequence[str], avals: Sequence[Any]) -> list[dict[str, Any]]:
  return [
    {"name": name, "shape": list(aval.shape), "dtype": str(aval.dtype)}
    for name, aval in zip(names, avals, strict=True)
  ]


def _write_weights(model: Model, path: Path) -> list[dict[str, Any]]:
  """Writes all leaves; for each its name, shape, dtype and place, in the functions' order."""
  state = jax.tree_util.tree_leaves_with_path(nnx.state(model.module))
  names = {id(leaf): _name(key) for key, leaf in state}
  names[id(getattr(model, "table", None))] = "calibration"
  entries = []
  with path.open("wb") as file:
    for leaf in model.leaves:
      file.write(bytes(-file.tell() % _ALIGNMENT))
      entries.append(
        {
          "name": names.get(id(leaf), "vectors"),  # norms and biases, joined
          "shape": list(leaf.shape),
          "dtype": str(leaf.dtype),
          "offset": file.tell(),
        }
      )
      file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
  return entries


def _name(key: Any) -> str:
  parts = [str(getattr(part, "key", getattr(part, "name", part))) for part in key]
  return ".".join(part.strip(".") for part in parts if part.strip(".") not in ("value", "data"))
