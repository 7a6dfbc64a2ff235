"""Finds a model by its name: a path, the alias `tiny`, or a file on the Hugging Face hub."""

from importlib import resources
from pathlib import Path

from q4jax.errors import ConfigError, DownloadError

# Models that come with the package.
ALIASES = {"tiny": "tiny.Q4_K_M.gguf"}


def resolve(name: str) -> Path:
  """The local path of a model, downloaded first if it is an `hf://org/repo/file.gguf`.

  Downloads go through huggingface_hub: cached, resumed, and under the control of its environment
  variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).

  Raises:
    ConfigError: the name is empty or no valid hub address.
    DownloadError: the hub does not have the file or cannot be reached.
  """
  if not name:
    raise ConfigError("the model's name is empty; give a path, 'tiny', or hf://org/repo/file.gguf.")
  if name in ALIASES and not Path(name).exists():
    return Path(str(resources.files("q4jax") / "data" / ALIASES[name]))
  if name.startswith("hf://"):
    return _download(name)
  return Path(name).expanduser()


def _download(name: str) -> Path:
  parts = name.removeprefix("hf://").split("/")
  if len(parts) < 3 or not all(parts) or not parts[-1].endswith(".gguf"):
    raise ConfigError(f"'{name}' is no hub address; expected hf://org/repo/path/to/file.gguf.")
  import huggingface_hub  # Slow to import, and only this path needs it.

  repo, file = "/".join(parts[:2]), "/".join(parts[2:])
  try:
    files = [file]
    if "-00001-of-" in file:  # A split model: its other shards lie beside the first.
      prefix, tail = file.split("-00001-of-", 1)
      count = int(tail.removesuffix(".gguf"))
      files += [f"{prefix}-{i:05}-of-{tail}" for i in range(2, count + 1)]
    paths = [huggingface_hub.hf_hub_download(repo, f) for f in files]
  except Exception as error:  # huggingface_hub raises its own, requests' and OS errors alike.
    reason = str(error).strip().split("\n")[0][:300]
    raise DownloadError(
      f"'{name}' could not be downloaded: {type(error).__name__}: {reason}. Check the name, your "
      "network and, for a gated model, HF_TOKEN; or download the file yourself and give its path."
    ) from error
  return Path(paths[0])
