"""`info` against what gguf-py reads from the same file."""

import json
from pathlib import Path

import gguf
import pytest

from shared_data import shared

from .conftest import CONTEXT, D_MODEL, LAYERS, VOCAB, Run, finish


def test_figures_are_those_of_gguf_py(q4jax: Run, model_file: Path) -> None:
  result = q4jax("info", model_file, "--json", "--tensors")
  about = json.loads(result.out)
  reader = gguf.GGUFReader(str(model_file))
  expected = [
    {
      "name": tensor.name,
      "type": tensor.tensor_type.name.lower(),
      "shape": [int(n) for n in reversed(tensor.shape)],
      "bytes": int(tensor.n_bytes),
    }
    for tensor in reader.tensors
  ]
  assert result.code == 0 and result.err == ""
  assert about["tensors"] == expected
  assert about["tensor_bytes"] == sum(int(t.n_bytes) for t in reader.tensors)
  assert about["parameters"] == sum(int(t.n_elements) for t in reader.tensors)
  types = {row["type"]: row for row in about["tensor_types"]}
  q8_0 = [t for t in reader.tensors if t.tensor_type.name == "Q8_0"]
  assert types["q8_0"]["tensors"] == len(q8_0)
  assert types["q8_0"]["bytes"] == sum(int(t.n_bytes) for t in q8_0)
  assert set(types) == {"q8_0", "f32"}
  bits = 8 * about["tensor_bytes"] / about["parameters"]
  assert about["bits_per_weight"] == pytest.approx(bits, abs=1e-3)
  assert about["runs"] and about["context_length"] == CONTEXT
  assert about["tokenizer"]["vocab_size"] == VOCAB and not about["chat_template"]
  # K and V of each layer at two bytes: heads * head_dim is d_model here.
  assert about["memory"]["kv_bytes_per_1024_tokens"] == 1024 * 2 * 2 * LAYERS * D_MODEL
  assert about["memory"]["weights_bytes"] == about["tensor_bytes"]


def test_page_for_people(q4jax: Run, model_file: Path) -> None:
  result = q4jax("info", model_file)
  assert result.code == 0
  for part in ("runs       yes", "2 layers, width 64", "SentencePiece", "q8_0", "no template"):
    assert part in result.out
  assert "\x1b" not in result.out and "Small ?[31mred" in result.out
  assert "blk.1.ffn_down.weight" not in result.out
  assert "blk.1.ffn_down.weight" in q4jax("info", model_file, "--tensors").out


def test_vocabulary_without_model(q4jax: Run, vocabulary_file: Path) -> None:
  about = json.loads(q4jax("info", vocabulary_file, "--json").out)
  assert not about["runs"] and "llama.attention.head_count is missing" in about["reason"]
  assert about["parameters"] == 0 and about["bits_per_weight"] is None
  assert about["tokenizer"]["vocab_size"] == VOCAB
  page = q4jax("info", vocabulary_file)
  assert page.code == 0 and "runs       no: " in page.out


def test_keys_of_the_wrong_type(q4jax: Run, tmp_path: Path) -> None:
  writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "falcon")
  writer.add_array("general.name", [1, 2])
  writer.add_array("tokenizer.ggml.model", ["a"])
  writer.add_string("falcon.context_length", "long")
  path = finish(writer, tmp_path / "odd.gguf")
  about = json.loads(q4jax("info", path, "--json").out)
  assert (about["name"], about["tokenizer"], about["context_length"]) == (None, None, None)
  assert about["architecture"] == "falcon" and "falcon" in about["reason"]
  assert q4jax("info", path).code == 0


@pytest.mark.parametrize(
  ("name", "runs", "vocab"),
  [
    ("models/stories260K-Q8_0.gguf", True, 512),
    ("models/babyllama361-Q4_1.gguf", True, 361),
    ("tokenizers/ggml-vocab-gpt-2.gguf", False, 50257),
    ("tokenizers/ggml-vocab-llama-spm.gguf", False, 32000),
  ],
)
def test_real_files(q4jax: Run, name: str, runs: bool, vocab: int) -> None:
  path = shared(name)
  about = json.loads(q4jax("info", path, "--json").out)
  assert about["runs"] is runs and about["tokenizer"]["vocab_size"] == vocab
  assert q4jax("info", path, "--tensors").code == 0
