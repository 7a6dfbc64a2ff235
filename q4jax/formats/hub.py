"""Finds a model by its name: a path, the alias `tiny`, or one on the Hugging Face hub."""

import re
from importlib import resources
from pathlib import Path

from q4jax.errors import ConfigError, DownloadError, Q4JaxError
from q4jax.formats import hf_folder

# Models that come with the package.
ALIASES = {"tiny": "tiny.Q4_K_M.gguf"}


def resolve(name: str) -> Path:
  """The local path of a model, downloaded first if it is on the hub.

  `hf://org/repo/file.gguf` is that file, and its shards; `hf://org/repo` the folder of a model in
  safetensors, of which only what q4jax reads is downloaded: weights, config and tokenizer.

  Downloads go through huggingface_hub: cached, resumed, and under the control of its environment
  variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).

  Raises:
    ConfigError: the name is empty or no valid hub address.
    DownloadError: the hub does not have the file or cannot be reached.
  """
  if not name:
    raise ConfigError(
      "the model's name is empty; give a path, 'tiny', hf://org/repo or hf://org/repo/file.gguf."
    )
  if name in ALIASES and not Path(name).exists():
    return Path(str(resources.files("q4jax") / "data" / ALIASES[name]))
  if name.startswith("hf://"):
    return _download(name)
  return Path(name).expanduser()


def _download(name: str) -> Path:
  parts = name.removeprefix("hf://").split("/")
  is_file = parts[-1].endswith((".gguf", ".qbin"))
  if not all(parts) or (len(parts) < 3 if is_file else len(parts) != 2):
    raise ConfigError(
      f"'{name}' is no hub address; expected hf://org/repo/path/to/file.gguf, or hf://org/repo for "
      "a model in safetensors."
    )
  repo, file = "/".join(parts[:2]), "/".join(parts[2:])
  try:
    return _file(repo, file) if file else _folder(repo)
  except Q4JaxError:
    raise
  except Exception as error:  # huggingface_hub raises its own, its HTTP library's and OS errors.
    raise DownloadError(
      f"'{name}' could not be downloaded: {_reason(error, repo)} Or download the file yourself and "
      "give its path."
    ) from error


def _file(repo: str, file: str) -> Path:
  """Downloads a GGUF file, all shards of it."""
  import huggingface_hub  # Slow to import, and only these paths need it.

  shards = _shards(file)
  paths = [huggingface_hub.hf_hub_download(repo, shard) for shard in shards]
  return Path(paths[shards.index(file)])


def _folder(repo: str) -> Path:
  """Downloads a model in safetensors; the folder that the cache keeps it in."""
  import huggingface_hub

  config = huggingface_hub.hf_hub_download(repo, hf_folder.CONFIG)
  for name in (hf_folder.TOKENIZER_CONFIG, hf_folder.CHAT_TEMPLATE):
    _optional(repo, name)
  if not _optional(repo, hf_folder.TOKENIZER) and _optional(repo, hf_folder.SENTENCEPIECE):
    _optional(repo, hf_folder.ADDED_TOKENS)
  if _optional(repo, hf_folder.INDEX):
    folder = Path(config).parent
    for name in hf_folder.indexed_files(folder):
      huggingface_hub.hf_hub_download(repo, name)
  else:
    huggingface_hub.hf_hub_download(repo, hf_folder.SINGLE)
  return Path(config).parent


def _optional(repo: str, name: str) -> bool:
  """Downloads a file if the repository has it."""
  import huggingface_hub
  from huggingface_hub import errors

  try:
    huggingface_hub.hf_hub_download(repo, name)
  except errors.LocalEntryNotFoundError:  # Offline: the cache may know that there is none.
    if isinstance(huggingface_hub.try_to_load_from_cache(repo, name), str | None):
      raise
    return False
  except errors.EntryNotFoundError:
    return False
  return True


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
