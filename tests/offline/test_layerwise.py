"""The runner against the whole model: the same logits, the inputs that numpy finds, any batch."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.errors import PromptError
from q4jax.formats.checkpoint import floats
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.loading import load
from q4jax.offline.layerwise import SHARED, LayerRunner

TINY = Path(__file__).parents[2] / "experiments" / "tiny" / "tiny.f16.gguf"


@pytest.fixture
def checkpoint():
  with GGUFCheckpoint.open(TINY) as opened:
    yield opened


def tokens(b: int, t: int) -> np.ndarray:
  return np.random.default_rng(0).integers(3, 4000, (b, t), dtype=np.int32)


def run_all(runner: LayerRunner, visit=None) -> None:
  for _ in range(runner.config.num_layers):
    runner.advance(runner.read_block(), visit)


def test_logits_are_the_models(checkpoint: GGUFCheckpoint) -> None:
  ids = tokens(3, 40)
  runner = LayerRunner(checkpoint, ids)
  runner.batch = 2  # The last call is not full.
  run_all(runner)
  head = floats(checkpoint, "token_embd.weight")
  logits = np.concatenate([np.asarray(x) for x in runner.head_inputs()]) @ head.T
  want = np.asarray(load(TINY, implementation=None).logits(ids))
  # float16 weights run with activations rounded to float16 there, and in float32 here.
  assert np.abs(logits - want).max() < 0.03
  assert np.abs(logits - want).mean() < 1e-3


def test_inputs_are_what_matrices_take(checkpoint: GGUFCheckpoint) -> None:
  runner = LayerRunner(checkpoint, tokens(2, 16))
  before = runner.hidden.copy()
  weights = runner.read_block()
  (flow,) = list(runner.flows(weights))
  assert (runner.hidden == before).all() and runner.index == 0
  x64 = before.astype(np.float64)
  norm = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + runner.config.norm_eps)
  norm *= np.asarray(weights["attn_norm.weight"], np.float64)
  np.testing.assert_allclose(flow.inputs["attn_q"], norm, rtol=1e-5, atol=1e-5)
  value = norm @ np.asarray(weights["attn_v.weight"], np.float64).T
  config = runner.config
  value = value.reshape(2, 16, config.num_kv_heads, config.head_dim).swapaxes(1, 2)
  np.testing.assert_allclose(flow.values, value, rtol=1e-4, atol=1e-5)
  # The first token's attention is its own value, and K keeps its length through RoPE.
  own = np.repeat(value[:, :, 0], config.num_heads // config.num_kv_heads, axis=1).reshape(2, -1)
  np.testing.assert_allclose(flow.inputs["attn_output"][:, 0], own, rtol=1e-4, atol=1e-5)
  key = norm @ np.asarray(weights["attn_k.weight"], np.float64).T
  np.testing.assert_allclose(
    np.square(flow.keys).sum((1, 3)), np.square(key).sum(-1), rtol=1e-4, atol=1e-5
  )
  assert set(flow.inputs) == {shared[0] for shared in SHARED}
  assert flow.inputs["ffn_down"].shape == (2, 16, config.d_ffn)


def test_what_flows_does_not_depend_on_the_batch(
  checkpoint: GGUFCheckpoint, tmp_path: Path
) -> None:
  ids = tokens(5, 24)
  sums = []
  for batch, folder in ((1, None), (2, tmp_path), (5, None)):
    runner = LayerRunner(checkpoint, ids, folder)
    runner.batch = batch
    total = np.zeros(runner.config.d_ffn)
    for _ in range(2):
      weights = runner.read_block()
      for flow in runner.flows(weights):
        total += np.square(np.asarray(flow.inputs["ffn_down"], np.float64)).sum((0, 1))
      runner.advance(weights)
    sums.append((total, np.array(runner.hidden)))
  for total, hidden in sums[1:]:
    np.testing.assert_allclose(total, sums[0][0], rtol=1e-5)
    np.testing.assert_allclose(hidden, sums[0][1], rtol=1e-4, atol=1e-5)


def test_a_changed_block_changes_what_follows(checkpoint: GGUFCheckpoint) -> None:
  runner = LayerRunner(checkpoint, tokens(1, 8))
  zeros = {name: jnp.zeros_like(w) for name, w in runner.read_block().items()}
  before = runner.hidden.copy()
  runner.advance(zeros)
  np.testing.assert_array_equal(runner.hidden, before)  # Only the residual is left.


@pytest.mark.parametrize(
  "bad", [np.zeros((0, 4), np.int32), np.zeros((1, 99999), np.int32), np.full((1, 4), 10**6)]
)
def test_bad_tokens_are_refused(checkpoint: GGUFCheckpoint, bad: np.ndarray) -> None:
  with pytest.raises(PromptError, match="calibration takes|do not fit the vocabulary"):
    LayerRunner(checkpoint, bad)
