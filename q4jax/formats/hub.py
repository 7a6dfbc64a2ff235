"""Finds a model by its name: a path, the alias `tiny`, or a file on the Hugging Face hub."""

import re
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
  if len(parts) < 3 or not all(parts) or not parts[-1].endswith((".gguf", ".qbin")):
    raise ConfigError(f"'{name}' is no hub address; expected hf://org/repo/path/to/file.gguf.")
  repo, file = "/".join(parts[:2]), "/".join(parts[2:])
  shards = _shards(file)
  import huggingface_hub  # Slow to import, and only this path needs it.

  try:
    paths = [huggingface_hub.hf_hub_download(repo, shard) for shard in shards]
  except Exception as error:  # huggingface_hub raises its own, its HTTP library's and OS errors.
    raise DownloadError(
      f"'{name}' could not be downloaded: {_reason(error, repo)} Or download the file yourself and "
      "give its path."
    ) from error
  return Path(paths[shards.index(file)])


def _shards(file: str) -> list[str]:
  """The file, or all shards if it is one of a split model."""
  split = re.fullmatch(r"(?P<prefix>.+)-[0-9]{5}-of-(?P<count>[0-9]{5})\.gguf", file)
  if split is None:
    return [file]
  of = split["count"]
  shards = [f"{split['prefix']}-{i:05}-of-{of}.gguf" for i in range(1, int(of) + 1)]
  return shards if file in shards else [file]


def _reason(error: Exception, repo: str) -> str:
  """What went wrong, and what to do about it."""
  from huggingface_hub import errors

  # The order matters: some are subclasses of those below.
  if isinstance(error, errors.GatedRepoError):
    return f"{repo} is gated. Accept its terms on its page, and set HF_TOKEN to your token."
  if isinstance(error, errors.RepositoryNotFoundError):
    return (
      f"the hub shows no repository {repo}. Check the name; if it is private, set HF_TOKEN to a "
      "token that may read it."
    )
  if isinstance(error, errors.LocalEntryNotFoundError):
    return "the hub cannot be reached, and the file is not in the cache. Check your network."
  if isinstance(error, errors.EntryNotFoundError):
    return f"{repo} has no such file. Look at the repository's list of files."
  what = str(error).strip().split("\n")[0][:300].rstrip(".")
  return f"{type(error).__name__}: {what}. Check the name and your network, and try again."
