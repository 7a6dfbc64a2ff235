"""`q4jax.load` refuses every malformed file, and every valid one that is no model it can run."""

from dataclasses import replace

import pytest

from formats.malformed_gguf import corpus
from formats.raw_gguf import (
  F32,
  I32,
  STRING,
  TYPES,
  U32,
  U64,
  Cases,
  Gguf,
  Tensor,
  Value,
  array,
  good,
  one_file,
  scalar,
  text,
)
from formats.refusals import Outcome, outcomes


def more(base: Gguf) -> Cases:
  """Valid files whose keys and tensors do not make one model."""

  def key(name: str, value: Value | None, says: str | None = None) -> tuple[str, bytes]:
    return says or name, base.with_key(name, value).encode()

  def added(name: str, *ne: int, type: TYPES = TYPES.F32, says: str | None = None):
    size = 4 * ne[0] if type == TYPES.F32 else ne[0] // 32 * 34
    tensor = Tensor(name, ne, int(type), bytes(size))
    return says or name, replace(base, tensors=(*base.tensors, tensor)).encode()

  llama = "llama."
  files = {
    "blocks 1023": key(f"{llama}block_count", scalar(U32, 1023), "blk.1."),
    "blocks 1024": key(f"{llama}block_count", scalar(U32, 1024), f"{llama}block_count"),
    "blocks 2e31": key(f"{llama}block_count", scalar(U32, 2**31), f"{llama}block_count"),
    "context 2e31": key(f"{llama}context_length", scalar(U64, 2**31), f"{llama}context_length"),
    "kv heads of each layer": key(f"{llama}attention.head_count_kv", array(U32, [1])),
    "heads of each layer": key(f"{llama}attention.head_count", array(U32, [2])),
    "heads 2e20": key(f"{llama}attention.head_count", scalar(U32, 2**20), "head_count"),
    "key length 0": key(f"{llama}attention.key_length", scalar(U32, 0)),
    "key length string": key(f"{llama}attention.key_length", text("16")),
    "value length other": key(f"{llama}attention.value_length", scalar(U32, 8)),
    "rotates half": key(f"{llama}rope.dimension_count", scalar(U32, 8)),
    "experts negative": key(f"{llama}expert_count", scalar(I32, -1)),
    "window negative": key(f"{llama}attention.sliding_window", scalar(I32, -1)),
    "scaling array": key(f"{llama}rope.scaling.type", array(STRING, ["linear", "yarn"])),
    "scaling longrope": key(f"{llama}rope.scaling.type", text("longrope"), "longrope"),
    "scaling long": key(f"{llama}rope.scaling.type", text("y" * 100_000), "yyy"),
    "factor 0": key(f"{llama}rope.scaling.factor", scalar(F32, 0.0)),
    "factor string": key(f"{llama}rope.scale_linear", text("2")),
    "tokens number": key("tokenizer.ggml.tokens", scalar(U32, 293)),
    "another architecture's keys": key("general.architecture", text("qwen2"), "qwen2."),
    "experts' gate": added("blk.0.ffn_gate_inp.weight", 32),
    "q bias alone": added("blk.0.attn_q.bias", 32, says="blk.0.attn_k.bias"),
    "k bias alone": added("blk.0.attn_k.bias", 16),
    "output bias": added("blk.0.attn_output.bias", 32),
    "q norm alone": added("blk.0.attn_q_norm.weight", 16, says="blk.0.attn_k_norm.weight"),
    "a layer too many": added("blk.1.attn_norm.weight", 32),
    "adapter": added("blk.0.attn_q.weight.lora_a", 32),
    "rope factors short": added("rope_freqs.weight", 4),
    "rope factors quantised": added("rope_freqs.weight", 32, type=TYPES.Q8_0),
    "output transposed": added("output.weight", 32),
    "norm quantised": (
      "blk.0.attn_norm.weight",
      base.with_tensor(1, type=int(TYPES.Q8_0), data=bytes(34)).encode(),
    ),
  }
  for name, (says, data) in files.items():
    yield f"more {name}".replace(" ", "-"), one_file(data, says, "load")


CASES = {**corpus(), **dict(more(good()))}
SECONDS, BYTES = 1.0, 200 << 20


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
  root = tmp_path_factory.mktemp("malformed")
  paths = {name: case.write(root / name) for name, case in CASES.items()}
  # The good file comes first: it pays for the imports, and shows that the loader works.
  control = root / "good.gguf"
  control.write_bytes(good().encode())
  found = outcomes("q4jax.loading:load", [control, *paths.values()], timeout=300)
  assert not found[0].error, found[0].message
  return dict(zip(paths, found[1:], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, refusals: dict[str, Outcome]) -> None:
  found = refusals[name]
  assert "Q4JaxError" in found.error, f"{found.error[:1] or 'loaded'}: {found.message}"
  assert CASES[name].says in found.message
  assert f"{name}/" in found.message, "the error names no file"
  assert len(found.message) < 1000
  assert found.seconds < SECONDS
  assert found.growth < BYTES
