"""A tokenizer.json as the keys `tokenizer.*` of GGUF, from which the same ids come.

GGUF says less than tokenizer.json: how words are cut is a name (`tokenizer.ggml.pre`), and a
SentencePiece BPE is pieces with scores, not merges. What these cannot say is refused.

Known to differ, as in every GGUF file: Qwen's texts are not normalised to NFC; and where Metaspace
puts a space before a text, a `llama` vocabulary (as SentencePiece itself) does so too if the text
begins with one, and after each special token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from q4jax.errors import TokenizerError
from q4jax.text import gguf_vocab, json_vocab
from q4jax.text.bpe import plain_ids
from q4jax.text.pretokenizers import PRE_TOKENIZERS
from q4jax.text.tokenizer import Tokenizer
from q4jax.text.vocabulary import SPACE, Kind, Vocabulary, padded

_PREFIX = "tokenizer.ggml."
_HELP = "Use a GGUF file of the model, or a folder without tokenizer.json, and give --tokenizer."
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTE_LEVEL = PRE_TOKENIZERS["gpt-2"].patterns[0]  # Built into the library's ByteLevel.
# How the makers' own files spell patterns that pretokenizers.py has.
_SPELLINGS = {
  rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
  rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
}
# Of several names for one cut, the one that llama.cpp's converter writes for the known models.
_PREFERRED = ("llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "smaug-bpe")
# Read both ways before the metadata is handed out: scripts, spaces, digits, emoji, odd words.
_PROBE = (
  "Hello  World's 12345 \t\n\n don't DON'T 3.14 <b>&amp;</b>\r\n    x=y+1;",
  "Grüße, naïve, привет! ₿\u00a01",
  "世界 こんにちは。 مرحبا नमस्ते 안녕",
  "\U0001f642\u200d\u2642\ufe0f\U0001f44d\U0001f3fd",
)


def tokenizer_metadata(path: Path, vocab_size: int) -> dict[str, Any]:
  """GGUF's keys of a `tokenizer.json`, and of `tokenizer_config.json` beside it.

  Args:
    path: of the tokenizer.json.
    vocab_size: rows of the embedding table; ids without a token become unused ones.

  Raises:
    TokenizerError: the file cannot be read, has more tokens than the table has rows, or GGUF's keys
      cannot say what it does.
  """
  vocabulary = json_vocab.read_vocabulary(path)
  document = json_vocab.read_document(path)
  try:
    found = _metadata(vocabulary, document, vocab_size) | _padding(path, vocabulary)
    ours, theirs = Tokenizer(gguf_vocab.read_vocabulary(found)), Tokenizer(vocabulary)
  except TokenizerError as error:
    raise TokenizerError(f"{path}: {error}") from None
  except (AttributeError, IndexError, KeyError, TypeError) as error:
    raise TokenizerError(
      f"{path} is not laid out as a tokenizer.json: {type(error).__name__} {error}."
    ) from error
  for text in _PROBE:
    if (a := _ids(ours, text)) != (b := _ids(theirs, text)):
      raise TokenizerError(
        f"{path}: {text!r} has the ids {a}, not {b}, once GGUF's keys say what it does. {_HELP}"
      )
  return found


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
  try:
    return tokenizer.encode(text)
  except TokenizerError:  # A small vocabulary need not write everything.
    return None


def _metadata(vocabulary: Vocabulary, document: dict[str, Any], vocab_size: int) -> dict[str, Any]:
  texts, kinds = padded(vocabulary.texts, vocabulary.kinds, vocab_size)
  values: dict[str, Any] = {"tokens": texts, "token_type": [int(kind) for kind in kinds]}
  merges = [(left, right) for left, right in json_vocab.merges(document)]
  if vocabulary.byte_level:
    values |= {"model": "gpt2", "pre": _pre(document)}
    values["merges"] = [f"{left} {right}" for left, right in merges]
    if any(merge.count(" ") != 1 for merge in values["merges"]):
      raise TokenizerError(f"a merge has a space in it, which GGUF cannot say. {_HELP}")
  else:
    _check_spaces(document)
    values |= {"model": "llama", "pre": "default"}
    values["scores"] = _scores(merges, texts, kinds)
    values["add_space_prefix"] = vocabulary.adds_space
  ids = {
    "bos_token_id": vocabulary.bos_id,
    "eos_token_id": vocabulary.eos_id,
    "unknown_token_id": vocabulary.unknown_id,
  }
  values |= {name: id for name, id in ids.items() if id is not None}
  values |= {"add_bos_token": vocabulary.add_bos, "add_eos_token": vocabulary.add_eos}
  found = {_PREFIX + name: value for name, value in values.items()}
  if vocabulary.chat_template is not None:
    found["tokenizer.chat_template"] = vocabulary.chat_template
  return found


def _padding(path: Path, vocabulary: Vocabulary) -> dict[str, Any]:
  """The padding token of tokenizer_config.json; llama.cpp keeps it from being sampled."""
  config_path = path.with_name("tokenizer_config.json")
  config = json_vocab.read_document(config_path) if config_path.exists() else {}
  token = config.get("pad_token")
  text = token.get("content") if isinstance(token, dict) else token
  if text not in vocabulary.texts:
    return {}
  return {f"{_PREFIX}padding_token_id": vocabulary.texts.index(text)}


def _pre(document: Mapping[str, Any]) -> str:
  """GGUF's name for how words are cut."""
  normalizer = document.get("normalizer")
  if normalizer is not None and normalizer["type"] != "NFC":
    raise TokenizerError(f"GGUF cannot say its normalizer, {normalizer!s:.200}. {_HELP}")
  patterns = _patterns(document["pre_tokenizer"])
  ignore_merges = bool(document["model"].get("ignore_merges"))
  for name in (*_PREFERRED, *sorted(PRE_TOKENIZERS)):
    pre = PRE_TOKENIZERS[name]
    if pre.patterns == patterns and pre.ignore_merges == ignore_merges:
      return name
  raise TokenizerError(
    f"GGUF has no name that q4jax knows for how it cuts words: {patterns!r:.300}, ignore_merges "
    f"{ignore_merges}. {_HELP}"
  )


def _patterns(part: Mapping[str, Any]) -> tuple[str, ...]:
  """The patterns by which a pre-tokeniser cuts, one after the other, as pretokenizers.py has them.

  Raises:
    TokenizerError: a part of it does something else than that.
  """
  kind = part["type"]
  if kind == "Sequence":
    return tuple(p for child in part["pretokenizers"] for p in _patterns(child))
  if kind == "ByteLevel" and not part.get("add_prefix_space", True):
    return (_BYTE_LEVEL,) if part.get("use_regex", True) else ()
  if kind == "Digits" and part["individual_digits"]:
    return (r"\p{N}",)
  plain = kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]
  if plain and "Regex" in part["pattern"]:
    pattern = part["pattern"]["Regex"]
    known = _SPELLINGS.get(pattern)
    return PRE_TOKENIZERS[known].patterns if known else (pattern,)
  raise TokenizerError(f"GGUF cannot say this part of its pre_tokenizer: {part!r:.200}. {_HELP}")


def _check_spaces(document: Mapping[str, Any]) -> None:
  """Raises TokenizerError where more is done to a text than to write its spaces as pieces do."""
  model = document["model"]
  options = {"byte_fallback": True, "fuse_unk": True, "ignore_merges": False}
  for name, value in options.items():
    if bool(model.get(name)) != value:
      raise TokenizerError(
        f"model.{name} is {model.get(name)!r}; GGUF's 'llama' vocabularies need {value}. {_HELP}"
      )
  for part in (document.get("normalizer"), document.get("pre_tokenizer")):
    for step in _steps(part):
      known = (
        (step["type"] == "Prepend" and step["prepend"] == SPACE)
        or (
          step["type"] == "Replace"
          and step["pattern"] == {"String": " "}
          and step["content"] == SPACE
        )
        or (
          step["type"] == "Metaspace"
          and step.get("replacement") == SPACE
          and not step.get("split", True)
        )
      )
      if not known:
        raise TokenizerError(f"GGUF cannot say this part of it: {step!r:.200}. {_HELP}")


def _steps(part: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
  if part is None:
    return []
  inner = part.get("normalizers", part.get("pretokenizers"))
  return [part] if inner is None else [step for child in inner for step in _steps(child)]


def _scores(
  merges: Sequence[tuple[str, str]], texts: Sequence[str], kinds: Sequence[Kind]
) -> list[float]:
  """A score for each piece, from which the same merges follow: the earlier, the higher.

  SentencePiece joins the pair whose piece has the best score, whichever pair makes it. So each
  piece must have all its pairs among the merges, one after the other.
  """
  ids = plain_ids(texts, kinds)
  pieces = {text for text, id in ids.items() if kinds[id] != Kind.BYTE}
  rank: dict[str, int] = {}
  last = ""
  for left, right in merges:
    piece = left + right
    if piece in rank and piece != last:
      raise TokenizerError(
        f"the merges that make {piece!r} do not follow each other, so no scores give the same "
        f"order. {_HELP}"
      )
    rank.setdefault(piece, len(rank))
    last = piece
  made = {merge for merge in merges if merge[0] in pieces and merge[1] in pieces}
  for piece in pieces:
    if kinds[ids[piece]] != Kind.NORMAL:
      continue  # Found in a text before anything is merged.
    for cut in range(1, len(piece)):
      pair = piece[:cut], piece[cut:]
      if pair[0] in pieces and pair[1] in pieces and pair not in made:
        raise TokenizerError(
          f"no merge makes {piece!r} of {pair[0]!r} and {pair[1]!r}, and a 'llama' vocabulary of "
          f"GGUF would. {_HELP}"
        )
  return [-float(rank.get(text, len(rank))) for text in texts]
