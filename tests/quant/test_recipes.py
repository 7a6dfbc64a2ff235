"""llama.cpp's own choices, as recorded from it (tests/oracles/record_mixes.py)."""

import json
from pathlib import Path

import pytest

from oracles.models import MIX_SPECS, Spec, shapes
from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError
from q4jax.quant.recipes import MIXES, mix_format

RECORD = json.loads((Path(__file__).parents[1] / "data" / "llama_cpp_mixes.json").read_text())


def config_of(spec: Spec) -> LlamaConfig:
  return LlamaConfig(
    architecture=spec.architecture,
    vocab_size=spec.vocab,
    context_length=256,
    d_model=spec.d_model,
    d_ffn=spec.d_ffn,
    num_layers=spec.layers,
    num_heads=spec.heads,
    num_kv_heads=spec.kv_heads,
    head_dim=spec.head_dim,
    tied=spec.tied,
  )


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", MIX_SPECS)
def test_every_matrix_gets_llama_cpps_type(name: str, mix: str) -> None:
  spec = MIX_SPECS[name]
  found: dict[str, list[str]] = {}
  for tensor, shape in shapes(spec):
    if len(shape) == 2:
      format = mix_format(mix, tensor, shape[1], config_of(spec))
      found.setdefault(format, []).append(tensor.removesuffix(".weight"))
  want = RECORD["models"][name][mix]
  got = {t: len(n) if isinstance(want.get(t), int) else sorted(n) for t, n in found.items()}
  assert got == want


def test_importances_give_the_first_ffn_down_a_minimum() -> None:
  config = config_of(MIX_SPECS["untied"])
  name = "blk.1.ffn_down.weight"
  assert mix_format("q4_0", name, 512, config) == "q4_0"
  assert mix_format("q4_0", name, 512, config, importance=True) == "q4_1"
  assert mix_format("q5_0", name, 512, config, importance=True) == "q5_1"
  assert mix_format("q4_0", "blk.2.ffn_down.weight", 512, config, importance=True) == "q4_0"


def test_unknown_mix() -> None:
  with pytest.raises(ConfigError, match="no type 'q4_x'; choose one of q4_0, "):
    mix_format("q4_x", "output.weight", 256, config_of(MIX_SPECS["tied"]))
