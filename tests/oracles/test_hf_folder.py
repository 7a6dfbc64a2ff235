"""llama.cpp on a GGUF that was converted from a Hugging Face folder, beside its hand-written twin.

The tokenizer is a trained tokenizer.json, so llama.cpp's ids are checked too.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import hf_model
import q4jax
from oracles.models import FLOAT_SPECS, Spec, prompt
from q4jax.offline.convert import convert

pytestmark = pytest.mark.oracle

QWEN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = ["Hello world, don't stop 123!", "Grüße 世界 привет \U0001f642", "x = [1,\n\t 2]  \n\n# y"]


def train(folder: Path, size: int) -> Tokenizer:
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(QWEN), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=size - 5,  # The table is larger than the vocabulary, as Qwen's is.
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS * 5, trainer)
  tokenizer.save(str(folder / "tokenizer.json"))
  config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return tokenizer


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("spec", FLOAT_SPECS, ids=lambda spec: spec.name)
def test_llama_cpp_loads_what_was_converted(spec: Spec, dtype: str, tmp_path: Path) -> None:
  pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: `make oracles`")
  from oracles.llama_cpp_peer import LlamaCpp

  folder = hf_model.write(
    tmp_path / "hf", hf_model.config(spec), hf_model.tensors(spec, dtype), shards=2
  )
  tokenizer = train(folder, spec.vocab)
  convert(folder, tmp_path / "model.gguf")
  peer, ours = LlamaCpp(tmp_path / "model.gguf", spec.context), q4jax.load(folder)
  again = q4jax.load(tmp_path / "model.gguf")
  for text in TEXTS:
    wanted = tokenizer.encode(text, add_special_tokens=False).ids
    assert peer.encode(text).tolist() == wanted
    assert ours.tokenizer.encode(text) == again.tokenizer.encode(text) == wanted
  tokens = prompt(spec)
  theirs = peer.logits(tokens)
  # llama.cpp rounds activations to bfloat16 where the weights are.
  atol = 2e-5 if dtype == "F32" else 0.05
  np.testing.assert_allclose(np.asarray(ours.logits(tokens))[0], theirs, atol=atol)
  np.testing.assert_array_equal(np.asarray(ours.logits(tokens)), np.asarray(again.logits(tokens)))


def test_llama_cpp_reads_scores_made_of_merges(tmp_path: Path) -> None:
  pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: `make oracles`")
  from oracles.llama_cpp_peer import LlamaCpp

  spec = Spec("hf-spm", d_model=64, d_ffn=64, layers=1, heads=2, head_dim=32, vocab=32000)
  folder = hf_model.write(tmp_path / "hf", hf_model.config(spec), hf_model.tensors(spec))
  tokenizer, _ = hf_model.llama2_tokenizer()
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  convert(folder, tmp_path / "model.gguf")
  peer = LlamaCpp(tmp_path / "model.gguf", spec.context)
  for text in [*TEXTS, "  two spaces", "The quick brown fox jumps over the lazy dog."]:
    wanted = [1, *tokenizer.encode(text, add_special_tokens=False).ids]
    assert peer.encode(text).tolist() == wanted, text
    assert q4jax.load(folder).tokenizer.encode(text) == wanted, text
