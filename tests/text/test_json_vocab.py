"""`tokenizer.json` files made by the Hugging Face library, and encoded by it as the oracle."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
  AddedToken,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from q4jax.errors import TokenizerError
from q4jax.text.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|eot_id|>"]
TEXTS = st.lists(
  st.one_of(
    st.text(max_size=6),
    st.sampled_from(["abc ", " ab", "  ", "\n", "the then ", "e\u0301", "😀", *SPECIAL, "<tool>"]),
  ),
  max_size=10,
).map("".join)


def byte_level() -> tokenizers.Tokenizer:
  """As Qwen's: NFC, byte-level words, no BOS."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  tokenizer.train_from_iterator(["the then there abc abc"] * 5, trainer)
  return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
  pieces = ["▁", *"abcthen", "ab", "▁a", "▁ab", "th", "he", "the", "▁the", "▁▁"]
  tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
  merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("t", "h"), ("h", "e"), ("th", "e")]
  merges += [("▁", "the"), ("▁", "▁")]
  model = models.BPE(
    {token: id for id, token in enumerate(tokens)},
    merges,
    unk_token="<unk>",
    byte_fallback=True,
    fuse_unk=True,
  )
  return tokenizers.Tokenizer(model)


def llama2() -> tokenizers.Tokenizer:
  """As Llama 2's: a space before each piece of text between special tokens."""
  tokenizer = byte_fallback()
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return tokenizer


def metaspace() -> tokenizers.Tokenizer:
  """As newer ones: a space before the text only, unless it begins with one."""
  tokenizer = byte_fallback()
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return tokenizer


def complete(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
  tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
  bos = tokenizer.token_to_id("<s>")
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", bos)]
  )
  return tokenizer


MAKERS = {make.__name__: make for make in (byte_level, llama2, metaspace)}


@pytest.fixture(scope="module", params=MAKERS)
def pair(
  request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
  theirs = complete(MAKERS[request.param]())
  path = tmp_path_factory.mktemp("json") / "tokenizer.json"
  theirs.save(str(path))
  return Tokenizer.from_tokenizer_json(path), theirs


@given(text=TEXTS)
def test_encodes_and_decodes_as_the_library(
  pair: tuple[Tokenizer, tokenizers.Tokenizer], text: str
) -> None:
  ours, theirs = pair
  theirs.encode_special_tokens = False
  ids = theirs.encode(text, add_special_tokens=False).ids
  assert ours.encode(text, add_special=False, parse_special=True) == ids
  assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
  theirs.encode_special_tokens = True
  plain = theirs.encode(text).ids
  assert ours.encode(text) == plain
  bos = ours.piece_to_id("<s>")
  assert ours.encode(text)[0] == bos and ours.bos_id == bos
  assert ours.vocab_size == theirs.get_vocab_size()
  assert not {ours.piece_to_id(text) for text in SPECIAL} & set(plain[1:])


def save(folder: Path, doc: dict[str, Any], **config: Any) -> Path:
  path = folder / "tokenizer.json"
  path.write_text(json.dumps(doc))
  if config:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return path


def llama2_json() -> dict[str, Any]:
  doc: dict[str, Any] = json.loads(complete(llama2()).to_str())
  return doc


def test_tokenizer_config(tmp_path: Path) -> None:
  path = save(
    tmp_path,
    llama2_json(),
    bos_token={"content": "<s>"},
    eos_token="</s>",
    add_bos_token=False,
    add_eos_token=True,
    chat_template=[
      {"name": "rag", "template": "no"},
      {"name": "default", "template": "{{ yes }}"},
    ],
  )
  tokenizer = Tokenizer.from_tokenizer_json(path)
  eos = tokenizer.piece_to_id("</s>")
  assert tokenizer.eos_id == eos
  assert tokenizer.stop_ids == {eos, tokenizer.piece_to_id("<|eot_id|>")}
  assert tokenizer.encode("ab") == [tokenizer.piece_to_id("▁ab"), eos]
  assert tokenizer.chat_template == "{{ yes }}"
  (tmp_path / "chat_template.jinja").write_text("{{ newer }}")
  assert Tokenizer.from_tokenizer_json(path).chat_template == "{{ newer }}"


def test_bos_is_the_token_that_the_file_adds(tmp_path: Path) -> None:
  tokenizer = Tokenizer.from_tokenizer_json(save(tmp_path, llama2_json(), bos_token="</s>"))
  assert tokenizer.bos_id == tokenizer.piece_to_id("<s>") == tokenizer.encode("ab")[0]


def test_without_config_or_post_processor(tmp_path: Path) -> None:
  tokenizer = Tokenizer.from_tokenizer_json(
    save(tmp_path, llama2_json() | {"post_processor": None})
  )
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (None, None, None)
  assert tokenizer.encode("ab") == [tokenizer.piece_to_id("▁ab")]


def test_ids_left_out_are_unused(tmp_path: Path) -> None:
  doc = llama2_json()
  doc["added_tokens"][-1]["id"] = 1000
  tokenizer = Tokenizer.from_tokenizer_json(save(tmp_path, doc))
  assert tokenizer.vocab_size == 1001
  assert tokenizer.decode([999]) == ""
  assert tokenizer.encode("<tool>", add_special=False) == [1000]


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
  def change(doc: dict[str, Any]) -> None:
    for key in path[:-1]:
      doc = doc[key]
    del doc[path[-1]]

  return change


def put(value: Any, *path: str | int) -> Callable[[dict[str, Any]], None]:
  def change(doc: Any) -> None:
    for key in path[:-1]:
      doc = doc[key]
    doc[path[-1]] = value

  return change


BAD: list[tuple[Callable[[dict[str, Any]], None], str]] = [
  (drop("model"), "'model'"),
  (drop("model", "vocab"), "'vocab'"),
  (drop("model", "merges"), "'merges'"),
  (put("Unigram", "model", "type"), "model.type is 'Unigram'"),
  (put(0.1, "model", "dropout"), "model.dropout is 0.1"),
  (put("</w>", "model", "end_of_word_suffix"), "model.end_of_word_suffix"),
  (put({"a": -1}, "model", "vocab"), "ids from 0"),
  (put({"a": 1 << 40}, "model", "vocab"), "ids from 0"),
  (put(["a zzz"], "model", "merges"), r"merges\[0\] is 'a zzz'"),
  (put([["a", "b", "c"]], "model", "merges"), r"merges\[0\] is 'a b c'"),
  (put([7], "model", "merges"), "not laid out as a tokenizer.json"),
  (put("nope", "model", "unk_token"), "nope"),
  (put("a", "added_tokens", 0, "content"), "repeats a text"),
  (put(True, "added_tokens", 0, "rstrip"), "'<s>' asks for rstrip"),
  (put(None, "normalizer"), "no ByteLevel, Metaspace or Replace"),
  (put({"type": "Precompiled", "precompiled_charsmap": "AA"}, "normalizer"), "'Precompiled'"),
  (put({"type": "Replace", "pattern": {"Regex": "("}, "content": ""}, "normalizer"), "refuses"),
  (put({"type": "Mystery"}, "pre_tokenizer"), "'Mystery'"),
  (put({"type": "BertProcessing"}, "post_processor"), "'BertProcessing'"),
  (put([], "post_processor", "single"), "post_processor.single"),
  (put("zzz", "post_processor", "single", 0, "SpecialToken", "id"), "'zzz'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message[:30] for _, message in BAD])
def test_bad_file(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
  doc = llama2_json()
  change(doc)
  path = save(tmp_path, doc)
  with pytest.raises(TokenizerError, match=message) as error:
    Tokenizer.from_tokenizer_json(path)
  assert str(path) in str(error.value)


def test_bad_config(tmp_path: Path) -> None:
  with pytest.raises(TokenizerError, match="bos_token .* is 'zzz'"):
    Tokenizer.from_tokenizer_json(
      save(tmp_path, llama2_json() | {"post_processor": None}, bos_token="zzz")
    )
  with pytest.raises(TokenizerError, match="chat_template"):
    Tokenizer.from_tokenizer_json(save(tmp_path, llama2_json(), chat_template=7))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_no_json(content: bytes, tmp_path: Path) -> None:
  path = tmp_path / "tokenizer.json"
  path.write_bytes(content)
  with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
    Tokenizer.from_tokenizer_json(path)
  with pytest.raises(TokenizerError, match="cannot be read"):
    Tokenizer.from_tokenizer_json(tmp_path / "absent.json")
