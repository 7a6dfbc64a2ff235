"""A vocabulary read from Hugging Face's `tokenizer.json`, and `tokenizer_config.json` beside it.

The file's own normaliser and pre-tokeniser run as they are. Special tokens are taken out of it, for
`Tokenizer` finds them itself. What would change tokens and is not known here is refused.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from q4jax.errors import TokenizerError
from q4jax.text.bpe import build_bpe, library_errors, plain_ids, plain_merges
from q4jax.text.vocabulary import BYTE_TEXT, ENDS, MAX_TOKENS, Kind, Vocabulary, stop_ids

_MAX_FILE_BYTES = 1 << 28
_NORMALIZERS = {"Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD"}
_PRE_TOKENIZERS = {"Sequence", "Split", "ByteLevel", "Metaspace", "Digits", "Punctuation"}


def read_vocabulary(path: Path) -> Vocabulary:
  """Reads a `tokenizer.json` whose model is a BPE, byte-level or with SentencePiece's spaces.

  Raises:
    TokenizerError: the file cannot be read, or asks for something that q4jax does not do.
  """
  try:
    return _read(path)
  except (AttributeError, IndexError, KeyError, TypeError) as e:
    raise TokenizerError(
      f"{path} is not laid out as a tokenizer.json: {type(e).__name__} {e}. Download it again."
    ) from e
  except TokenizerError as e:
    raise TokenizerError(f"{path}: {e}") from e


def _read(path: Path) -> Vocabulary:
  doc = read_document(path)
  config_path = path.with_name("tokenizer_config.json")
  config = read_document(config_path) if config_path.exists() else {}
  parts = [
    *_parts(doc.get("normalizer"), "normalizers", _NORMALIZERS),
    *_parts(doc.get("pre_tokenizer"), "pretokenizers", _PRE_TOKENIZERS),
  ]
  types = {part["type"] for part in parts}
  byte_level = "ByteLevel" in types
  if not byte_level and not types & {"Metaspace", "Replace"}:
    raise TokenizerError("spaces are written in no known way: no ByteLevel, Metaspace or Replace.")
  texts, kinds = _tokens(doc)
  ids = {text: id for id, text in enumerate(texts) if text}
  bpe = _bpe(doc, texts, kinds)
  begin, end = _template(doc.get("post_processor"), ids)
  bos, eos = _special(config, "bos_token", begin, ids), _special(config, "eos_token", end, ids)
  unknown = doc["model"].get("unk_token")
  add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
  return Vocabulary(
    texts=texts,
    kinds=kinds,
    first=_tokenizer(doc, bpe),
    later=_tokenizer(doc, bpe, at_start=False),
    byte_level=byte_level,
    adds_space=not byte_level and any(map(_adds_space, parts)),
    unknown_id=None if unknown is None else ids[unknown],
    bos_id=bos,
    eos_id=eos,
    add_bos=bos is not None and (begin is not None if add_bos is None else add_bos),
    add_eos=eos is not None and (end is not None if add_eos is None else add_eos),
    stop_ids=stop_ids(texts, kinds, [eos]),
    chat_template=chat_template(config, path),
  )


def _tokens(doc: dict[str, Any]) -> tuple[list[str], list[Kind]]:
  """Every id's text and kind; ids that the file leaves out are unused."""
  model = doc["model"]
  added = {token["id"]: token for token in doc.get("added_tokens", [])}
  by_id = {id: text for text, id in model["vocab"].items()}
  by_id |= {id: token["content"] for id, token in added.items()}
  if not by_id or not all(type(id) is int and 0 <= id < MAX_TOKENS for id in by_id):
    raise TokenizerError(f"model.vocab and added_tokens need ids from 0 to {MAX_TOKENS - 1}.")
  if len(set(by_id.values())) < len(by_id):
    raise TokenizerError("added_tokens repeats a text of model.vocab under another id.")
  texts = [by_id.get(id, "") for id in range(max(by_id) + 1)]
  return texts, [_kind(text, added.get(id), model) for id, text in enumerate(texts)]


def _kind(text: str, added: dict[str, Any] | None, model: dict[str, Any]) -> Kind:
  if not text:
    return Kind.UNUSED
  if text == model.get("unk_token"):
    return Kind.UNKNOWN
  if text in ENDS:
    return Kind.CONTROL
  if added is not None:
    for flag in ("lstrip", "rstrip", "single_word"):
      if added.get(flag):
        raise TokenizerError(f"the added token {text!r} asks for {flag}, which q4jax does not do.")
    return Kind.CONTROL if added["special"] else Kind.USER_DEFINED
  return Kind.BYTE if model.get("byte_fallback") and BYTE_TEXT.fullmatch(text) else Kind.NORMAL


def _bpe(doc: dict[str, Any], texts: list[str], kinds: list[Kind]) -> models.Model:
  """The file's model without its special tokens."""
  model = doc["model"]
  if model.get("type", "BPE") != "BPE":
    raise TokenizerError(f"model.type is {model['type']!r}; q4jax reads 'BPE'.")
  for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
    if model.get(key):
      raise TokenizerError(f"model.{key} is {model[key]!r}, which q4jax does not do.")
  ids = plain_ids(texts, kinds)
  options = {key: bool(model.get(key)) for key in ("byte_fallback", "fuse_unk", "ignore_merges")}
  return build_bpe(ids, plain_merges(merges(doc), ids, set(texts)), len(texts), **options)


def merges(doc: dict[str, Any]) -> list[tuple[str, ...]]:
  """The merges in order, which a file has as "a b" or ["a", "b"]."""
  found = doc["model"]["merges"]
  return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in found]


def _tokenizer(doc: dict[str, Any], bpe: models.Model, at_start: bool = True) -> Tokenizer:
  """The file's tokenizer for plain text, which stands at the start or after a special token."""
  frame: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": doc.get("normalizer"),
    "pre_tokenizer": doc.get("pre_tokenizer"),
    "model": {"type": "BPE", "vocab": {}, "merges": []},
  }

  def never_first(part: dict[str, Any]) -> dict[str, Any]:
    return part | {"prepend_scheme": "never"} if part.get("prepend_scheme") == "first" else part

  with library_errors("the normalizer or pre_tokenizer"):
    text = json.dumps(frame)
    if not at_start:
      text = json.dumps(json.loads(text, object_hook=never_first))
    tokenizer = Tokenizer.from_str(text)
  tokenizer.model = bpe
  return tokenizer


def _parts(part: dict[str, Any] | None, inner: str, known: set[str]) -> Iterator[dict[str, Any]]:
  """A normaliser or pre-tokeniser, and those inside it."""
  if part is None:
    return
  if part["type"] not in known:
    raise TokenizerError(f"it uses {part['type']!r}; q4jax knows {', '.join(sorted(known))}.")
  yield part
  for child in part.get(inner, []):
    yield from _parts(child, inner, known)


def _adds_space(part: dict[str, Any]) -> bool:
  """Whether this part puts a space before a text."""
  if part["type"] == "Metaspace":
    scheme = part.get("prepend_scheme")
    return part.get("add_prefix_space", True) if scheme is None else scheme != "never"
  return part["type"] == "Prepend"


def _template(post: dict[str, Any] | None, ids: Mapping[str, int]) -> tuple[int | None, int | None]:
  """The tokens that the post-processor puts before and after a text."""
  if post is None or post["type"] == "ByteLevel":
    return None, None
  if post["type"] == "Sequence":
    found = [_template(child, ids) for child in post["processors"]]
    return next((pair for pair in found if pair != (None, None)), (None, None))
  if post["type"] != "TemplateProcessing":
    raise TokenizerError(f"post_processor is {post['type']!r}; q4jax knows 'TemplateProcessing'.")
  names = [p["SpecialToken"]["id"] if "SpecialToken" in p else "" for p in post["single"]]
  at = names.index("") if "" in names else -1
  if at not in (0, 1) or len(names) > at + 2:
    raise TokenizerError("post_processor.single is not: at most one token, the text, one token.")
  begin, end = ("".join(side) for side in (names[:at], names[at + 1 :]))
  return ids[begin] if begin else None, ids[end] if end else None


def _special(
  config: dict[str, Any], name: str, added: int | None, ids: Mapping[str, int]
) -> int | None:
  """The id of BOS or EOS: the one that is added to a text, else the one that the config names."""
  token = config.get(name)
  if added is not None or token is None:
    return added
  text = token if isinstance(token, str) else token["content"]
  if text not in ids:
    raise TokenizerError(f"{name} of tokenizer_config.json is {text!r}, which is no token.")
  return ids[text]


def chat_template(config: dict[str, Any], path: Path) -> str | None:
  """The chat template of tokenizer_config.json, or of chat_template.jinja beside `path`."""
  jinja = path.with_name("chat_template.jinja")
  if jinja.exists():
    return _read_text(jinja)
  template = config.get("chat_template")
  if isinstance(template, list):  # Several by name; the others are for tools or retrieval.
    template = next((t["template"] for t in template if t["name"] == "default"), None)
  if not isinstance(template, str | None):
    raise TokenizerError("chat_template of tokenizer_config.json is no string.")
  return template


def read_document(path: Path) -> dict[str, Any]:
  """The JSON object that a file holds."""
  try:
    doc = json.loads(_read_text(path))
  except (ValueError, RecursionError) as e:
    raise TokenizerError(f"{path.name} is not JSON: {e}") from e
  if not isinstance(doc, dict):
    raise TokenizerError(f"{path.name} holds a {type(doc).__name__}; expected an object.")
  return doc


def _read_text(path: Path) -> str:
  try:
    if (size := path.stat().st_size) > _MAX_FILE_BYTES:
      raise TokenizerError(f"{path.name} has {size} bytes; expected at most {_MAX_FILE_BYTES}.")
    return path.read_text("utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise TokenizerError(f"{path.name} cannot be read: {e}") from e
