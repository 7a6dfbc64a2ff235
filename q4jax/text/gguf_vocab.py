"""A vocabulary rebuilt from the metadata of a GGUF file.

Two models are known: `llama` (SentencePiece BPE: pieces and scores) and `gpt2` (byte-level BPE:
tokens and merges). Metadata comes from strangers: everything is checked before it is used, and the
number and lengths of tokens, which bound the work, have limits far above any real vocabulary's.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers

from q4jax.errors import TokenizerError
from q4jax.text.bpe import build_bpe, plain_ids, plain_merges
from q4jax.text.pretokenizers import PRE_TOKENIZERS
from q4jax.text.vocabulary import BYTE_TEXT, ENDS, MAX_TOKENS, SPACE, Kind, Vocabulary, stop_ids

_MAX_TOKEN_CHARS = 1 << 10  # Real ones have at most 128,
_MAX_CHARS = 1 << 23  # and 2 million in all tokens.
_PREFIX = "tokenizer.ggml."
_ROLES = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator")  # GGUF's spelling
_KINDS = {kind.value: kind for kind in Kind}
_HELP = (
  "The file cannot be used as it is: convert the model again with a current converter, or give its "
  "tokenizer.json instead."
)


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
  """Rebuilds the vocabulary that the keys `tokenizer.*` of a GGUF file describe.

  Raises:
    TokenizerError: a key is missing, malformed, or names something unknown; the message names it.
  """
  model = _value(metadata, "model", str)
  if model not in ("llama", "gpt2"):
    raise TokenizerError(
      f"{_PREFIX}model is {model!r}; q4jax reads 'llama' (SentencePiece BPE) and 'gpt2' "
      "(byte-level BPE). Give the model's tokenizer.json instead."
    )
  texts = _texts(metadata)
  kinds = _kinds(metadata, texts, byte_level=model == "gpt2")
  special = {role: _id(metadata, role, len(texts)) for role in _ROLES}
  if model == "gpt2":
    plain, add_bos = _byte_level(metadata, texts, kinds)
    adds_space = False
  else:
    # The format's defaults, as llama.cpp has them.
    for role, default in (("bos", 1), ("eos", 2), ("unknown", 0)):
      structural = default < len(texts) and kinds[default] in (Kind.CONTROL, Kind.UNKNOWN)
      if special[role] is None and structural:
        special[role] = default
    adds_space = _value(metadata, "add_space_prefix", bool, default=True)
    plain, add_bos = _sentencepiece(metadata, texts, kinds, adds_space), True
  flags = {
    "bos": _value(metadata, "add_bos_token", bool, default=add_bos),
    "eos": _value(metadata, "add_eos_token", bool, default=False),
  }
  for role, wanted in flags.items():
    if wanted and special[role] is None:
      raise TokenizerError(
        f"{_PREFIX}add_{role}_token is true, but {_PREFIX}{role}_token_id is missing. {_HELP}"
      )
  template = metadata.get("tokenizer.chat_template")
  if template is not None and not isinstance(template, str):
    raise TokenizerError(
      f"tokenizer.chat_template is a {type(template).__name__}; expected a string. {_HELP}"
    )
  return Vocabulary(
    texts=texts,
    kinds=kinds,
    first=plain,
    later=plain,
    byte_level=model == "gpt2",
    adds_space=adds_space,
    unknown_id=special["unknown"],
    bos_id=special["bos"],
    eos_id=special["eos"],
    add_bos=flags["bos"],
    add_eos=flags["eos"],
    stop_ids=stop_ids(texts, kinds, [special[role] for role in ("eos", "eot", "eom")]),
    chat_template=template,
  )


def _byte_level(
  metadata: Mapping[str, Any], texts: list[str], kinds: list[Kind]
) -> tuple[Tokenizer, bool]:
  """The BPE of a `gpt2` vocabulary, and whether it begins with BOS by default."""
  if _value(metadata, "add_space_prefix", bool, default=False):
    raise TokenizerError(
      f"{_PREFIX}add_space_prefix is true; a 'gpt2' vocabulary needs false. {_HELP}"
    )
  name = _value(metadata, "pre", str)
  if name not in PRE_TOKENIZERS:
    raise TokenizerError(
      f"{_PREFIX}pre is {name!r}, a way of cutting words that q4jax does not know; it knows "
      f"{', '.join(sorted(PRE_TOKENIZERS))}. Another would give wrong tokens: give the model's "
      "tokenizer.json instead."
    )
  pre = PRE_TOKENIZERS[name]
  ids = plain_ids(texts, kinds)
  pairs = [merge.partition(" ")[::2] for merge in _strings(metadata, "merges")]
  try:
    merges = plain_merges(pairs, ids, set(texts))
  except TokenizerError as e:
    raise TokenizerError(f"{_PREFIX}{e} {_HELP}") from e
  tokenizer = Tokenizer(build_bpe(ids, merges, len(texts), ignore_merges=pre.ignore_merges))
  tokenizer.pre_tokenizer = pre.build()
  return tokenizer, pre.add_bos


def _sentencepiece(
  metadata: Mapping[str, Any], texts: list[str], kinds: list[Kind], adds_space: bool
) -> Tokenizer:
  """The BPE of a `llama` vocabulary: it joins the pair whose piece has the highest score."""
  scores = _numbers(metadata, "scores", len(texts), float)
  if any(map(math.isnan, scores)):
    raise TokenizerError(f"{_PREFIX}scores holds a value that is no number. {_HELP}")
  ids = plain_ids(texts, kinds)
  pieces = {text: id for text, id in ids.items() if kinds[id] != Kind.BYTE}
  ranked = _splits(pieces, scores)
  merges = [merge[-2:] for merge in ranked]
  tokenizer = Tokenizer(build_bpe(ids, merges, len(texts), byte_fallback=True, fuse_unk=True))
  prefix = [normalizers.Prepend(SPACE)] if adds_space else []
  tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
  return tokenizer


def _splits(pieces: Mapping[str, int], scores: list[float]) -> list[tuple[float, int, str, str]]:
  """The merges that make each piece, each behind a key, sorted as SentencePiece merges.

  SentencePiece takes the best score and the leftmost of equals; the library takes the first pair in
  the list and the leftmost of equals. The order of the pairs that make one piece was never seen to
  matter; pieces of equal score, which only files without real scores have, go by their ids.
  """
  return sorted(
    (-scores[id], id, piece[:cut], piece[cut:])
    for piece, id in pieces.items()
    for cut in range(1, len(piece))
    if piece[:cut] in pieces and piece[cut:] in pieces
  )


def _texts(metadata: Mapping[str, Any]) -> list[str]:
  texts = _strings(metadata, "tokens")
  sizes = [len(text) for text in texts]
  if not 0 < len(texts) <= MAX_TOKENS or max(sizes) > _MAX_TOKEN_CHARS or sum(sizes) > _MAX_CHARS:
    raise TokenizerError(
      f"{_PREFIX}tokens holds {len(texts)} tokens of up to {max(sizes, default=0)} characters, "
      f"{sum(sizes)} in all; expected 1 to {MAX_TOKENS} tokens of up to {_MAX_TOKEN_CHARS} "
      f"characters, at most {_MAX_CHARS} in all. {_HELP}"
    )
  seen: dict[str, int] = {}
  for id, text in enumerate(texts):
    if text and seen.setdefault(text, id) != id:
      raise TokenizerError(
        f"{_PREFIX}tokens[{id}] repeats token {seen[text]}, {text[:80]!r}. {_HELP}"
      )
  return texts


def _kinds(metadata: Mapping[str, Any], texts: list[str], byte_level: bool) -> list[Kind]:
  """Every token's kind; what ends a turn is for control, whatever the file says."""
  numbers = _numbers(metadata, "token_type", len(texts), int)
  # Tokens are 10^5, and loading waits: what is rare is looked for in passes without a body.
  for id in [id for id, number in enumerate(numbers) if number not in _KINDS]:
    raise TokenizerError(f"{_PREFIX}token_type[{id}] is {numbers[id]}; expected 1 to 6. {_HELP}")
  byte = Kind.BYTE.value
  for id in [id for id, number in enumerate(numbers) if number == byte]:
    if byte_level or not BYTE_TEXT.fullmatch(texts[id]):
      raise TokenizerError(
        f"{_PREFIX}tokens[{id}] is {texts[id][:80]!r} and of type 6 (a byte); expected '<0x00>' to "
        f"'<0xFF>' in a 'llama' vocabulary. {_HELP}"
      )
  kinds = list(map(_KINDS.__getitem__, numbers))
  for id in [id for id, text in enumerate(texts) if text in ENDS]:
    kinds[id] = Kind.CONTROL
  return kinds


def _id(metadata: Mapping[str, Any], role: str, size: int) -> int | None:
  """The id that `<role>_token_id` gives, or None if it gives none."""
  if _PREFIX + f"{role}_token_id" not in metadata:
    return None
  id = _value(metadata, f"{role}_token_id", int)
  if not 0 <= id < size:
    raise TokenizerError(
      f"{_PREFIX}{role}_token_id is {id}; expected an id from 0 to {size - 1}. {_HELP}"
    )
  return id


def _value(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
  """One value of the type `kind`; `default` if it is absent, an error if there is no default."""
  value = metadata.get(_PREFIX + key, default)
  if value is None:
    raise TokenizerError(f"{_PREFIX}{key} is missing. {_HELP}")
  if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
    raise TokenizerError(
      f"{_PREFIX}{key} is a {type(value).__name__}; expected a {kind.__name__}. {_HELP}"
    )
  return value


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
  values = _value(metadata, key, list)
  try:
    "".join(values).encode()
  except TypeError as e:
    raise TokenizerError(f"{_PREFIX}{key} holds more than strings: {e}. {_HELP}") from e
  except UnicodeEncodeError as e:
    raise TokenizerError(f"{_PREFIX}{key} is not valid UTF-8. {_HELP}") from e
  return values


def _numbers(metadata: Mapping[str, Any], key: str, size: int, kind: type) -> list[Any]:
  """A list of numbers, one a token; integers count as floats, floats not as integers."""
  if _PREFIX + key not in metadata:
    raise TokenizerError(f"{_PREFIX}{key} is missing. {_HELP}")
  try:
    values = np.asarray(metadata[_PREFIX + key])
  except ValueError:
    values = np.empty(0, object)
  if values.dtype.kind not in ("iu" if kind is int else "iuf") or values.shape != (size,):
    raise TokenizerError(
      f"{_PREFIX}{key} is {values.dtype} of shape {values.shape}; expected {size} numbers "
      f"({kind.__name__}), one a token. {_HELP}"
    )
  return [kind(v) for v in values.tolist()] if kind is float else values.tolist()
