"""tokenizer.model files against the sentencepiece library, which reads them itself."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as theirs_pb

import hf_model
from oracles.models import Spec
from q4jax.errors import TokenizerError
from q4jax.formats.safetensors import SafetensorsCheckpoint
from q4jax.text import sentencepiece_pb2 as ours_pb
from q4jax.text.spm_metadata import tokenizer_metadata
from q4jax.text.tokenizer import Tokenizer
from shared_data import shared

PREFIX = "tokenizer.ggml."
# Stands alone and makes pairs, doubles, bytes: what a merge may go wrong by.
TEXTS = st.text("abcdehlnorst  ▁.,!0é世\n", max_size=40)


def train(**changes: Any) -> bytes:
  """A small model of the library's own training, on sentences made from few words."""
  words = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "then", "other", "hens", "ran"]
  rng = np.random.default_rng(7)
  sentences = [" ".join(rng.choice(words, 8)) for _ in range(400)]
  found = io.BytesIO()
  options = {
    "vocab_size": 320,
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "user_defined_symbols": ["<sep>"],
    "hard_vocab_limit": False,
    "minloglevel": 2,
  }
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences), model_writer=found, **options | changes
  )
  return found.getvalue()


@pytest.fixture(scope="module")
def small() -> bytes:
  return train()


@pytest.fixture(scope="module")
def small_path(small: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp("small") / "tokenizer.model"
  path.write_bytes(small)
  return path


def check(path: Path, text: str) -> None:
  ours = Tokenizer.from_file(path)
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
  ids = theirs.encode(text)
  assert ours.encode(text, add_special=False) == ids
  assert ours.encode(text) == [theirs.bos_id(), *ids]
  assert ours.decode(ids) == theirs.decode(ids)


@given(text=TEXTS)
def test_the_librarys_ids(small_path: Path, text: str) -> None:
  check(small_path, text)


def test_llama2() -> None:
  path = shared("tokenizers/tokenizer.model")
  for text in ("Hello  world", " é世界\n\n12345", "▁x", "don't", ""):
    check(path, text)
  assert Tokenizer.from_file(path).vocab_size == 32000


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_the_space_before_a_text(add_dummy_prefix: bool, tmp_path: Path) -> None:
  path = tmp_path / "tokenizer.model"
  path.write_bytes(train(add_dummy_prefix=add_dummy_prefix))
  check(path, "the cat")


def test_every_number_of_the_format_is_the_makers() -> None:
  """Field by field: a wrong number would be read as absent, and a default be taken."""
  pairs = {
    "Model": theirs_pb.ModelProto,
    "Piece": theirs_pb.ModelProto.SentencePiece,
    "Trainer": theirs_pb.TrainerSpec,
    "Normalizer": theirs_pb.NormalizerSpec,
  }
  for name, theirs in pairs.items():
    for field in getattr(ours_pb, name).DESCRIPTOR.fields:
      other = theirs.DESCRIPTOR.fields_by_name[field.name]
      for what in ("number", "type", "default_value"):
        assert getattr(field, what) == getattr(other, what), (name, field.name, what)


def test_tokens_added_by_hugging_face(small: bytes, tmp_path: Path) -> None:
  size = len(theirs_pb.ModelProto.FromString(small).pieces)
  path = tmp_path / "tokenizer.model"
  path.write_bytes(small)
  config = {
    "add_bos_token": False,
    "add_eos_token": True,
    "eos_token": {"content": "<|im_end|>"},
    "pad_token": "<pad>",
    "chat_template": "{{ messages }}",
    "added_tokens_decoder": {
      "0": {"content": "<unk>", "special": True},
      str(size + 1): {"content": "<|im_end|>", "special": False},
      str(size + 2): {"content": "plain", "special": False},
    },
  }
  path.with_name("tokenizer_config.json").write_text(json.dumps(config))
  path.with_name("added_tokens.json").write_text(json.dumps({"<pad>": size}))
  found = tokenizer_metadata(path, size + 4)
  assert found[PREFIX + "tokens"][size:] == ["<pad>", "<|im_end|>", "plain", f"[PAD{size + 3}]"]
  assert found[PREFIX + "token_type"][size:] == [3, 3, 4, 5]
  assert found[PREFIX + "padding_token_id"] == size
  ours = Tokenizer.from_gguf_metadata(found)
  assert (ours.bos_id, ours.eos_id, ours.chat_template) == (1, size + 1, "{{ messages }}")
  cat = ours.encode("the cat", add_special=False)
  assert ours.encode("the cat") == [*cat, size + 1]
  assert ours.encode("the catplain", add_special=False) == [*cat, size + 2]
  assert size not in ours.encode("<pad>") and size in ours.encode("<pad>", parse_special=True)
  assert Tokenizer.from_file(path).vocab_size == size + 3
  with pytest.raises(TokenizerError, match=f"'plain' has the id {size + 2}, .* {size + 2} rows"):
    tokenizer_metadata(path, size + 2)


def test_a_model_folder_has_its_vocabulary(small: bytes, tmp_path: Path) -> None:
  size = len(theirs_pb.ModelProto.FromString(small).pieces)
  spec = Spec(
    "spm", d_model=32, d_ffn=48, layers=1, heads=2, kv_heads=1, head_dim=16, vocab=size + 1
  )
  folder = hf_model.write(tmp_path / "hf", hf_model.config(spec), hf_model.tensors(spec))
  with SafetensorsCheckpoint.open(folder) as found:
    assert not any(name.startswith("tokenizer") for name in found.metadata)
  (folder / "tokenizer.model").write_bytes(small)
  with SafetensorsCheckpoint.open(folder) as found:
    assert found.metadata[PREFIX + "model"] == "llama"
    assert len(found.metadata[PREFIX + "tokens"]) == size + 1


def flip(name: str, field: str, value: Any) -> Callable[[Any], None]:
  return lambda model: setattr(getattr(model, name), field, value)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (flip("trainer_spec", "model_type", 1), "chosen by UNIGRAM; q4jax reads BPE.*--tokenizer"),
    (flip("trainer_spec", "byte_fallback", False), "byte_fallback is False"),
    (flip("normalizer_spec", "precompiled_charsmap", b"x"), "precompiled_charsmap is True"),
    (flip("normalizer_spec", "remove_extra_whitespaces", True), "remove_extra_whitespaces is"),
    (flip("trainer_spec", "bos_id", 5000), "bos_token_id is 5000"),
    (lambda model: model.ClearField("pieces"), "has no pieces"),
    (lambda model: model.pieces.add(piece="<sep>"), "tokens of one text"),
    (lambda model: model.pieces.add(piece="x" * 2000), "up to 2000 characters"),
  ],
)
def test_what_it_does_not_read(
  change: Callable[[Any], None], said: str, small: bytes, tmp_path: Path
) -> None:
  model = theirs_pb.ModelProto.FromString(small)
  change(model)
  path = tmp_path / "tokenizer.model"
  path.write_bytes(model.SerializeToString())
  with pytest.raises(TokenizerError, match=said) as error:
    Tokenizer.from_file(path)
  assert str(path) in str(error.value)


def test_files_that_are_something_else(small: bytes, tmp_path: Path) -> None:
  path = tmp_path / "tokenizer.model"
  for content in (b"", b"IQ== 0\nIg== 1\n", small[:-3], small[: len(small) // 2 + 1]):
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="SentencePiece model"):
      Tokenizer.from_file(path)
  with pytest.raises(TokenizerError, match="cannot be read"):
    Tokenizer.from_file(tmp_path / "absent.model")
  path.write_bytes(small)
  for text in ('{"a": "x"}', '{"a": -1}', "[]", '{"a": null}'):
    path.with_name("added_tokens.json").write_text(text)
    with pytest.raises(TokenizerError, match="added_tokens.json|added token 'a' has the id"):
      Tokenizer.from_file(path)


@given(data=st.data())
def test_damage_is_told_or_harmless(
  small: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
  at = data.draw(st.integers(0, len(small) - 1))
  damaged = small[:at] + data.draw(st.binary(max_size=4)) + small[at + 1 :]
  path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
  path.write_bytes(damaged)
  with contextlib.suppress(TokenizerError):  # Anything else fails the test.
    Tokenizer.from_file(path).encode("the cat")
