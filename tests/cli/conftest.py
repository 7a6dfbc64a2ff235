"""A small GGUF model, written with gguf-py, that only ever answers in letters."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from q4jax.cli.main import main

ROOT = Path(__file__).parents[2]
D_MODEL, D_FFN, LAYERS, HEADS, CONTEXT = 64, 96, 2, 2, 8192
LETTERS = [3 + ord(letter) for letter in "abcdefghijklmnopqrstuvwxyz ."]
VOCAB = 3 + 256  # <unk>, <s>, </s>, then one token for each byte.


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A Llama of 2 layers in Q8_0, its norms in F32."""
  path = tmp_path_factory.mktemp("model") / "small.gguf"
  writer = gguf.GGUFWriter(str(path), "llama")
  writer.add_name("Small \x1b[31mred")  # An escape sequence must not reach the terminal.
  writer.add_context_length(CONTEXT)
  writer.add_embedding_length(D_MODEL)
  writer.add_block_count(LAYERS)
  writer.add_feed_forward_length(D_FFN)
  writer.add_head_count(HEADS)
  writer.add_layer_norm_rms_eps(1e-5)
  add_vocabulary(writer)
  rng = np.random.default_rng(0)

  def draw(rows: int, columns: int, scale: float = 0.3) -> np.ndarray:
    return (scale * rng.standard_normal((rows, columns))).astype(np.float32)

  embedding = np.zeros((VOCAB, D_MODEL), np.float32)
  # All other tokens have the logit 0, which is never the best of so many.
  embedding[LETTERS] = draw(len(LETTERS), D_MODEL, 1)
  matrices = {"token_embd.weight": embedding}
  for i in range(LAYERS):
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
      matrices[f"blk.{i}.{name}.weight"] = draw(D_MODEL, D_MODEL)
    for name in ("ffn_gate", "ffn_up"):
      matrices[f"blk.{i}.{name}.weight"] = draw(D_FFN, D_MODEL)
    matrices[f"blk.{i}.ffn_down.weight"] = draw(D_MODEL, D_FFN)
    for name in ("attn_norm", "ffn_norm"):
      writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(D_MODEL, np.float32))
  writer.add_tensor("output_norm.weight", np.ones(D_MODEL, np.float32))
  q8_0 = gguf.GGMLQuantizationType.Q8_0
  for name, matrix in matrices.items():
    writer.add_tensor(name, gguf.quantize(matrix, q8_0), raw_dtype=q8_0)
  return finish(writer, path)


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A GGUF file with a vocabulary, no tensors, and none of a model's keys."""
  path = tmp_path_factory.mktemp("model") / "vocabulary.gguf"
  writer = gguf.GGUFWriter(str(path), "llama")
  add_vocabulary(writer)
  return finish(writer, path)


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
  kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
  writer.add_tokenizer_model("llama")
  writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
  writer.add_token_scores([0.0] * VOCAB)
  writer.add_token_types(kinds)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_add_space_prefix(False)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


class Result:
  """What a command did: exit code, stdout, stderr."""

  def __init__(self, code: int, out: str, err: str) -> None:
    self.code, self.out, self.err = code, out, err


Run = Callable[..., Result]


@pytest.fixture
def q4jax(capsys: pytest.CaptureFixture[str]) -> Run:
  """Runs a command line in this process."""

  def run(*arguments: object) -> Result:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return Result(code, *capsys.readouterr())

  return run


def start(
  *arguments: object, env: Mapping[str, str] = os.environ, stdin: int = subprocess.DEVNULL
) -> "subprocess.Popen[str]":
  """Starts a command line in a child process; `env` adds to the environment."""
  path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
  return subprocess.Popen(
    [sys.executable, "-m", "q4jax", *map(str, arguments)],
    stdin=stdin,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    encoding="utf-8",
    env={**os.environ, **env, "PYTHONPATH": path},
  )


def finished(process: "subprocess.Popen[str]", input: str | None = None) -> Result:
  """Waits for a child."""
  out, err = process.communicate(input, timeout=120)
  return Result(process.returncode, out, err)
