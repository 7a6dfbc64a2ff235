"""The trained weights on disk: float16, in parts small enough to send about, with their config."""

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from q4jax.config import LlamaConfig
from q4jax.errors import FormatError

PART_BYTES = 15_000_000
_NAME = "tiny-f16.part{}.npz"
_META = "__meta__"


def write_atomic(path: Path, data: bytes) -> None:
  """Writes a file so that a reader, or a kill, meets the old content or the new, never a part."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_bytes(data)
  os.replace(temporary, path)


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
  """Writes an npz in one step."""
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)  # type: ignore[arg-type]
  write_atomic(path, buffer.getvalue())


def save(
  folder: Path, params: Mapping[str, NDArray[Any]], config: LlamaConfig, record: dict[str, Any]
) -> list[Path]:
  """Writes all parameters as float16 (norms as float32), and what they are. Returns the paths.

  Args:
    params: by GGUF name, half-split RoPE.
    record: how they were trained, as JSON; every part carries it, so parts cannot be mixed up.
  """
  parts: list[dict[str, NDArray[Any]]] = [{}]
  size = 0
  for name, value in params.items():
    array = value.astype(np.float16 if value.ndim > 1 else np.float32)
    if size + array.nbytes > PART_BYTES and parts[-1]:
      parts.append({})
      size = 0
    parts[-1][name] = array
    size += array.nbytes
  meta = {"config": dataclasses.asdict(config), "record": record, "parts": len(parts)}
  paths = [folder / _NAME.format(i + 1) for i in range(len(parts))]
  for path, part in zip(paths, parts, strict=True):
    save_arrays(path, part | {_META: np.array(json.dumps(meta))})
  return paths


def load(folder: Path) -> tuple[dict[str, NDArray[Any]], LlamaConfig, dict[str, Any]]:
  """What `save` wrote.

  Raises:
    FormatError: a part is missing, or comes from another save.
  """
  params: dict[str, NDArray[Any]] = {}
  metas: list[str] = []
  count = 1
  while len(metas) < count:
    path = folder / _NAME.format(len(metas) + 1)
    if not path.exists():
      raise FormatError(
        f"{path} does not exist. Train the model first (python -m experiments.train_tiny), or name "
        "the folder that holds all parts of its checkpoint."
      )
    with np.load(path) as arrays:
      metas.append(str(arrays[_META]))
      params |= {name: arrays[name] for name in arrays.files if name != _META}
    count = json.loads(metas[0])["parts"]
    if metas[-1] != metas[0]:
      raise FormatError(f"{path} is of another checkpoint than part 1. Copy all parts again.")
  meta = json.loads(metas[0])
  return params, LlamaConfig(**meta["config"]), meta["record"]


def save_state(
  path: Path, params: Mapping[str, jax.Array], opt_state: Any, progress: Sequence[float]
) -> None:
  """Writes all that a run needs to go on, in one step."""
  leaves = {f"opt{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(opt_state))}
  named = {name: np.asarray(p) for name, p in params.items()}
  save_arrays(path, named | leaves | {"progress": np.array(progress, np.float64)})


def load_state(path: Path, like: Any) -> tuple[dict[str, jax.Array], Any, list[float]]:
  """What `save_state` was given; `like` is an optimizer's state of the same structure."""
  with np.load(path) as arrays:
    leaves = [jnp.asarray(arrays[f"opt{i}"]) for i in range(len(jax.tree.leaves(like)))]
    params = {n: jnp.asarray(arrays[n]) for n in arrays.files if n.endswith(".weight")}
    progress = arrays["progress"].tolist()
  return params, jax.tree.unflatten(jax.tree.structure(like), leaves), progress
