"""Text to token ids and back, exactly as the model was trained, and streams of text.

Merging and cutting is the Hugging Face tokenizers library's work (`Vocabulary.first`, `.later`).
Here are the special tokens, which text becomes only on request, and the way back from ids.
"""

import bisect
import codecs
import functools
import operator
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from q4jax.errors import TokenizerError
from q4jax.text import gguf_vocab, json_vocab, spm_metadata
from q4jax.text.vocabulary import SPACE, Kind, Vocabulary, byte_alphabet

_CONTROL = (Kind.CONTROL, Kind.UNKNOWN)
_HIDDEN = (*_CONTROL, Kind.UNUSED)
_BYTES = {char: byte for byte, char in byte_alphabet().items()}


class Tokenizer:
  """Encodes text to ids and decodes ids to text; immutable, so any thread may use it.

  `from_gguf_metadata` and `from_file` make one.
  """

  def __init__(self, vocabulary: Vocabulary) -> None:
    self._vocabulary = vocabulary
    self._ids = {text: id for id, text in enumerate(vocabulary.texts) if text}
    control = {text: id for text, id in self._ids.items() if vocabulary.kinds[id] in _CONTROL}
    whole = {t: id for t, id in self._ids.items() if vocabulary.kinds[id] == Kind.USER_DEFINED}
    self._whole = _Finder(whole)
    self._control = _Finder(control)
    self._special = _Finder(whole | control)

  @classmethod
  def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
    """The tokenizer that the keys `tokenizer.*` of a GGUF file describe.

    Raises:
      TokenizerError: a key is missing, malformed, or names something unknown; the message names it.
    """
    return cls(gguf_vocab.read_vocabulary(metadata))

  @classmethod
  def from_file(cls, path: str | Path) -> "Tokenizer":
    """The tokenizer of a `tokenizer.json`, or of a SentencePiece model (its name ends in .model).

    Raises:
      TokenizerError: a file cannot be read, or asks for something that q4jax does not do.
    """
    path = Path(path)
    if path.suffix == ".model":
      return cls.from_gguf_metadata(spm_metadata.tokenizer_metadata(path))
    return cls.from_tokenizer_json(path)

  @classmethod
  def from_tokenizer_json(cls, path: str | Path) -> "Tokenizer":
    """The tokenizer of a `tokenizer.json` file.

    BOS, EOS and the chat template come from `tokenizer_config.json` and `chat_template.jinja` in
    the same folder, where they exist.

    Raises:
      TokenizerError: a file cannot be read, or asks for something that q4jax does not do.
    """
    return cls(json_vocab.read_vocabulary(Path(path)))

  @property
  def vocab_size(self) -> int:
    """Number of ids, unused ones included."""
    return len(self._vocabulary.texts)

  @property
  def bos_id(self) -> int | None:
    """The token that begins a text."""
    return self._vocabulary.bos_id

  @property
  def eos_id(self) -> int | None:
    """The token that ends a text."""
    return self._vocabulary.eos_id

  @property
  def stop_ids(self) -> frozenset[int]:
    """All tokens that end a generation: of a text, a turn, or a message."""
    return self._vocabulary.stop_ids

  @property
  def chat_template(self) -> str | None:
    """The model's own chat template, Jinja source."""
    return self._vocabulary.chat_template

  def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
    """The ids of a text.

    Args:
      text: any Unicode text.
      add_special: adds BOS and EOS where the model wants them and the text does not bring them.
      parse_special: reads control tokens such as "<|eot_id|>" in the text as tokens. Leave it False
        for text that a user wrote.

    Raises:
      TokenizerError: the text has lone surrogates, or a character that no token can write.
    """
    return self.encode_parts(self.split(text, parse_special), add_special, add_special)

  def split(self, text: str, parse_special: bool = False) -> list[str | int]:
    """Cuts text at the special tokens in it: plain text as str, tokens as their ids."""
    return (self._special if parse_special else self._whole).split(text)

  def control_positions(self, text: str) -> list[int]:
    """Where in a text a control token begins, or would if the right text followed its end."""
    return self._control.positions(text)

  def encode_parts(
    self, parts: Iterable[str | int], add_bos: bool = True, add_eos: bool = True
  ) -> list[int]:
    """The ids of plain text (str) and tokens (int) in a row; BOS and EOS as in `encode`."""
    ids: list[int] = []
    plain = self._vocabulary.first
    for part in parts:
      ids += [part] if isinstance(part, int) else self._encode_plain(plain, part)
      plain = self._vocabulary.later
    bos, eos = self.bos_id, self.eos_id
    if add_bos and self._vocabulary.add_bos and bos is not None and ids[:1] != [bos]:
      ids.insert(0, bos)
    if add_eos and self._vocabulary.add_eos and eos is not None and ids[-1:] != [eos]:
      ids.append(eos)
    return ids

  def decode(self, ids: Iterable[int], skip_special: bool = True, continues: bool = False) -> str:
    """The text of ids; invalid UTF-8 becomes U+FFFD.

    Args:
      ids: token ids.
      skip_special: leaves out control, unknown and unused tokens.
      continues: the ids follow other text, so a space that begins the first piece is kept. Else it
        is the one that encoding adds in SentencePiece vocabularies, and goes.

    Raises:
      TokenizerError: an id is not in the vocabulary.
    """
    stream = self.stream(skip_special, continues)
    return "".join([stream.push(id) for id in ids]) + stream.flush()

  def stream(self, skip_special: bool = True, continues: bool = False) -> "TextStream":
    """Decodes ids one by one; see `decode` for the arguments."""
    at_start = self._vocabulary.adds_space and not continues
    return TextStream(functools.partial(self._bytes, skip_special=skip_special), at_start)

  def token_bytes(self, id: int) -> bytes:
    """The bytes that a token writes: one UTF-8 character may take several tokens."""
    return self._bytes(id, skip_special=False)

  def id_to_piece(self, id: int) -> str:
    """The token as its vocabulary writes it, for display: "▁the", "Ġthe", "<0x0A>"."""
    return self._vocabulary.texts[self._checked(id)]

  def piece_to_id(self, piece: str) -> int:
    """The id of a token by the text that `id_to_piece` gives.

    Raises:
      TokenizerError: there is no such token.
    """
    if piece not in self._ids:
      raise TokenizerError(f"No token of the vocabulary is written {piece!r}.")
    return self._ids[piece]

  def _encode_plain(self, plain: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
      text.encode()
    except UnicodeEncodeError as e:
      raise TokenizerError(
        f"The text has a lone surrogate, {text[e.start]!r}, at {e.start}: it is not valid Unicode. "
        "Read it as UTF-8, with errors='replace' if need be."
      ) from e
    ids: list[int] = plain.encode(text, add_special_tokens=False).ids
    if self.vocab_size in ids:
      ids = [self._unknown(text) if id == self.vocab_size else id for id in ids]
    return ids

  def _unknown(self, text: str) -> int:
    if self._vocabulary.unknown_id is None:
      raise TokenizerError(
        f"The vocabulary has no token for a character of {text[:80]!r}, and none for unknown text. "
        "Leave the character out, or use another model."
      )
    return self._vocabulary.unknown_id

  def _bytes(self, id: int, skip_special: bool) -> bytes:
    id = self._checked(id)
    text, kind = self._vocabulary.texts[id], self._vocabulary.kinds[id]
    if kind in _HIDDEN:
      return b"" if skip_special else text.encode()
    if kind == Kind.BYTE:
      return bytes([int(text[3:5], 16)])
    if kind == Kind.USER_DEFINED:
      return text.encode()
    if not self._vocabulary.byte_level:
      return text.replace(SPACE, " ").encode()
    if all(char in _BYTES for char in text):
      return bytes([_BYTES[char] for char in text])
    return text.encode()

  def _checked(self, id: int) -> int:
    id = operator.index(id)
    if not 0 <= id < self.vocab_size:
      raise TokenizerError(
        f"Token id {id} is outside the vocabulary; expected 0 to {self.vocab_size - 1}. Does the "
        "tokenizer belong to this model?"
      )
    return id


class TextStream:
  """Text from ids that come one by one.

  What `push` returns is final: a character whose bytes are not all there is held back. All pushes
  and the flush together are what `decode` gives.
  """

  def __init__(self, to_bytes: "functools.partial[bytes]", at_start: bool) -> None:
    self._to_bytes = to_bytes
    self._at_start = at_start
    self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, id: int) -> str:
    """The text that this token completes, often empty."""
    piece = self._to_bytes(id)
    if self._at_start and piece:
      self._at_start = False
      piece = piece.removeprefix(b" ")
    return self._utf8.decode(piece)

  def flush(self) -> str:
    """The rest, once no id follows: U+FFFD if a character stayed incomplete."""
    return self._utf8.decode(b"", final=True)


class _Finder:
  """Finds given texts in a text: the leftmost, and of those the longest.

  Its time a character is bounded by the number of different lengths, for vocabularies come from
  strangers; an alternation of regular expressions would try every token.
  """

  def __init__(self, ids: Mapping[str, int]) -> None:
    self._ids = ids
    lengths: dict[str, set[int]] = {}
    for text in ids:
      lengths.setdefault(text[0], set()).add(len(text))
    self._lengths = {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}
    self._first = re.compile("[" + re.escape("".join(lengths)) + "]") if lengths else None
    self._sorted = sorted(ids)

  def positions(self, text: str) -> list[int]:
    """Every index where one of the texts begins, also inside another, or is cut off by the end."""
    found = self._first.finditer(text) if self._first else ()
    return [match.start() for match in found if self._begins(text, match.start())]

  def _begins(self, text: str, at: int) -> bool:
    sizes = self._lengths[text[at]]
    if any(text[at : at + size] in self._ids for size in sizes):
      return True
    rest = text[at : at + sizes[0]]
    next_one = bisect.bisect_left(self._sorted, rest)
    return len(rest) == len(text) - at and any(
      other.startswith(rest) for other in self._sorted[next_one : next_one + 1]
    )

  def split(self, text: str) -> list[str | int]:
    parts: list[str | int] = []
    done = at = 0
    while self._first and (match := self._first.search(text, at)):
      at = match.start()
      sizes = self._lengths[match[0]]
      found = next((piece for n in sizes if (piece := text[at : at + n]) in self._ids), None)
      if found is None:
        at += 1
        continue
      parts += [text[done:at]] if at > done else []
      parts.append(self._ids[found])
      done = at = at + len(found)
    return [*parts, text[done:]] if done < len(text) else parts
