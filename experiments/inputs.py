"""Models and texts of experiments, by name; what is loaded stays loaded."""

import functools
import hashlib
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import q4jax
from q4jax.errors import ConfigError, DownloadError
from q4jax.model.model import Model

TEXTS = ("held_out", "calibration")
# Its twin of float weights lies in the repository, not in the package.
ALIASES = {"tiny_f16": str(Path(__file__).parent / "tiny" / "tiny.f16.gguf")}


@functools.lru_cache(maxsize=2)
def model(name: str) -> Model:
  """What `q4jax.load` takes, or `tiny_f16`, the float twin of `tiny`."""
  return q4jax.load(ALIASES.get(name, name))


def where(kind: str, name: str) -> Path | None:
  """The file that a model's or a text's name stands for; None where it is not known to be one."""
  if kind == "model":
    packaged = resources.files("q4jax.data") / "tiny.Q4_K_M.gguf"
    path = Path(str(packaged)) if name == "tiny" else Path(ALIASES.get(name, name))
  else:
    path = _packaged(name) if name in TEXTS else Path(name)
  return path if path.is_file() else None


@functools.cache
def digest(path: Path | None) -> str:
  """SHA-256 of a file; "" without one."""
  if path is None:
    return ""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def text(name: str) -> str:
  """`held_out` and `calibration` (documentation, in the package), a file, or, with a network,
  hf://datasets/org/repo/path.txt.

  Raises:
    ConfigError: no such file.
    DownloadError: the hub does not give it.
  """
  if name.startswith("hf://"):
    return _hub(name)
  path = where("text", name)
  if path is None:
    raise ConfigError(
      f"--text={name} is no file. Give a text file, {' or '.join(TEXTS)} (in the package), or "
      "hf://datasets/org/repo/path.txt."
    )
  return path.read_text()


def sequences(model: Model, name: str, count: int, ctx: int) -> NDArray[np.int32]:
  """int32[count, ctx]: the text's first tokens, each sequence begun as the model wants one begun.

  ConfigError if there are too few.
  """
  tokens = np.asarray(model.tokenizer.encode_parts([text(name)], add_eos=False), np.int32)
  if len(tokens) < count * ctx:
    raise ConfigError(
      f"--text has {len(tokens)} tokens; {count} sequences of {ctx} need {count * ctx}."
    )
  rows = tokens[: count * ctx].reshape(count, ctx).copy()
  bos = model.tokenizer.encode_parts([], add_eos=False)
  rows[:, : len(bos)] = bos
  return rows


def _packaged(name: str) -> Path:
  return Path(str(resources.files("q4jax.data") / f"{name}.txt"))


def _hub(name: str) -> str:
  import huggingface_hub

  parts = name.removeprefix("hf://").removeprefix("datasets/").split("/")
  if len(parts) < 3:
    raise ConfigError(f"--text={name}: expected hf://datasets/org/repo/path/to/file.txt.")
  try:
    path = huggingface_hub.hf_hub_download(
      "/".join(parts[:2]), "/".join(parts[2:]), repo_type="dataset"
    )
  except (huggingface_hub.errors.HfHubHTTPError, OSError) as error:
    raise DownloadError(
      f"--text={name} could not be fetched ({error}); give a file, or check the network."
    ) from error
  return Path(path).read_text()
