"""Tokenizers against llama.cpp's vectors, sentencepiece, and the makers' own recipes."""

import base64
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from q4jax.errors import TokenizerError
from q4jax.text.tokenizer import Tokenizer
from q4jax.text.vocabulary import byte_alphabet
from shared_data import shared

PREFIX = "tokenizer.ggml."
FAMILY = "👨\u200d👩\u200d👧\u200d👦"  # seven code points, one glyph
TEXTS = st.lists(
  st.one_of(
    st.text(max_size=8),
    st.sampled_from(
      [
        "the ",
        " Hello",
        "HTTPServer",
        "don't",
        "'LL",
        "  ",
        "\n\n",
        " \t ",
        "\r\n",
        "12345",
        "3.14",
      ]
    ),
    st.sampled_from(
      [FAMILY, "e\u0301", "é", "ក្នុង", "工作", "한국어", "\u2581", "<s>", "<0x41>", "�"]
    ),
  ),
  max_size=12,
).map("".join)
LONG_WORDS = "the theme then there these them thesis other another mother father 1234 12 😀😃 ééé"


@functools.cache
def gguf_metadata(path: Path) -> dict[str, Any]:
  fields = gguf.GGUFReader(path).fields
  return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


@functools.cache
def from_gguf(name: str) -> Tokenizer:
  return Tokenizer.from_gguf_metadata(gguf_metadata(shared(name)))


@functools.cache
def llama3_metadata() -> dict[str, Any]:
  """The `llama-bpe` vocabulary that the .out file was made with, from tiktoken's ranks."""
  alphabet = byte_alphabet()
  lines = shared("tokenizers/tokenizer_llama3.tiktoken").read_bytes().splitlines()
  ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
  merges = []
  for token in ranks:
    cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
    pairs = [(a, b) for a, b in cuts if a in ranks and b in ranks]
    merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))

  def written(token: bytes) -> str:
    return "".join(alphabet[byte] for byte in token)

  special = ["<|begin_of_text|>", "<|end_of_text|>"]
  special += [f"<|reserved_special_token_{i}|>" for i in range(4)]
  special += [
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
  ]
  special += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
  return {
    PREFIX + "model": "gpt2",
    PREFIX + "pre": "llama-bpe",
    PREFIX + "tokens": [*map(written, ranks), *special],
    PREFIX + "token_type": np.array([1] * len(ranks) + [3] * len(special), np.int32),
    PREFIX + "merges": [f"{written(a)} {written(b)}" for a, b in merges],
    PREFIX + "bos_token_id": 128000,
    PREFIX + "eos_token_id": 128001,
  }


@functools.cache
def llama3() -> Tokenizer:
  return Tokenizer.from_gguf_metadata(llama3_metadata())


def vectors(name: str) -> list[tuple[str, list[int]]]:
  path = shared(f"tokenizers/ggml-vocab-{name}.gguf.inp")
  texts = path.read_bytes().decode().split("\n__ggml_vocab_test__\n")
  lines = path.with_suffix(".out").read_text().split("\n")
  return [(text, list(map(int, line.split()))) for text, line in zip(texts, lines, strict=False)]


# --- Small vocabularies of our own, for what needs no real model. ---


def spm_metadata(**changes: Any) -> dict[str, Any]:
  """A SentencePiece vocabulary: three special tokens, all bytes, a few pieces."""
  pieces = [
    "▁",
    "a",
    "b",
    "c",
    "ab",
    "▁a",
    "bc",
    "▁ab",
    "abc",
    "▁▁",
    "é",
    "<s",
    "s>",
    "<",
    ">",
    "s",
  ]
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "<mask>"]
  metadata = {
    "model": "llama",
    "tokens": tokens,
    "scores": np.array([0.0] * 259 + [-float(i) for i in range(len(pieces) + 1)], np.float32),
    "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4], np.int32),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
  }
  return {PREFIX + key: value for key, value in (metadata | changes).items() if value is not None}


@functools.cache
def trained_bpe() -> tuple[list[str], list[str]]:
  """Tokens and merges of a byte-level BPE that the library trains on a few words."""
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|bos|>", "<|eot_id|>", "<|eos|>"],
    show_progress=False,
  )
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.train_from_iterator([LONG_WORDS] * 10, trainer)
  model = json.loads(tokenizer.to_str())["model"]
  merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
  return sorted(model["vocab"], key=model["vocab"].__getitem__), merges


def bpe_metadata(**changes: Any) -> dict[str, Any]:
  tokens, merges = trained_bpe()
  metadata = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": [*tokens, "<tool>"],
    "token_type": np.array([3, 3, 3] + [1] * (len(tokens) - 3) + [4], np.int32),
    "merges": merges,
    "bos_token_id": 0,
    "eos_token_id": 2,
  }
  return {PREFIX + key: value for key, value in (metadata | changes).items() if value is not None}


def spm(**changes: Any) -> Tokenizer:
  return Tokenizer.from_gguf_metadata(spm_metadata(**changes))


def bpe(**changes: Any) -> Tokenizer:
  return Tokenizer.from_gguf_metadata(bpe_metadata(**changes))


SPM, BPE = spm(), bpe()
SPM_KINDS = spm_metadata()[PREFIX + "token_type"]


# --- Against others. ---


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "qwen2", "llama-bpe"])
def test_llama_cpp_vectors(name: str) -> None:
  # llama.cpp made these without BOS. Of llama-bpe we have the ranks, of the others the GGUF file.
  tokenizer = llama3() if name == "llama-bpe" else from_gguf(f"tokenizers/ggml-vocab-{name}.gguf")
  cases = vectors(name)
  assert len(cases) > 40
  for text, ids in cases:
    assert tokenizer.encode(text, add_special=False) == ids, repr(text)
    assert tokenizer.decode(ids) == text


# The second model also normalises: it joins spaces and applies NFKC, which a GGUF file cannot say.
# So it is compared where that changes nothing.
PLAIN_WORDS = st.lists(st.text("etaoin.,!'ETAOI059", min_size=1)).map(" ".join)


@pytest.mark.parametrize(
  "gguf_file, model, texts",
  [
    ("tokenizers/ggml-vocab-llama-spm.gguf", "tokenizers/tokenizer.model", TEXTS),
    ("models/stories260K-f32.gguf", "tokenizers/stories260K-tok512.model", PLAIN_WORDS),
  ],
)
@given(data=st.data())
def test_sentencepiece(
  gguf_file: str, model: str, texts: st.SearchStrategy[str], data: st.DataObject
) -> None:
  ours, theirs = from_gguf(gguf_file), sentencepiece_model(model)
  text = data.draw(texts)
  ids = theirs.encode(text)
  assert ours.encode(text, add_special=False) == ids
  assert ours.encode(text) == [theirs.bos_id(), *ids]
  assert ours.decode(ids) == theirs.decode(ids)


@functools.cache
def sentencepiece_model(name: str) -> sentencepiece.SentencePieceProcessor:
  return sentencepiece.SentencePieceProcessor(model_file=str(shared(name)))


@given(text=st.text("abc<s> é", max_size=30))
def test_sentencepiece_merges_the_best_score_first(text: str) -> None:
  metadata = spm_metadata(add_space_prefix=False)
  normal = metadata[PREFIX + "token_type"] == 1
  scores = {
    token: score
    for token, score, usable in zip(
      metadata[PREFIX + "tokens"], metadata[PREFIX + "scores"], normal, strict=True
    )
    if usable
  }
  symbols = list(text.replace(" ", "▁"))
  while True:  # The algorithm's definition: join the best pair, the leftmost of equals.
    pairs = list(map("".join, itertools.pairwise(symbols)))
    best = max((pair for pair in pairs if pair in scores), key=scores.__getitem__, default=None)
    if best is None:
      break
    at = pairs.index(best)
    symbols[at : at + 2] = [best]
  ours = Tokenizer.from_gguf_metadata(metadata)
  assert [ours.id_to_piece(id) for id in ours.encode(text, add_special=False)] == symbols


def llama3_recipe(digits: str) -> list[pre_tokenizers.PreTokenizer]:
  contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
  pattern = (
    contraction + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
  )
  return [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")]


# How the makers' tokenizer.json cut words, before a ByteLevel that cuts no more.
GPT2_REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
RECIPES: dict[str, list[pre_tokenizers.PreTokenizer]] = {
  "gpt-2": [GPT2_REGEX],
  "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2_REGEX],
  "llama-bpe": [
    *llama3_recipe(r"\p{N}{1,3}"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ],
  "qwen2": [
    *llama3_recipe(r"\p{N}"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ],
}


@functools.cache
def recipe(pre: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
  metadata = gguf_metadata(shared("tokenizers/ggml-vocab-gpt-2.gguf")) | {PREFIX + "pre": pre}
  metadata[PREFIX + "add_bos_token"] = False
  ids = {token: id for id, token in enumerate(metadata[PREFIX + "tokens"])}
  merges = [tuple(merge.split(" ")) for merge in metadata[PREFIX + "merges"]]
  theirs = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
  theirs.pre_tokenizer = pre_tokenizers.Sequence(RECIPES[pre])
  theirs.decoder = decoders.ByteLevel()
  return Tokenizer.from_gguf_metadata(metadata), theirs


@pytest.mark.parametrize("pre", RECIPES)
@given(text=TEXTS)
def test_byte_level_as_the_makers_cut_words(pre: str, text: str) -> None:
  ours, theirs = recipe(pre)
  ids = theirs.encode(text).ids
  assert ours.encode(text) == ids
  assert ours.decode(ids) == text


@given(text=st.text(max_size=20))
def test_byte_alphabet_is_the_library_s(text: str) -> None:
  words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
  written = "".join(byte_alphabet()[byte] for byte in text.encode())
  assert written == "".join(word for word, _ in words)


# --- Decoding and streams. ---


@pytest.mark.parametrize("tokenizer", [SPM, BPE], ids=["spm", "bpe"])
@given(data=st.data())
def test_stream_says_what_decode_says(tokenizer: Tokenizer, data: st.DataObject) -> None:
  any_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20)
  ids = data.draw(any_ids) + tokenizer.encode(data.draw(TEXTS)) + data.draw(any_ids)
  skip, continues = data.draw(st.booleans()), data.draw(st.booleans())
  text = tokenizer.decode(ids, skip_special=skip, continues=continues)
  stream, shown = tokenizer.stream(skip, continues), ""
  for id in ids:
    shown += stream.push(id)
    assert text.startswith(shown)  # never taken back
  assert shown + stream.flush() == text


@pytest.mark.parametrize("tokenizer", [SPM, BPE], ids=["spm", "bpe"])
@given(text=TEXTS)
def test_stream_needs_no_flush_for_whole_characters(tokenizer: Tokenizer, text: str) -> None:
  stream = tokenizer.stream()
  pushed = [stream.push(id) for id in tokenizer.encode(text)]
  assert "".join(pushed) == text.replace("\u2581", " " if tokenizer is SPM else "\u2581")
  assert stream.flush() == ""


def test_stream_holds_back_half_a_character() -> None:
  ids = [SPM.piece_to_id(f"<0x{byte:02X}>") for byte in "é😀".encode()]
  stream = SPM.stream()
  assert [stream.push(id) for id in ids] == ["", "é", "", "", "", "😀"]
  assert stream.push(ids[2]) == "" and stream.flush() == "\ufffd"


def test_invalid_utf8_becomes_replacement_characters_only_where_it_is_invalid() -> None:
  def decode(*data: int) -> str:
    return SPM.decode([SPM.piece_to_id(f"<0x{byte:02X}>") for byte in data])

  assert decode(0x41, 0xFF, 0x42) == "A\ufffdB"
  assert decode(0xE2, 0x82, 0x41) == "\ufffdA"  # a cut "€" is one error
  assert decode(0xED, 0xA0, 0x80) == "\ufffd" * 3  # a surrogate is no character


@given(ids=st.lists(st.integers(3, BPE.vocab_size - 2), max_size=30))
def test_byte_level_decode_is_the_library_s(ids: list[int]) -> None:
  pieces = [BPE.id_to_piece(id) for id in ids]
  assert BPE.decode(ids) == decoders.ByteLevel().decode(pieces)


def test_leading_space() -> None:
  ids = SPM.encode("ab ab", add_special=False)
  assert [SPM.id_to_piece(id) for id in ids] == ["▁ab", "▁ab"]
  assert SPM.decode(ids) == "ab ab"
  assert SPM.decode([1, *ids]) == "ab ab"
  assert SPM.decode(ids, continues=True) == " ab ab"
  assert SPM.decode(SPM.encode("  ab")) == "  ab"
  assert spm(add_space_prefix=False).decode(ids) == " ab ab"
  assert BPE.decode(BPE.encode(" the")) == " the"


def test_token_bytes() -> None:
  assert SPM.token_bytes(SPM.piece_to_id("▁ab")) == b" ab"
  assert SPM.token_bytes(SPM.piece_to_id("<0xFF>")) == b"\xff"
  assert SPM.token_bytes(1) == b"<s>"
  assert b"".join(map(BPE.token_bytes, BPE.encode("é the", add_special=False))) == "é the".encode()


@pytest.mark.parametrize("id", [-1, SPM.vocab_size, 1 << 40])
def test_ids_out_of_range(id: int) -> None:
  for decode in (SPM.token_bytes, SPM.id_to_piece, SPM.stream().push, lambda id: SPM.decode([id])):
    with pytest.raises(TokenizerError, match=f"{id}.* 0 to {SPM.vocab_size - 1}"):
      decode(id)
  with pytest.raises(TokenizerError, match="'nope'"):
    SPM.piece_to_id("nope")


# --- Special tokens. ---


@pytest.mark.parametrize("tokenizer", [SPM, BPE], ids=["spm", "bpe"])
@given(text=st.lists(st.sampled_from(["<s>", "</s>", "<unk>", "<|eot_id|>", "<", "s", ">", "a "])))
def test_plain_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: list[str]) -> None:
  ids = tokenizer.encode("".join(text), add_special=False)
  assert all(id > 2 for id in ids)
  assert tokenizer.decode(ids) == "".join(text)


def test_merges_and_whole_words_do_not_make_control_tokens() -> None:
  # "<s" + ">" would be the best merge of SPM; "the" a whole word of BPE with ignore_merges.
  assert SPM.encode("<s>", add_special=False) == [
    SPM.piece_to_id(piece) for piece in ("▁", "<s", ">")
  ]
  metadata = bpe_metadata(pre="llama-bpe")
  the = metadata[PREFIX + "tokens"].index("the")
  assert the in Tokenizer.from_gguf_metadata(metadata).encode("the")
  metadata[PREFIX + "token_type"][the] = 3
  tokenizer = Tokenizer.from_gguf_metadata(metadata)
  assert the not in tokenizer.encode("the the")
  assert tokenizer.decode(tokenizer.encode("the then")) == "the then"
  assert tokenizer.encode("the", parse_special=True)[1:] == [the]


def test_bytes_are_not_read_from_text() -> None:
  assert SPM.piece_to_id("<0x41>") not in SPM.encode("<0x41>")
  assert SPM.decode(SPM.encode("<0x41>")) == "<0x41>"


def test_special_tokens_are_read_on_request() -> None:
  ids = BPE.encode("the<|eot_id|>the<|bos|>", parse_special=True)
  the = BPE.encode("the", add_special=False)
  assert ids == [*the, 1, *the, 0]
  assert BPE.decode(ids) == "thethe"
  assert BPE.decode(ids, skip_special=False) == "the<|eot_id|>the<|bos|>"
  assert BPE.split("a<|eot_id|><|bos|>b", parse_special=True) == ["a", 1, 0, "b"]
  assert BPE.split("<<|eot_id|>", parse_special=True) == ["<", 1]


def test_user_defined_tokens_are_always_whole() -> None:
  mask, tool = SPM.piece_to_id("<mask>"), BPE.piece_to_id("<tool>")
  assert SPM.encode("a<mask>a", add_special=False) == [
    SPM.piece_to_id("▁a"), mask, SPM.piece_to_id("▁a"),
  ]  # fmt: skip
  assert tool in BPE.encode("a<tool>b")
  assert BPE.decode([tool]) == "<tool>"


def test_the_leftmost_and_longest_special_token_wins() -> None:
  tokens = [*bpe_metadata()[PREFIX + "tokens"], "<|a|>", "<|a|><|b|>", "a|><|", "|><|b|>x"]
  kinds = np.append(bpe_metadata()[PREFIX + "token_type"], [3, 3, 3, 3])
  tokenizer, first = bpe(tokens=tokens, token_type=kinds), len(tokens) - 4
  assert tokenizer.split("<|a|><|b|>x", parse_special=True) == [first + 1, "x"]
  assert tokenizer.split("<|a|><|c|>", parse_special=True) == [first, "<|c|>"]
  assert tokenizer.control_positions("<|a|><|b|>x<") == [0, 2, 3, 11]


def test_bos_and_eos() -> None:
  assert SPM.encode("")[:1] == [1] and SPM.encode("", add_special=False) == []
  assert SPM.encode("a") == [1, SPM.piece_to_id("▁a")]
  assert spm(add_bos_token=False, add_eos_token=True).encode("a")[-1] == 2
  assert BPE.encode("the") == BPE.encode("the", add_special=False)  # gpt2: only if the file says so
  assert bpe(add_bos_token=True).encode("the")[0] == 0
  assert bpe(pre="llama-bpe").encode("the")[0] == 0  # Llama 3 files may leave the key out
  assert bpe(pre="llama-bpe", add_bos_token=False).encode("the")[0] != 0
  assert SPM.encode("<s>a", parse_special=True).count(1) == 1
  silent = {"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None}
  assert (spm(**silent).bos_id, spm(**silent).eos_id) == (1, 2)  # the format's defaults
  with pytest.raises(TokenizerError, match="bos_token_id is missing"):
    spm(**silent, token_type=np.where(SPM_KINDS == 3, 1, SPM_KINDS))


def test_stop_ids() -> None:
  assert BPE.stop_ids == {1, 2}  # <|eot_id|> by its text, <|eos|> by its key
  assert bpe(eos_token_id=None, eom_token_id=5, eot_token_id=6).stop_ids == {1, 5, 6}
  assert SPM.stop_ids == {2}
  assert spm(eos_token_id=4).stop_ids == {2, 4}  # a control token </s> always ends
  kinds = bpe_metadata()[PREFIX + "token_type"]
  kinds[1] = 1  # declared as plain text, as some converters do
  tokenizer = bpe(token_type=kinds)
  assert 1 in tokenizer.stop_ids
  assert tokenizer.encode("<|eot_id|>", parse_special=True) == [1]
  assert tokenizer.decode([1]) == ""
  assert llama3().stop_ids == {128001, 128009}


def test_text_that_no_token_writes() -> None:
  kinds = spm_metadata()[PREFIX + "token_type"]
  tokenizer = spm(token_type=np.where(kinds == 6, 5, kinds))
  assert tokenizer.encode("a😀😀a", add_special=False) == [
    tokenizer.piece_to_id("▁a"), 0, tokenizer.piece_to_id("a"),
  ]  # fmt: skip
  kinds = bpe_metadata()[PREFIX + "token_type"].copy()
  kinds[BPE.piece_to_id("z")] = 5
  with pytest.raises(TokenizerError, match="no token for a character of 'zoo'"):
    bpe(token_type=kinds).encode("zoo")
  with pytest.raises(TokenizerError, match="lone surrogate"):
    BPE.encode("a\ud800")


# --- What a file may say. ---


def duplicate(tokens: list[str]) -> list[str]:
  return [*tokens[:-1], tokens[5]]


BAD: list[tuple[Callable[..., Tokenizer], dict[str, Any], str]] = [
  (spm, {"model": None}, "tokenizer.ggml.model is missing"),
  (spm, {"model": 7}, "tokenizer.ggml.model is a int"),
  (spm, {"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
  (spm, {"tokens": None}, "tokenizer.ggml.tokens is missing"),
  (spm, {"tokens": "abc"}, "tokenizer.ggml.tokens is a str"),
  (spm, {"tokens": []}, "tokenizer.ggml.tokens holds 0"),
  (spm, {"tokens": ["a", 5]}, "tokenizer.ggml.tokens holds more than strings"),
  (spm, {"tokens": ["a", "\udc80"]}, "tokenizer.ggml.tokens is not valid UTF-8"),
  (spm, {"tokens": duplicate(spm_metadata()[PREFIX + "tokens"])}, r"tokens\[275\] repeats token 5"),
  (spm, {"tokens": ["a" * 5_000_000]}, "tokenizer.ggml.tokens holds 1 tokens of up to 5000000"),
  (spm, {"tokens": [""] * 2_000_000}, "tokenizer.ggml.tokens holds 2000000"),
  (spm, {"tokens": [f"{i:01000}" for i in range(9000)]}, "9000000 in all"),
  (spm, {"scores": None}, "tokenizer.ggml.scores is missing"),
  (spm, {"scores": [1.0]}, "tokenizer.ggml.scores is float64 of shape"),
  (spm, {"scores": ["x"] * 276}, "tokenizer.ggml.scores is <U1"),
  (spm, {"scores": [[1.0], []]}, "tokenizer.ggml.scores"),
  (spm, {"scores": [float("nan")] * 276}, "tokenizer.ggml.scores holds a value that is no number"),
  (spm, {"token_type": None}, "tokenizer.ggml.token_type is missing"),
  (spm, {"token_type": [1.5] * 276}, "tokenizer.ggml.token_type is float64"),
  (spm, {"token_type": [9] * 276}, r"tokenizer.ggml.token_type\[0\] is 9"),
  (spm, {"token_type": [6] * 276}, r"tokenizer.ggml.tokens\[0\] is '<unk>' and of type 6"),
  (spm, {"bos_token_id": 276}, "tokenizer.ggml.bos_token_id is 276"),
  (spm, {"eos_token_id": -1}, "tokenizer.ggml.eos_token_id is -1"),
  (spm, {"seperator_token_id": 1 << 70}, "tokenizer.ggml.seperator_token_id"),
  (spm, {"unknown_token_id": "0"}, "tokenizer.ggml.unknown_token_id is a str"),
  (spm, {"padding_token_id": True}, "tokenizer.ggml.padding_token_id is a bool"),
  (spm, {"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is a int"),
  (bpe, {"add_bos_token": True, "bos_token_id": None}, "tokenizer.ggml.bos_token_id is missing"),
  (bpe, {"pre": None}, "tokenizer.ggml.pre is missing"),
  (bpe, {"pre": "llama-9"}, "tokenizer.ggml.pre is 'llama-9'.*llama-bpe"),
  (bpe, {"merges": None}, "tokenizer.ggml.merges is missing"),
  (bpe, {"merges": ["e qqq"]}, r"tokenizer.ggml.merges\[0\] is 'e qqq'"),
  (bpe, {"merges": ["q x"]}, r"tokenizer.ggml.merges\[0\] is 'q x'"),
  (bpe, {"merges": ["th"]}, r"tokenizer.ggml.merges\[0\] is 'th '"),
  (bpe, {"merges": [("t", "h")]}, "tokenizer.ggml.merges holds more than strings"),
  (bpe, {"add_space_prefix": True}, "tokenizer.ggml.add_space_prefix is true"),
  (
    bpe,
    {"token_type": [6] * len(bpe_metadata()[PREFIX + "tokens"])},
    r"tokenizer.ggml.tokens\[0\]",
  ),
]


@pytest.mark.parametrize("make, changes, message", BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_metadata(
  make: Callable[..., Tokenizer], changes: dict[str, Any], message: str
) -> None:
  start = time.process_time()
  with pytest.raises(TokenizerError, match=message):
    make(**changes)
  assert time.process_time() - start < 2


def test_bad_chat_template() -> None:
  with pytest.raises(TokenizerError, match="tokenizer.chat_template is a list"):
    Tokenizer.from_gguf_metadata(spm_metadata() | {"tokenizer.chat_template": ["a"]})
  metadata = spm_metadata() | {"tokenizer.chat_template": "{{ messages }}"}
  assert Tokenizer.from_gguf_metadata(metadata).chat_template == "{{ messages }}"
  assert SPM.chat_template is None


JUNK = st.one_of(
  st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5),
  st.lists(st.one_of(st.integers(-1, 9), st.text(max_size=2), st.floats()), max_size=5),
)  # fmt: skip
KEYS = [key.removeprefix(PREFIX) for key in spm_metadata() | bpe_metadata()]


@pytest.mark.parametrize("make", [spm, bpe])
@given(changes=st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=4))
def test_any_metadata_works_or_is_refused(
  make: Callable[..., Tokenizer], changes: dict[str, Any]
) -> None:
  try:
    tokenizer = make(**changes)
  except TokenizerError:
    return
  assert all(0 <= id < tokenizer.vocab_size for id in tokenizer.encode("the <s>"))


def test_empty_and_unused_tokens_are_never_written() -> None:
  tokens = [*spm_metadata()[PREFIX + "tokens"], "", "", "[PAD]"]
  tokenizer = spm(
    tokens=tokens,
    scores=[0.0] * len(tokens),
    token_type=[*spm_metadata()[PREFIX + "token_type"], 1, 3, 5],
  )
  assert tokenizer.vocab_size == len(tokens)
  assert tokenizer.decode([276, 277, 278]) == ""
  assert 278 not in tokenizer.encode("[PAD]", parse_special=True)


def test_llama3_is_built_quickly() -> None:
  metadata = llama3_metadata()
  start = time.process_time()
  Tokenizer.from_gguf_metadata(metadata)
  assert time.process_time() - start < 3  # 0.9 s of a 2-core Zen 4 machine


def test_long_text_takes_linear_time() -> None:
  start = time.process_time()
  for tokenizer in (SPM, BPE, bpe(pre="llama-bpe")):
    for unit in ("a", " ", "\n", "<", "😀", "ab "):
      assert tokenizer.decode(tokenizer.encode(unit * 20_000)) == unit * 20_000
  assert time.process_time() - start < 8
