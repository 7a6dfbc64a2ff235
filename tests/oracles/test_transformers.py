"""Float weights: q4jax's logits beside Hugging Face transformers', recorded and live.

Covers the permutation of Q and K rows, Llama 3's rope scaling, GQA, tied embeddings, heads wider
than d_model / heads, and the biases and norms of Qwen. transformers is checked against the numpy
float64 Llama too, so that the other oracles rest on something we did not write.
"""

import functools
from pathlib import Path

import numpy as np
import pytest

import q4jax
from oracles.float64_llama import Float64Llama
from oracles.models import FLOAT_SPECS, SPECS, prompt, write
from oracles.questions import DATA, SMALL


@functools.cache
def recorded() -> dict[str, np.ndarray]:
  with np.load(DATA / "transformers.npz") as file:
    return dict(file)


@pytest.fixture(params=["recorded", pytest.param("live", marks=pytest.mark.oracle)])
def live(request: pytest.FixtureRequest) -> bool:
  if request.param == "live":
    for package in ("torch", "transformers"):
      pytest.importorskip(package, reason=f"{package} is not installed: `make oracles`")
  return request.param == "live"


@pytest.mark.parametrize("name", [spec.name for spec in FLOAT_SPECS])
def test_logits(name: str, live: bool, tmp_path: Path) -> None:
  spec = SPECS[name]
  path, tokens = write(spec, tmp_path / "model.gguf"), prompt(spec)
  if live:
    from oracles.transformers_peer import logits

    theirs = logits(spec, tokens)[SMALL]
  else:
    theirs = recorded()[f"small/{name}"]
  exact = Float64Llama(path).logits(tokens)[SMALL]
  mine = np.asarray(q4jax.load(path).logits(tokens))[0, SMALL]
  scale = np.abs(exact).max()
  assert np.abs(theirs - exact).max() <= 1e-5 * scale
  assert np.abs(mine - theirs).max() <= 1e-5 * scale
