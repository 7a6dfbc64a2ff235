"""A SentencePiece model (tokenizer.model) as the keys `tokenizer.*` of GGUF.

Both say a BPE as pieces with scores, so nothing is derived: the keys hold the model's own pieces,
kinds and scores. Tokens that Hugging Face added later lie in files beside it (added_tokens.json,
tokenizer_config.json). What GGUF's `llama` vocabularies do not do is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from q4jax.errors import TokenizerError
from q4jax.text import gguf_vocab, json_vocab
from q4jax.text import sentencepiece_pb2 as pb
from q4jax.text.vocabulary import ENDS, MAX_TOKENS, Kind, padded

_PREFIX = "tokenizer.ggml."
_MAX_FILE_BYTES = 1 << 26  # Real ones have at most 5 MB.
_HELP = "Give the model's tokenizer.json with --tokenizer, or use a GGUF file of the model."


def tokenizer_metadata(path: Path, vocab_size: int | None = None) -> dict[str, Any]:
  """GGUF's keys of a `tokenizer.model`, and of the files about tokens beside it.

  Args:
    path: of the tokenizer.model.
    vocab_size: rows of the embedding table; ids without a token become unused ones. None is as many
      as there are tokens.

  Raises:
    TokenizerError: a file cannot be read, it has more tokens than the table has rows, or it does
      what GGUF's `llama` vocabularies do not.
  """
  try:
    model = _read(path)
    _check(model)
    config_path = path.with_name("tokenizer_config.json")
    config = json_vocab.read_document(config_path) if config_path.exists() else {}
    found = _metadata(model, config, _added(path, config), vocab_size)
    template = json_vocab.chat_template(config, path)
    if template is not None:
      found["tokenizer.chat_template"] = template
    gguf_vocab.read_vocabulary(found)
  except TokenizerError as error:
    raise TokenizerError(f"{path}: {error}") from None
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise TokenizerError(
      f"{path}: a file about tokens beside it is not laid out as expected: {type(error).__name__} "
      f"{error}. Download tokenizer_config.json and added_tokens.json again."
    ) from error
  return found


def _read(path: Path) -> pb.Model:
  try:
    if (size := path.stat().st_size) > _MAX_FILE_BYTES:
      raise TokenizerError(f"it has {size} bytes; expected at most {_MAX_FILE_BYTES}. {_HELP}")
    model = pb.Model.FromString(path.read_bytes())
  except OSError as error:
    raise TokenizerError(f"it cannot be read: {error}.") from error
  except DecodeError as error:
    raise TokenizerError(
      f"it is no SentencePiece model, or is cut off: {error}. Download it again, or: {_HELP}"
    ) from error
  if not model.pieces:
    raise TokenizerError(f"it is no SentencePiece model: it has no pieces. {_HELP}")
  return model


def _check(model: pb.Model) -> None:
  """Raises TokenizerError where the model does what a `llama` vocabulary does not."""
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  if trainer.model_type != pb.Trainer.BPE:
    kind = pb.Trainer.ModelType.Name(trainer.model_type)
    raise TokenizerError(f"its pieces are chosen by {kind}; q4jax reads BPE. {_HELP}")
  known = {
    "trainer_spec.byte_fallback": (trainer.byte_fallback, True),
    "trainer_spec.treat_whitespace_as_suffix": (trainer.treat_whitespace_as_suffix, False),
    "normalizer_spec.escape_whitespaces": (normalizer.escape_whitespaces, True),
    "normalizer_spec.remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, False),
    "normalizer_spec.precompiled_charsmap": (bool(normalizer.precompiled_charsmap), False),
  }
  for name, (value, expected) in known.items():
    if value != expected:
      raise TokenizerError(f"{name} is {value}; GGUF's vocabularies need {expected}. {_HELP}")


def _metadata(
  model: pb.Model,
  config: Mapping[str, Any],
  added: Mapping[int, tuple[str, Kind]],
  size: int | None,
) -> dict[str, Any]:
  texts = [piece.piece for piece in model.pieces]
  kinds = [Kind(piece.type) for piece in model.pieces]
  scores = [piece.score for piece in model.pieces]
  count = max(len(texts), *(id + 1 for id in added)) if added else len(texts)
  texts, kinds = padded(texts, kinds, count if size is None else size)
  scores += [0.0] * (len(texts) - len(scores))
  for id, (text, kind) in added.items():
    if id >= len(texts):
      raise TokenizerError(
        f"the added token {text!r} has the id {id}, and the embedding table {len(texts)} rows. Do "
        "the files belong to one model?"
      )
    if id < len(model.pieces) and texts[id] != text:
      raise TokenizerError(f"the added token {text!r} has the id {id}, which is {texts[id]!r}'s.")
    if id >= len(model.pieces):
      texts[id], kinds[id] = text, kind
  found: dict[str, Any] = {
    "model": "llama",
    "pre": "default",
    "tokens": texts,
    "scores": scores,
    "token_type": [int(kind) for kind in kinds],
    "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
    "add_bos_token": bool(config.get("add_bos_token", True)),
    "add_eos_token": bool(config.get("add_eos_token", False)),
  }
  trainer = model.trainer_spec
  ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id, "pad": trainer.pad_id}
  names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
  for role, id in ids.items():
    token = config.get(f"{role}_token")
    named = token.get("content") if isinstance(token, dict) else token
    if named in texts:
      id = texts.index(named)
    if id >= 0:
      found[f"{names[role]}_token_id"] = id
  return {_PREFIX + name: value for name, value in found.items()}


def _added(path: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, Kind]]:
  """Tokens that Hugging Face's files add, by their ids; the config, which is newer, goes first."""
  old_path = path.with_name("added_tokens.json")
  old = json_vocab.read_document(old_path) if old_path.exists() else {}
  found = {id: (text, Kind.CONTROL) for text, id in old.items()}
  for id, token in config.get("added_tokens_decoder", {}).items():
    text, special = token["content"], token["special"] or token["content"] in ENDS
    found[int(id)] = (text, Kind.CONTROL if special else Kind.USER_DEFINED)
  for id, (text, _) in found.items():
    if type(id) is not int or not 0 <= id < MAX_TOKENS or not isinstance(text, str):
      raise TokenizerError(f"the added token {text!r} has the id {id!r}.")
  return found
