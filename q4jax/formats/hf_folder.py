"""The files of a Hugging Face model folder."""

from pathlib import Path

from q4jax.errors import FormatError
from q4jax.formats.json_file import read_object

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE, ADDED_TOKENS = "tokenizer.model", "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"


def model_name(folder: Path) -> str:
  """The model's name: the folder's, or the repository's if it lies in the hub's cache."""
  folder = folder.resolve()
  for parent in folder.parents:
    if parent.name.startswith("models--"):
      return parent.name.rpartition("--")[2]
  return folder.name


def weight_files(folder: Path) -> list[Path]:
  """The files that hold the tensors: those that the index names, or the only one.

  Raises:
    FormatError: there is none, one is missing, or the index cannot be read.
  """
  if (folder / INDEX).exists():
    names = indexed_files(folder)
    for name in names:
      if not (folder / name).exists():
        raise FormatError(
          f"{folder / name}: this file is missing; {INDEX} says that {len(names)} file(s) make the "
          "model. Download it."
        )
    return [folder / name for name in names]
  if (folder / SINGLE).exists():
    return [folder / SINGLE]
  if any(folder.glob("pytorch_model*.bin")):
    raise FormatError(
      f"{folder}: the weights are pickled (pytorch_model*.bin), which could run any code: q4jax "
      "does not read them. Save the model with safe_serialization=True."
    )
  raise FormatError(f"{folder}: there is neither {SINGLE} nor {INDEX}: download the weights too.")


def indexed_files(folder: Path) -> list[str]:
  """The names of the files that the index of a sharded model names, whether they exist or not.

  Raises:
    FormatError: the index cannot be read, or names something that is no file beside it.
  """
  path = folder / INDEX
  weight_map = read_object(path, "the index of the tensors").get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise FormatError(f"{path}: weight_map is no object that names files. Download it again.")
  names = sorted({str(name) for name in weight_map.values()})
  for name in names:
    if Path(name).name != name or not name.endswith(".safetensors"):
      raise FormatError(
        f"{path}: weight_map names {name[:80]!r}; expected a .safetensors file beside it."
      )
  return names
