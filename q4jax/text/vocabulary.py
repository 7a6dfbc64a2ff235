"""A vocabulary as its file describes it: what every tokenizer is made from."""

import dataclasses
import enum
import re
from collections.abc import Iterable, Sequence

import tokenizers

from q4jax.errors import TokenizerError

SPACE = "\u2581"  # How SentencePiece vocabularies write a space: a lower one-eighth block.
BYTE_TEXT = re.compile("<0x[0-9A-F]{2}>")
MAX_TOKENS = 1 << 20  # The largest published vocabularies have 262,144.

# Tokens that end a turn or a document, whatever key names them. Files often declare them as plain
# text; kept so, they would neither stop a generation nor be kept out of user text.
ENDS = frozenset(
  {
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
  }
)
# These are also HTML or prose: they end something only where the file makes them control tokens.
_ENDS_IF_CONTROL = frozenset({"</s>", "<eos>", "[EOS]"})


class Kind(enum.IntEnum):
  """What a token is for; the numbers are GGUF's `tokenizer.ggml.token_type`."""

  NORMAL = 1  # plain text
  UNKNOWN = 2  # stands for text that no other token can write
  CONTROL = 3  # structure: no text may become it unless special tokens are asked for
  USER_DEFINED = 4  # plain text that is never divided
  UNUSED = 5
  BYTE = 6  # one byte, written <0xNN>


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Tokens, their kinds, and the rules to apply them.

  `first` and `later` turn plain text (the first of a prompt; any after a special token) into ids.
  They hold no control token, so plain text cannot become one. An id equal to `len(texts)` stands
  for text that no token can write.
  """

  texts: list[str]
  kinds: list[Kind]
  first: tokenizers.Tokenizer
  later: tokenizers.Tokenizer
  byte_level: bool  # texts are bytes in GPT-2's printable alphabet; else UTF-8 with SPACE for " "
  adds_space: bool  # encoding puts a space before the text; decoding takes it away
  unknown_id: int | None
  bos_id: int | None
  eos_id: int | None
  add_bos: bool
  add_eos: bool
  stop_ids: frozenset[int]
  chat_template: str | None


def padded(texts: Sequence[str], kinds: Sequence[Kind], size: int) -> tuple[list[str], list[Kind]]:
  """Texts and kinds of `size` ids; an id that no token has gets a text that no other has.

  Raises:
    TokenizerError: there are more tokens than ids, or tokens are called as unused ids are.
  """
  if len(texts) > size:
    raise TokenizerError(
      f"it has ids up to {len(texts) - 1}, and the embedding table {size} rows. Do the files "
      "belong to one model?"
    )
  missing = size - len(texts)
  named = [text or f"[PAD{id}]" for id, text in enumerate([*texts, *[""] * missing])]
  if len(set(named)) < size:
    raise TokenizerError(
      "it has two tokens of one text, or tokens called [PAD...], as unused ids are. Use a GGUF "
      "file of the model."
    )
  return named, [*kinds, *[Kind.UNUSED] * missing]


def byte_alphabet() -> dict[int, str]:
  """GPT-2's printable character for each byte.

  Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 onwards
  (Radford et al. 2019, released code; the ids of every byte-level BPE depend on it).
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def stop_ids(
  texts: Sequence[str], kinds: Sequence[Kind], named: Iterable[int | None]
) -> frozenset[int]:
  """The tokens that end a generation: those the file names, and those known by their text."""
  known = {
    id
    for id, text in enumerate(texts)
    if text in ENDS or (text in _ENDS_IF_CONTROL and kinds[id] == Kind.CONTROL)
  }
  return frozenset(known.union(id for id in named if id is not None))
