r"""What loading a model takes, time and memory: a GGUF, its .qbin, llama.cpp mapping the GGUF.

  python -m experiments.bench_load --model=8b.gguf --qbin=8b.qbin --llama_folder=build/bin \
    --out=experiments/results/load_8b.json

The .qbin is written first if it is not there. Each load is a process of its own, after all imports,
and reads files that are in the page cache (each is read once before). Peak and resident
memory are what the load added (VmHWM, VmRSS), files that are mapped in included; anonymous memory
(RssAnon) is what the system cannot drop. Then q4jax computes one token, which touches every weight
(first_token_s, compilation included; anonymous_after is with the compiled programs).

llama.cpp is driven through libllama.so (ctypes; the struct is that of llama.h at commit 0c1e57098),
with its weights repacked, as it does by default, and as they lie in the file.
"""

import ctypes
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import app

from experiments import config_flags
from experiments.config_flags import option
from experiments.provenance import markdown, save


@dataclasses.dataclass(frozen=True)
class Config:
  """What to load."""

  model: str = option("", "A GGUF file.")
  qbin: str = option("", "The same model as .qbin; written if it does not exist.")
  llama_folder: str = option("", "Folder of libllama.so; no llama.cpp without it.")
  reps: int = option(3, "Loads of each side, in turn.")
  out: str = option("", "File to write the records to, as JSON.")


class _LlamaParams(ctypes.Structure):
  """struct llama_model_params."""

  _fields_ = [
    *[(name, ctypes.c_void_p) for name in ("devices", "overrides")],
    *[(name, ctypes.c_int32) for name in ("layers", "split", "load", "lazy", "main_gpu")],
    *[(name, ctypes.c_void_p) for name in ("tensor_split", "progress", "data", "keys")],
    *[
      (name, ctypes.c_bool)
      for name in ("vocab_only", "check_tensors", "extra_bufts", "no_host", "no_alloc", "mtp")
    ],
  ]


def memory(field: str) -> int:
  """A field of /proc/self/status, in bytes."""
  status = Path("/proc/self/status").read_text()
  return int(status.split(f"{field}:")[1].split()[0]) * 1024


def load_q4jax(path: str) -> dict[str, Any]:
  """One load by q4jax, in this process."""
  import jax
  import numpy as np

  from q4jax.loading import load

  jax.block_until_ready(jax.numpy.zeros(1))
  load("tiny")  # Pays for what any first load imports and compiles.
  with _Watch() as watch:
    model = load(path)
  begin = time.perf_counter()
  np.asarray(model.logits(np.array([1])))
  return watch.record | {"first_token_s": time.perf_counter() - begin, **watch.after()}


def load_llama(path: str, folder: str, repack: bool) -> dict[str, Any]:
  """One load by llama.cpp, in this process."""
  library = ctypes.CDLL(str(Path(folder) / "libllama.so"))
  library.llama_model_default_params.restype = _LlamaParams
  library.llama_model_load_from_file.restype = ctypes.c_void_p
  library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _LlamaParams]
  library.llama_backend_init()
  params = library.llama_model_default_params()
  assert params.extra_bufts and not params.vocab_only, "llama.h of another version"
  params.extra_bufts = repack
  with _Watch() as watch:
    if not library.llama_model_load_from_file(path.encode(), params):
      raise RuntimeError(f"llama.cpp does not load {path}.")
  return watch.record


class _Watch:
  """Seconds, and bytes of memory, that a `with` block took."""

  def __enter__(self) -> "_Watch":
    Path("/proc/self/clear_refs").write_text("5")  # Sets the peak to what is resident.
    self._before = {name: memory(name) for name in ("VmRSS", "RssAnon")}
    self._begin = time.perf_counter()
    return self

  def __exit__(self, *_: object) -> None:
    seconds = time.perf_counter() - self._begin
    self.record = {"load_s": seconds, "peak": memory("VmHWM") - self._before["VmRSS"]}
    self.record |= {"resident": self._growth("VmRSS"), "anonymous": self._growth("RssAnon")}

  def _growth(self, field: str) -> int:
    return memory(field) - self._before[field]

  def after(self) -> dict[str, int]:
    """The same memory now."""
    return {"resident_after": self._growth("VmRSS"), "anonymous_after": self._growth("RssAnon")}


def write_qbin(source: str, path: str) -> None:
  """Converts a GGUF."""
  from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
  from q4jax.formats.qbin_sink import QbinSink

  with GGUFCheckpoint.open(source) as model:
    tensors = list(model.tensors.values())
    with QbinSink(path, model.config, model.metadata, tensors) as sink:
      for tensor in tensors:
        sink.write(tensor, model.rows(tensor.name))
        model.release(tensor.name)


def run(config: Config) -> list[dict[str, Any]]:
  """A record for each load."""
  if not Path(config.qbin).exists():
    write_qbin(config.model, config.qbin)
  sides = {"q4jax gguf": ["q4jax", config.model], "q4jax qbin": ["q4jax", config.qbin]}
  if config.llama_folder:
    llama = ["llama", config.model, config.llama_folder]
    sides |= {"llama.cpp repacked": [*llama, "1"], "llama.cpp mapped": [*llama, ""]}
  records = []
  for rep in range(config.reps):
    for name, arguments in sides.items():
      _read(arguments[1])
      command = [sys.executable, "-m", "experiments.bench_load", "--child", *arguments]
      # llama.cpp tells of every tensor on stderr.
      quiet = subprocess.DEVNULL if "llama" in name else None
      child = subprocess.run(command, stdout=subprocess.PIPE, stderr=quiet, text=True, check=True)
      size = Path(arguments[1]).stat().st_size
      records.append({"side": name, "rep": rep, "file": size, **json.loads(child.stdout)})
      print(f"{name}: {records[-1]}", file=sys.stderr)
  return records


def _read(path: str) -> None:
  with open(path, "rb", buffering=0) as file:
    while file.read(64 << 20):
      pass


def table(records: list[dict[str, Any]]) -> str:
  """Medians by side, in Markdown; memory in MB."""
  keys = ("load_s", "peak", "resident", "anonymous", "first_token_s", "anonymous_after")
  rows = [["side", *keys]]
  for side in dict.fromkeys(record["side"] for record in records):
    mine = [record for record in records if record["side"] == side]
    cells = []
    for key in keys:
      values = [record[key] for record in mine if key in record]
      middle = statistics.median(values) if values else None
      unit = 1 if key.endswith("_s") else 1e6
      cells.append("" if middle is None else f"{middle / unit:.{2 if unit == 1 else 0}f}")
    rows.append([side, *cells])
  return markdown(rows)


def main(_: list[str]) -> None:
  config = config_flags.read(Config)
  records = run(config)
  print(table(records))
  if config.out:
    save(config.out, config, records)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    kind, path, *rest = sys.argv[2:]
    found = load_q4jax(path) if kind == "q4jax" else load_llama(path, rest[0], bool(rest[1]))
    print(json.dumps(found))
  else:
    config_flags.define(Config)
    app.run(main)
