"""Students: what is a variable of which kind, what is rounded, and what is exported."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import floats
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.formats.open import open_checkpoint, open_sink
from q4jax.model.layers import mixed_matmul
from q4jax.offline.quantize import quantize_model
from q4jax.offline.scheme import Scheme
from q4jax.qat import export
from q4jax.qat.student import Observed, Quantizer, RoundedMatmul, int8, observe, with_rounding
from q4jax.qat.variants import Recipe, initial, trained
from q4jax.quant.grid import Grid, fake_quant
from q4jax.quant.rtn import fit
from q4jax_kernels import kv_format
from q4jax_kernels.attention import causal_attention
from q4jax_kernels.kv_format import KVFormat

GRID = Grid(4, 32, "minimum")
Q = "blk.1.attn_q.weight"


def test_kinds_of_variables(small: MemoryCheckpoint, tokens: np.ndarray) -> None:
  student = initial(small, Recipe("lsq_zero", GRID, "rtn"))
  assert len(jax.tree.leaves(nnx.state(student, Quantizer))) == 2 * 14
  assert len(jax.tree.leaves(nnx.state(student, nnx.Param))) == len(small.tensors)
  student.observed = nnx.Dict({n: Observed(x) for n, x in observe(student, tokens).items()})
  assert len(jax.tree.leaves(nnx.state(student, Observed))) == 8


@pytest.mark.parametrize(
  ("variant", "weights", "quantizers"),
  [("ptq", 0, 0), ("ste_minmax", 18, 0), ("ste_search", 18, 0), ("lsq", 18, 14),
   ("lsq_zero", 18, 28), ("block_ap", 0, 14), ("lora", 28, 0)],
)  # fmt: skip
def test_what_is_trained(small: MemoryCheckpoint, variant, weights: int, quantizers: int) -> None:
  recipe = Recipe(variant, GRID, "rtn")
  filters = trained(recipe)
  for name, count in (("weights", weights), ("quantizers", quantizers)):
    state = nnx.state(initial(small, recipe), filters[name])
    assert len(jax.tree.leaves(state)) == count


def test_a_fresh_student_is_rtn(small: MemoryCheckpoint) -> None:
  student = initial(small, Recipe("lsq", GRID, "rtn"))
  w = floats(small, Q)
  np.testing.assert_array_equal(np.asarray(student.weight(Q)), fake_quant(w, GRID, fit(w, GRID)))


def test_gptq_start_is_gptq(small: MemoryCheckpoint, tokens: np.ndarray) -> None:
  student = initial(small, Recipe("lsq", GRID, "gptq"), tokens)
  made = MemoryCheckpoint(small.config, small.metadata)
  scheme = Scheme(grid=GRID, method="gptq", head="keep")
  quantize_model(small, lambda _: made, scheme, tokens=tokens)
  w = floats(small, Q)
  np.testing.assert_array_equal(np.asarray(student.weight(Q)), floats(made, Q))
  start = np.asarray(student.merged(Q))
  assert np.abs(start - w).max() < np.abs(floats(made, Q) - w).max()  # Nearer than the centres.


@pytest.mark.parametrize("suffix", ["memory", ".gguf", ".qbin", ".orbax"])
@pytest.mark.parametrize("variant", ["ste_minmax", "lsq_zero", "lora"])
def test_export_is_the_forward_pass(
  small: MemoryCheckpoint, tmp_path: Path, suffix: str, variant
) -> None:
  student = initial(small, Recipe(variant, GRID, "rtn"))
  # As if trained: everything somewhere else.
  rng, state = np.random.default_rng(0), nnx.state(student)
  moved = jax.tree.map(lambda x: x * rng.uniform(0.9, 1.1, x.shape).astype(np.float32), state)
  nnx.update(student, moved)
  if variant == "lora":
    student.lora_b[Q].set_value(0.1 * jnp.ones_like(student.lora_b[Q].get_value()))
  student.weights["token_embd.weight"].set_value(jnp.asarray(floats(small, "token_embd.weight")))
  student.weights["output_norm.weight"].set_value(jnp.asarray(floats(small, "output_norm.weight")))
  graph, variables = nnx.split(student)
  seen = jax.jit(lambda s: {n: nnx.merge(graph, s).weight(n) for n in small.tensors})(variables)
  if suffix == "memory":
    made = MemoryCheckpoint(small.config, small.metadata)
    export.write(student, small, lambda _: made)
  else:
    path = tmp_path / f"out{suffix}"
    export.write(
      student, small, lambda tensors: open_sink(path, small.config, small.metadata, tensors)
    )
    made = open_checkpoint(path)
  assert set(made.tensors) == set(seen)
  for name, value in seen.items():
    np.testing.assert_array_equal(floats(made, name), np.asarray(value), err_msg=name)
  if suffix == ".gguf":
    assert q4jax.load(path).logits([1, 2]).shape == (1, 2, 4096)


def test_fixed_codes_are_the_same_weights(small: MemoryCheckpoint) -> None:
  student = initial(small, Recipe("block_ap", GRID, "mse"))
  want = np.asarray(student.weight(Q))
  fixed = with_rounding(student, fixed_codes=True)
  fixed.weights[Q].set_value(jnp.asarray(export.group_array(student, Q).codes, jnp.float32))
  np.testing.assert_array_equal(np.asarray(fixed.weight(Q)), want)


def test_diverged_grids_are_not_exported(small: MemoryCheckpoint) -> None:
  student = initial(small, Recipe("lsq", GRID, "rtn"))
  student.scales[Q].set_value(jnp.full_like(student.scales[Q].get_value(), 1e6))
  with pytest.raises(
    ConfigError, match=r"blk\.1\.attn_q\.weight: a scale .* not finite in float16"
  ):
    export.group_array(student, Q)


@pytest.mark.parametrize("bits", [4, 8])
def test_keys_and_values_are_those_of_a_cache(bits: int) -> None:
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(1, 5, 2, 32)), jnp.float32) for _ in range(3))
  format = KVFormat(bits, 32)
  got = RoundedMatmul(keys=format, values=format).attention(q, k, v)
  rounded = [kv_format.dequantize(*kv_format.quantize(x, format), format) for x in (k, v)]
  np.testing.assert_array_equal(got, causal_attention(q, *rounded))
  assert not np.array_equal(got, causal_attention(q, k, v))
  grad = jax.grad(lambda v: RoundedMatmul(values=format).attention(q, k, v).sum())(v)
  np.testing.assert_allclose(
    grad, jax.grad(lambda v: causal_attention(q, k, v).sum())(v), rtol=1e-6
  )


def test_int8_activations() -> None:
  x = jnp.asarray([[0.4, -3.0, 1.0, 2.0]])
  y = int8(x, jnp.asarray([[2.0]]))
  np.testing.assert_allclose(y, [[25 * 2 / 127, -2.0, 1.0079, 2.0]], atol=1e-3)
  grad = jax.grad(lambda x: int8(x, jnp.asarray([[2.0]])).sum())(x)
  np.testing.assert_array_equal(grad, [[1, 0, 1, 1]])


@pytest.mark.parametrize("activations", ["token", "observed"])
def test_w4a8_rounds_the_blocks_and_not_the_head(
  small: MemoryCheckpoint, tokens: np.ndarray, activations: str
) -> None:
  plain = initial(small, Recipe("lsq", GRID, "rtn"))
  student = initial(small, Recipe("lsq", GRID, "rtn", activations=activations))
  student.observed = nnx.Dict({n: Observed(x) for n, x in observe(plain, tokens).items()})
  got, want = student(tokens), plain(tokens)
  error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
  assert 1e-5 < error < 0.2
  matmul = student._matmul()
  matmul.seen.extend([jnp.zeros(())] * 8)  # After the blocks' products comes the head's.
  w = nnx.Param(floats(small, "token_embd.weight"))
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 64)), jnp.float32)
  np.testing.assert_array_equal(matmul(x, [w])[0], mixed_matmul(x, w.get_value(), jnp.float32))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"variant": "best"}, "variant='best' is none of ptq"),
    ({"variant": "lsq_zero", "grid": Grid(4, 32, "absmax")}, "lsq_zero learns minimums"),
    ({"variant": "ste_minmax", "init": "gptq"}, "init=gptq would be lost"),
    ({"kv_bits": 5}, "kv_bits=5 is none of 16, 8, 4"),
    ({"lora_rank": 0}, "lora_rank=0"),
  ],
)
def test_recipes_that_cannot_be(options: dict, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    Recipe(**options)


def test_groups_that_do_not_fit(small: MemoryCheckpoint) -> None:
  with pytest.raises(ConfigError, match="group_size=48 does not divide"):
    initial(small, Recipe("lsq", Grid(4, 48, "absmax"), "rtn"))
