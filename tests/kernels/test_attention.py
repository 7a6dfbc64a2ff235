"""Attention, native and reference, against a float64 sum over heads, queries and slots."""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from q4jax_kernels import ffi
from q4jax_kernels.attention import (
  cached_attention,
  causal_attention,
  cpu,
  reference,
  scored_attention,
)

NATIVE = {f"native-{isa}": isa for isa in ("scalar", "avx2", "avx512", "neon")}
IMPLEMENTATIONS = ("reference", *NATIVE)
CACHE_TYPES = {"f16": np.float16, "f32": np.float32, "bf16": ml_dtypes.bfloat16}
FORGOTTEN = np.nan  # what slots hold that were never written
LAYER, LAYERS = 1, 3  # of the cache; the other layers hold FORGOTTEN


def attention(implementation: str) -> Callable[..., Any]:
  """The implementation, compiled; skips where this machine cannot run it."""
  if implementation == "reference":
    return jax.jit(functools.partial(reference.cached_attention, layer=LAYER))
  isa = NATIVE[implementation]
  if ffi.isa_name(isa) is None:
    pytest.skip(f"this processor, or this build, has no {isa}")
  return jax.jit(functools.partial(cpu.cached_attention, layer=LAYER, isa=isa))


door = functools.partial(cached_attention, layer=LAYER)


def stack(side: np.ndarray) -> jax.Array:
  """[B, K, S, H] as the layer LAYER of [LAYERS, B, K, S, H]."""
  layers = np.full((LAYERS, *side.shape), FORGOTTEN, side.dtype)
  layers[LAYER] = side
  return jnp.array(layers)


def brute_force(
  q: np.ndarray, keys: np.ndarray, values: np.ndarray, start: int, length: int
) -> np.ndarray:
  """float64[T, N, H]: one sequence, query by query, head by head."""
  t, n, h = q.shape
  out = np.zeros((t, n, h))
  group = n // keys.shape[0]
  for i in range(length):
    seen = start + i + 1
    for head in range(n):
      k, v = keys[head // group, :seen], values[head // group, :seen]
      logits = k.astype(np.float64) @ q[i, head].astype(np.float64) / np.sqrt(h)
      p = np.exp(logits - logits.max())
      out[i, head] = p / p.sum() @ v.astype(np.float64)
  return out


class Case:
  """Random inputs, and what attention and the cache must become."""

  def __init__(
    self,
    starts: list[int],
    lengths: list[int],
    *,
    t: int,
    s: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    cache: str = "f16",
    seed: int = 0,
  ) -> None:
    rng, b = np.random.default_rng(seed), len(starts)
    self.start, self.length = np.array(starts, np.int32), np.array(lengths, np.int32)
    self.q = rng.normal(size=(b, t, heads, head_dim)).astype(np.float32)
    self.k, self.v = rng.normal(size=(2, b, t, kv_heads, head_dim)).astype(np.float32)
    shape = (b, kv_heads, s, head_dim)
    type = CACHE_TYPES[cache]
    self.cache = tuple(rng.normal(size=shape).astype(type) for _ in range(2))
    for row, first in enumerate(starts):
      for side in self.cache:
        side[row, :, first:] = FORGOTTEN
    self.after = tuple(side.copy() for side in self.cache)
    for row, (first, count) in enumerate(zip(starts, lengths, strict=True)):
      for side, new in zip(self.after, (self.k, self.v), strict=True):
        side[row, :, first : first + count] = new[row, :count].swapaxes(0, 1).astype(type)

  @property
  def arguments(self) -> tuple:
    """Fresh arrays, so that donating them spoils nothing."""
    cache = tuple(stack(side) for side in self.cache)
    return (*map(jnp.array, (self.q, self.k, self.v)), cache, *map(jnp.array, self.range))

  @property
  def range(self) -> tuple[np.ndarray, np.ndarray]:
    return self.start, self.length

  def check(
    self, out: jax.Array, cache: tuple[jax.Array, jax.Array], rtol: float = 2e-5, atol: float = 2e-6
  ) -> None:
    for layers, side in zip(cache, self.after, strict=True):
      found, expected = layers, np.asarray(stack(side))  # The other layers too are as they were.
      assert found.dtype == expected.dtype
      bits = np.uint32 if found.dtype == jnp.float32 else np.uint16
      nan = np.isnan(expected.astype(np.float32))
      np.testing.assert_array_equal(np.isnan(found), nan)
      np.testing.assert_array_equal(np.asarray(found).view(bits)[~nan], expected.view(bits)[~nan])
    assert out.dtype == jnp.float32 and out.shape == self.q.shape
    for row, (first, count) in enumerate(zip(*self.range, strict=True)):
      keys, values = (side[row] for side in self.after)
      expected = brute_force(self.q[row], keys, values, first, count)
      np.testing.assert_allclose(out[row], expected, rtol=rtol, atol=atol)
      assert not np.asarray(out[row, count:]).any(), "padding is zero"


def scored(implementation: str) -> Callable[..., Any]:
  if implementation == "reference":
    return jax.jit(functools.partial(reference.scored_attention, layer=LAYER))
  isa = NATIVE[implementation]
  if ffi.isa_name(isa) is None:
    pytest.skip(f"this processor, or this build, has no {isa}")
  return jax.jit(functools.partial(cpu.scored_attention, layer=LAYER, isa=isa))


@pytest.mark.parametrize("implementation", ["door", *IMPLEMENTATIONS])
@pytest.mark.parametrize(
  ("t", "heads", "kv_heads", "cache"),
  [(1, 6, 2, "f16"), (3, 4, 1, "f32"), (150, 4, 2, "f16"), (33, 8, 1, "f32")],
)
def test_mass(implementation: str, t: int, heads: int, kv_heads: int, cache: str) -> None:
  """Added to what was there; of real queries, and of no slot that none of them sees."""
  case = Case(
    [0, 5, 30, 7], [t, max(t - 2, 0), t, 0], t=t, s=200, heads=heads, kv_heads=kv_heads, cache=cache
  )  # fmt: skip
  before = np.random.default_rng(1).random((LAYERS, 4, kv_heads, 200), np.float32)
  q, k, v, caches, *where = case.arguments
  run = jax.jit(functools.partial(scored_attention, layer=LAYER))
  run = run if implementation == "door" else scored(implementation)
  out, caches, mass = run(q, k, v, caches, jnp.array(before), *where)
  case.check(out, caches)
  expected = before.astype(np.float64)
  for row, (first, count) in enumerate(zip(*case.range, strict=True)):
    keys = case.after[0][row].astype(np.float64)
    for i, head in itertools.product(range(count), range(heads)):
      kv_head, seen = head * kv_heads // heads, first + i + 1
      e = np.exp(keys[kv_head, :seen] @ case.q[row, i, head] / 4)
      expected[LAYER, row, kv_head, :seen] += e / e.sum() * kv_heads / heads
  np.testing.assert_allclose(mass, expected, rtol=2e-5, atol=2e-6)
  again = run(q, k, v, case.arguments[3], jnp.array(before), *where)[2]
  np.testing.assert_array_equal(mass, again)


@pytest.mark.parametrize(
  ("implementation", "cache"),
  [("reference", "bf16"), *itertools.product(IMPLEMENTATIONS, ("f16", "f32"))],
)
@pytest.mark.parametrize(
  ("heads", "kv_heads", "head_dim"),
  [(4, 4, 8), (4, 2, 16), (8, 2, 64), (8, 1, 80), (6, 2, 128), (7, 1, 24), (1, 1, 2)],
)
def test_heads(implementation: str, cache: str, heads: int, kv_heads: int, head_dim: int) -> None:
  """1, 2, 3, 4, 7 and 8 query heads for each KV head, dimensions that are no multiple of 16."""
  case = Case(
    [0, 5, 30],
    [3, 1, 2],
    t=3,
    s=40,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    cache=cache,
  )
  case.check(*attention(implementation)(*case.arguments))


# Each shape compiles a program, so a failure is reported as it was found, not shrunk.
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_any_range(implementation: str, data: st.DataObject) -> None:
  attend = attention(implementation)
  t = data.draw(st.sampled_from((1, 2, 15, 16, 17, 33)), "T")
  s = t + data.draw(st.sampled_from((0, 1, 16, 47)), "more slots")
  lengths = data.draw(st.lists(st.integers(0, t), min_size=1, max_size=3), "lengths")
  starts = [data.draw(st.integers(0, s - length), "start") for length in lengths]
  cache = data.draw(st.sampled_from(("f16", "f32")), "cache")
  seed = data.draw(st.integers(0, 2**32 - 1), "seed")
  case = Case(starts, lengths, t=t, s=s, cache=cache, seed=seed)
  case.check(*attend(*case.arguments))


@pytest.mark.parametrize("cache", CACHE_TYPES)
def test_the_door(cache: str) -> None:
  case = Case([7, 0], [2, 4], t=4, s=20, cache=cache)
  case.check(*jax.jit(door)(*case.arguments))


def test_the_door_by_name() -> None:
  case = Case([0], [2], t=2, s=16, head_dim=64, cache="f16")
  for name in ("reference", "cpu"):
    if name == "reference" or ffi.available():
      case.check(*door(*case.arguments, implementation=name))
  case = Case([0], [2], t=2, s=16, head_dim=64, cache="bf16")
  with pytest.raises(NotImplementedError, match="a cache in float16 or float32; got bfloat16"):
    door(*case.arguments, implementation="cpu")
  with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
    door(*case.arguments, implementation="pallas_tpu")
  with pytest.raises(ValueError, match="'flash' is not one of reference, cpu, pallas_tpu"):
    door(*case.arguments, implementation="flash")
  with pytest.raises(ValueError, match="'cpu' is not one of reference, pallas_tpu"):
    causal_attention(*case.arguments[:3], implementation="cpu")


def test_it_is_said_once_where_a_device_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  case = Case([0], [2], t=2, s=16, head_dim=80, cache="bf16")
  with pytest.warns(
    UserWarning, match="no attention kernel for heads of 80, 16 slots and bfloat16"
  ):
    case.check(*jax.jit(door)(*case.arguments))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    case.check(*jax.jit(functools.partial(cached_attention, layer=LAYER))(*case.arguments))


@pytest.mark.parametrize("cache", CACHE_TYPES)
def test_donated_caches_are_updated_in_place(cache: str) -> None:
  attend = jax.jit(door, donate_argnums=3)
  case = Case([7, 0], [1, 1], t=1, s=64, cache=cache)
  arguments = case.arguments
  before = [side.unsafe_buffer_pointer() for side in arguments[3]]
  out, after = attend(*arguments)
  assert [side.unsafe_buffer_pointer() for side in after] == before
  assert all(side.is_deleted() for side in arguments[3])
  case.check(out, after)


def test_kept_caches_stay_as_they_were() -> None:
  case = Case([7, 0], [1, 1], t=1, s=64)
  arguments = case.arguments
  case.check(*jax.jit(door)(*arguments))
  for side, expected in zip(arguments[3], case.cache, strict=True):
    np.testing.assert_array_equal(np.asarray(side[LAYER]), expected)


def test_no_copy_of_the_cache() -> None:
  """Decoding needs no temporary of the cache's size."""
  b, s, kv_heads, head_dim = 2, 4096, 4, 64
  half = jax.ShapeDtypeStruct((LAYERS, b, kv_heads, s, head_dim), jnp.float16)
  q = jax.ShapeDtypeStruct((b, 1, 8, head_dim), jnp.float32)
  k = jax.ShapeDtypeStruct((b, 1, kv_heads, head_dim), jnp.float32)
  row = jax.ShapeDtypeStruct((b,), jnp.int32)
  if not ffi.available():
    pytest.skip("the reference converts the cache to float32")
  lowered = jax.jit(door, donate_argnums=3).lower(q, k, k, (half, half), row, row)
  analysis = lowered.compile().memory_analysis()
  assert analysis is not None and analysis.temp_size_in_bytes < 1 << 16


@pytest.mark.parametrize("implementation", NATIVE)
def test_buckets_do_not_matter_to_the_bit(implementation: str) -> None:
  """More slots, more padding, other rows in the batch: the same bits for the same tokens."""
  attend = attention(implementation)
  whole = Case([9, 4], [18, 3], t=18, s=40, heads=6, kv_heads=2, head_dim=24)
  out, cache = attend(*whole.arguments)

  def padded(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return np.pad(x, widths, constant_values=FORGOTTEN)

  for t, s in ((18, 41), (32, 64), (64, 128)):
    q, k, v = (padded(x, t, 1) for x in (whole.q, whole.k, whole.v))
    wide, wider = attend(q, k, v, tuple(stack(padded(c, s, 2)) for c in whole.cache), *whole.range)
    np.testing.assert_array_equal(wide[:, :18], out)
    for some, more in zip(cache, wider, strict=True):
      np.testing.assert_array_equal(more[LAYER, :, :, :40], some[LAYER])

  # One row alone, its tokens one at a time.
  sides = tuple(stack(c[:1]) for c in whole.cache)
  for i in range(18):
    step = (whole.q[:1, i : i + 1], whole.k[:1, i : i + 1], whole.v[:1, i : i + 1])
    at = (np.array([9 + i], np.int32), np.array([1], np.int32))
    one, sides = attend(*step, sides, *at)
    np.testing.assert_array_equal(one[0, 0], out[0, i])


def test_avx512_is_avx2_to_the_bit() -> None:
  case = Case([9, 4], [18, 3], t=18, s=40, heads=6, kv_heads=2, head_dim=72)
  a, b = (attention(f"native-{isa}")(*case.arguments)[0] for isa in ("avx2", "avx512"))
  np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits(implementation: str) -> None:
  """A softmax that is nearly one-hot, and keys so alike that none stands out."""
  for scale in (0.0, 1e-3, 30.0, 300.0):
    case = Case([20], [2], t=2, s=40, cache="f32")
    case.q *= scale
    out, _ = attention(implementation)(*case.arguments)
    expected = brute_force(case.q[0], case.after[0][0], case.after[1][0], 20, 2)
    np.testing.assert_allclose(out[0], expected, rtol=1e-3, atol=1e-3 if scale > 100 else 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_in_a_query_stays_in_its_head(implementation: str) -> None:
  case = Case([5, 5], [3, 3], t=3, s=16, cache="f32")
  clean, _ = attention(implementation)(*case.arguments)
  case.q[1, 1, 2, 0] = np.nan
  out, _ = attention(implementation)(*case.arguments)
  assert np.isnan(out[1, 1, 2]).all()
  others = np.ones(out.shape[:3], bool)
  others[1, 1, 2] = False
  np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(clean)[others])


@pytest.mark.parametrize(
  ("start", "length"), [(15, 2), (17, 0), (-1, 1), (2**31 - 1, 2), (0, 3), (0, -1)]
)
def test_what_the_cache_cannot_hold_is_an_error(start: int, length: int) -> None:
  if not ffi.available():
    pytest.skip("the reference leaves this to its caller")
  case = Case([0], [0], t=2, s=16)
  case.start[:], case.length[:] = start, length
  with pytest.raises(jax.errors.JaxRuntimeError, match=f"16 slots cannot hold {length} tokens"):
    jax.block_until_ready(door(*case.arguments))


SHAPES = {
  "q": (2, 3, 4, 16),
  "k": (2, 3, 2, 16),
  "v": (2, 3, 2, 16),
  "k_cache": (2, 2, 2, 8, 16),
  "v_cache": (2, 2, 2, 8, 16),
  "mass": (2, 2, 2, 8),
  "start": (2,),
  "length": (2,),
  "out": (2, 3, 4, 16),
  "k_out": (2, 2, 2, 8, 16),
  "v_out": (2, 2, 2, 8, 16),
  "mass_out": (2, 2, 2, 8),
}
TYPES = dict.fromkeys(("k_cache", "v_cache", "k_out", "v_out"), jnp.float16)
TYPES |= {"start": jnp.int32, "length": jnp.int32}


def raw_attention(**changes: Any) -> list[np.ndarray]:
  """Calls the handler with these shapes, or types, or attributes, changed."""
  types = {**TYPES, **{n: c for n, c in changes.items() if n in SHAPES and isinstance(c, type)}}
  shapes = {**SHAPES, **{n: c for n, c in changes.items() if isinstance(c, tuple)}}
  specs = [jax.ShapeDtypeStruct(shapes[name], types.get(name, jnp.float32)) for name in SHAPES]
  call = jax.ffi.ffi_call("q4jax_attention", specs[-4:])
  arrays = [jnp.zeros(a.shape, a.dtype) for a in specs[:-4]]
  isa = np.int64(changes.get("isa", 0))
  results = call(*arrays, layer=np.int64(changes.get("layer", 1)), scale=np.float32(1), isa=isa)
  return [np.asarray(a) for a in results]


def test_the_handler_takes_what_fits() -> None:
  if not ffi.available():
    pytest.skip("needs the native library")
  out, k_cache, v_cache, mass = raw_attention()
  assert not out.any() and not k_cache.any() and not v_cache.any()  # of zeros
  assert not mass[0].any() and not raw_attention(mass=(0,), mass_out=(0,))[3].size


@pytest.mark.parametrize(
  "changes",
  [
    {"q": (2, 3, 3, 16), "out": (2, 3, 3, 16)},
    {"q": (2, 3, 4, 8), "out": (2, 3, 4, 8)},
    {"q": (1, 3, 4, 16), "out": (1, 3, 4, 16)},
    {"q": (2, 3, 64)},
    {"k": (2, 3, 1, 16)},
    {
      "k": (2, 3, 0, 16),
      "v": (2, 3, 0, 16),
      "k_cache": (2, 2, 0, 8, 16),
      "v_cache": (2, 2, 0, 8, 16),
    }
    | {"k_out": (2, 2, 0, 8, 16), "v_out": (2, 2, 0, 8, 16)},
    {"v": (2, 2, 2, 16)},
    {"k_cache": (2, 2, 2, 7, 16)},
    {"v_cache": (2, 2, 2, 7, 16)},
    {"v_cache": jnp.float32},
    {
      "k_cache": jnp.bfloat16,
      "v_cache": jnp.bfloat16,
      "k_out": jnp.bfloat16,
      "v_out": jnp.bfloat16,
    },
    {"start": (1,)},
    {"length": (3,)},
    {"out": (2, 3, 4, 8)},
    {"k_out": (2, 2, 2, 4, 16)},
    {"v_out": (2, 2, 2, 4, 16)},
    {"k_cache": jnp.float32, "v_cache": jnp.float32},
    {"k_cache": (2, 2, 8, 16)},
    {"mass": (2, 2, 2, 7)},
    {"mass_out": (1, 2, 2, 8)},
    {"mass": (2, 2, 2, 7), "mass_out": (2, 2, 2, 7)},
    {"layer": 2},
    {"layer": -1},
    {"isa": 8},
  ],
)
def test_the_handler_refuses_what_does_not_fit(changes: dict[str, Any]) -> None:
  """The last line of defence: an error, not a write past the end."""
  if not ffi.available():
    pytest.skip("needs the native library")
  with pytest.raises(jax.errors.JaxRuntimeError, match="q4jax: "):
    raw_attention(**changes)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 2), (3, 1)])
def test_causal_attention(heads: int, kv_heads: int) -> None:
  rng = np.random.default_rng(20)
  q = rng.normal(size=(2, 9, heads, 16)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, 9, kv_heads, 16)).astype(np.float32)
  out = jax.jit(causal_attention)(q, k, v)
  for row in range(2):
    keys, values = k[row].swapaxes(0, 1), v[row].swapaxes(0, 1)
    expected = brute_force(q[row], keys, values, 0, 9)
    np.testing.assert_allclose(out[row], expected, rtol=2e-5, atol=2e-6)
