"""Paged attention against a list of tokens: loops over sequences, heads and slots in float64.

All memory that no token lies in holds NaN.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from q4jax_kernels import ffi, kv_pages
from q4jax_kernels.kv_format import KVFormat, dequantize, quantize
from q4jax_kernels.kv_pages import Pages
from q4jax_kernels.paged_attention import Paged, cpu, decode_attention, reference, spill, spills

LAYERS, LAYER = 2, 1
FLOAT = KVFormat(32)
DTYPES = {"f32": np.float32, "f16": np.float16}


def poisoned(pages: Pages) -> Pages:
  """All NaN: floats, or scales."""
  if pages.format.is_float:
    return dataclasses.replace(pages, codes=jnp.full_like(pages.codes, jnp.nan))
  scale = jnp.full_like(pages.scale, jnp.nan)
  return dataclasses.replace(pages, codes=pages.codes + 7, scale=scale)


def stored(x: np.ndarray, format: KVFormat) -> np.ndarray:
  """x [K, H] after it was moved to the pages; test_kv_format holds for the grid itself."""
  if format.is_float:
    return x.astype(format.dtype).astype(np.float64)
  return np.asarray(dequantize(*quantize(x, format), format), np.float64)


class Token:
  """One token of one sequence: where the oracle says it lies, and as what."""

  def __init__(self, position: int, key: np.ndarray, value: np.ndarray) -> None:
    self.position, self.key, self.value = position, key, value  # [K, H] float64
    self.place: tuple[str, int] | None = None  # ("dense", slot) or ("paged", index in the table)


class Simulation:
  """A batch that decodes step by step, and beside it the tokens as lists."""

  def __init__(
    self,
    b: int = 2,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    sink: int = 4,
    recent: int = 8,
    block_size: int = 16,
    blocks: int = 4,
    key: KVFormat = FLOAT,
    value: KVFormat = FLOAT,
    dense: str = "f32",
    layout: str = "rows",
    seed: int = 0,
    attend: Any = decode_attention,
  ) -> None:
    self.rng = np.random.default_rng(seed)
    self.heads, self.key_format, self.value_format, self.dense = heads, key, value, DTYPES[dense]
    pool = 1 + 2 * b * blocks
    shape = (LAYERS, b, kv_heads, sink + recent + block_size, head_dim)
    k, v = (jnp.full(shape, jnp.nan, self.dense) for _ in range(2))
    make = functools.partial(
      Pages.zeros, pool, kv_heads, head_dim, layout=layout, block_size=block_size
    )
    self.free = list(self.rng.permutation(np.arange(1, pool)))
    # What nobody has filled may say anything, but where the table does not point.
    slot_pos = self.rng.integers(-50, 50, (pool, block_size)).astype(np.int32)
    slot_pos[0] = -1
    self.cache = Paged(
      k,
      v,
      poisoned(make(key, kind="key")),
      poisoned(make(value, kind="value")),
      jnp.array(slot_pos),
      jnp.zeros((LAYERS, b, blocks), jnp.int32),
      jnp.zeros((LAYERS, b), jnp.int32),
      sink,
      recent,
    )
    self.length, self.spilled, self.blocks = np.zeros((3, b), np.int32)
    self.tokens: list[list[Token]] = [[] for _ in range(b)]
    # What the native kernel rounds to int8 moves each output by about 1% of a standard deviation.
    native = attend is not reference.decode_attention and cpu.supports(self.cache)
    self.rounds = native and not (key.is_float and value.is_float)
    self.use(attend)

  def use(self, attend: Any) -> None:
    """From now on steps by this implementation."""

    def attend_after_spill(q, k, v, cache, length, spilled, active, scores) -> tuple:
      cache, spilled = spill(cache, length, spilled, active)
      return attend(q, k, v, cache, length, spilled, active, LAYER, scores=scores)

    self.attend = jax.jit(attend_after_spill, static_argnames="scores", donate_argnums=3)

  def change(self, **changes: np.ndarray) -> None:
    self.cache = dataclasses.replace(self.cache, **{n: jnp.array(a) for n, a in changes.items()})

  def prepare(self, drop: bool) -> None:
    """What the host does before a step: names the block of each spill, or none."""
    table, count = np.array(self.cache.block_table), np.array(self.cache.num_blocks)
    for row in np.flatnonzero(spills(self.cache, self.length, self.spilled, True)):
      if count[LAYER, row] < table.shape[2]:
        table[LAYER, row, count[LAYER, row]] = 0 if drop else self.free.pop()
    self.change(block_table=table)

  def expect(self, row: int, k: np.ndarray, v: np.ndarray) -> None:
    """Moves and appends one row's tokens in the lists."""
    cache, tokens = self.cache, self.tokens[row]
    sink, bs = cache.sink, cache.block_size
    in_ring = [t for t in tokens if t.place and t.place[0] == "dense" and t.position >= sink]
    if len(in_ring) == cache.recent + bs:
      index = int(self.blocks[row])
      room = index < cache.block_table.shape[2] and cache.block_table[LAYER, row, index] > 0
      for i, token in enumerate(sorted(in_ring, key=lambda t: t.position)[:bs]):
        token.place = ("paged", index * bs + i) if room else None
        token.key = stored(token.key.astype(np.float32), self.key_format)
        token.value = stored(token.value.astype(np.float32), self.value_format)
      self.spilled[row] += bs
      self.blocks[row] += room
    position = int(self.length[row])
    slot = position if position < sink else sink + (position - sink) % (cache.recent + bs)
    new = Token(position, *(x.astype(self.dense).astype(np.float64) for x in (k, v)))
    new.place = ("dense", slot)
    tokens.append(new)
    self.length[row] += 1

  def step(
    self,
    active: list[bool] | None = None,
    drop: bool = False,
    check: bool = True,
    scores: bool = True,
    q: np.ndarray | None = None,
  ) -> None:
    _, b, kv_heads, _, h = self.cache.k.shape
    on = np.array(active or [True] * b)
    self.prepare(drop)
    q = self.rng.normal(size=(b, 1, self.heads, h)).astype(np.float32) * 2 if q is None else q
    k, v = self.rng.normal(size=(2, b, 1, kv_heads, h)).astype(np.float32)
    k[~on] = q[~on] = np.nan
    before = (jnp.array(self.length), jnp.array(self.spilled))
    for row in np.flatnonzero(on):
      self.expect(row, k[row, 0], v[row, 0])
    old = jax.tree.map(np.array, self.cache)
    out, self.cache, mass = self.attend(q, k, v, self.cache, *before, on, scores=scores)
    assert (mass is not None) == scores
    if not check:
      return
    for row in range(b):
      if not on[row]:
        assert not np.asarray(out[row]).any() and not (
          scores and (np.asarray(mass.paged[row]).any() or np.asarray(mass.dense[row]).any())
        )
        for name in ("k", "v", "num_blocks"):
          a, c = getattr(old, name)[:, row], np.asarray(getattr(self.cache, name))[:, row]
          np.testing.assert_array_equal(a, c)
        continue
      expected, paged, ring = self.attention(row, q[row, 0])
      exact, close = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 0.1, "atol": 0.1}
      np.testing.assert_allclose(out[row, 0], expected, **(close if self.rounds else exact))
      if scores:
        np.testing.assert_allclose(mass.paged[row], paged, **(close if self.rounds else exact))
        np.testing.assert_allclose(mass.dense[row], ring, **(close if self.rounds else exact))
        assert not np.asarray(mass.paged[row])[paged == 0].any()
    np.testing.assert_array_equal(self.cache.num_blocks[LAYER], self.blocks)
    np.testing.assert_array_equal(np.asarray(self.cache.k)[0], old.k[0])  # the other layer

  def attention(self, row: int, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One query [N, H] over one row's tokens: the output, and the mass of all slots."""
    cache = self.cache
    kv_heads, dense = cache.k.shape[2:4]
    mass = {
      "paged": np.zeros((kv_heads, cache.block_table.shape[2] * cache.block_size)),
      "dense": np.zeros((kv_heads, dense)),
    }
    out, group = np.zeros(q.shape), self.heads // kv_heads
    seen = [t for t in self.tokens[row] if t.place]
    for head in range(self.heads):
      kv = head // group
      logits = [float(t.key[kv] @ q[head].astype(np.float64)) / q.shape[1] ** 0.5 for t in seen]
      p = np.exp(np.array(logits) - max(logits))
      p /= p.sum()
      for token, weight in zip(seen, p, strict=True):
        assert token.place is not None
        mass[token.place[0]][kv, token.place[1]] += weight / group
        out[head] += weight * token.value[kv]
    return out, mass["paged"], mass["dense"]

  def mask(self, row: int, positions: set[int]) -> None:
    """Hides tokens in the pages, as eviction by mask does: -2 - position."""
    slot_pos = np.array(self.cache.slot_pos)
    for token in self.tokens[row]:
      if token.position in positions and token.place and token.place[0] == "paged":
        block, slot = divmod(token.place[1], self.cache.block_size)
        at = int(self.cache.block_table[LAYER, row, block]), slot
        assert slot_pos[at] == token.position
        slot_pos[at] = -2 - token.position
        token.place = None
    self.change(slot_pos=slot_pos)


@pytest.mark.parametrize(
  ("key", "value", "dense"),
  [
    (KVFormat(32), KVFormat(32), "f32"),
    (KVFormat(16), KVFormat(16, bfloat16=True), "f16"),
    (KVFormat(8, 8), KVFormat(4, 16), "f16"),
    (KVFormat(4), KVFormat(4, 8, symmetric=True), "f32"),
  ],
)
def test_many_steps(key: KVFormat, value: KVFormat, dense: str) -> None:
  """Several spills, the rows out of step; with float32, this is attention to all there ever was."""
  run = Simulation(key=key, value=value, dense=dense)
  for i in range(5 * 16 + 3):
    run.step([True, i >= 3])
  assert (np.asarray(run.cache.num_blocks[LAYER]) == [4, 4]).all()
  assert run.attend._cache_size() == 1, "lengths and tables compile nothing anew"
  if dense == "f32" and key.is_float:
    assert len([t for t in run.tokens[0] if t.place]) == 83


@pytest.mark.parametrize("layout", kv_pages.LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 1)])
def test_heads_and_layouts(heads: int, kv_heads: int, layout: str) -> None:
  run = Simulation(
    heads=heads, kv_heads=kv_heads, key=KVFormat(8), value=KVFormat(4, 8), layout=layout
  )
  for i in range(50):
    run.step(check=i > 44)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
@pytest.mark.parametrize(
  ("key", "value", "dense"),
  [
    (KVFormat(32), KVFormat(16), "f32"),
    (KVFormat(16), KVFormat(32), "f16"),
    (KVFormat(8, 8), KVFormat(4, 16), "f16"),
    (KVFormat(4), KVFormat(4, 8, symmetric=True), "f32"),
    (KVFormat(4, 32, symmetric=True), KVFormat(8), "f16"),
    (KVFormat(8, 64), KVFormat(16), "f16"),
    (KVFormat(4, 32), KVFormat(4, 32), "f16"),
  ],
)
def test_native(key: KVFormat, value: KVFormat, dense: str, isa: str) -> None:
  """Heads of 64 in groups of 1 to 7, blocks of 16 to 48, every instruction set."""
  if ffi.isa_name(isa) is None:
    pytest.skip(f"this processor, or this build, has no {isa}")
  attend = functools.partial(cpu.decode_attention, isa=isa)
  for heads, block_size in ((7, 16), (8, 32), (2, 48)):
    run = Simulation(
      heads=heads,
      kv_heads=heads // 7 or 2,
      head_dim=64,
      block_size=block_size,
      blocks=3,
      key=key,
      value=value,
      dense=dense,
      layout="x16",
      attend=attend,
    )
    for i in range(3 * block_size + 5):
      run.step([True, i != 20], check=i % 7 == 0 or i > 3 * block_size, scores=i % 2 == 0)
      if i == 2 * block_size + 20:
        run.mask(0, {5, 6, 9, *range(20, 20 + block_size)})
        run.mask(1, {4})


@pytest.mark.parametrize(("head_dim", "group"), [(64, 64), (128, 32), (128, 64), (128, 128)])
@pytest.mark.parametrize("bits", [4, 8])
def test_native_heads_of_llama(head_dim: int, group: int, bits: int) -> None:
  """Four query heads a KV head and blocks of 32: what has loops of its own, and what has not."""
  if not ffi.available():
    pytest.skip("needs the native library")
  format = KVFormat(bits, group)
  run = Simulation(
    b=1, heads=8, head_dim=head_dim, block_size=32, blocks=3, key=format, value=format,
    dense="f16", layout="x16", attend=cpu.decode_attention,
  )  # fmt: skip
  for i in range(80):
    run.step(check=i > 76)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
def test_native_integers_are_exact(isa: str) -> None:
  """Where q and the weights are whole int8, nothing is rounded and only float32 is left."""
  if ffi.isa_name(isa) is None:
    pytest.skip(f"this processor, or this build, has no {isa}")
  rng = np.random.default_rng(0)
  attend = functools.partial(cpu.decode_attention, isa=isa)
  run = Simulation(
    head_dim=64, key=KVFormat(8, 64), value=KVFormat(16), layout="x16", attend=attend
  )
  run.rounds = False
  for i in range(40):
    q = rng.integers(-126, 127, (2, 1, 4, 64)).astype(np.float32)
    q[..., 0] = 127
    run.step(check=i > 30, q=q / 64)


def test_small_heads() -> None:
  run = Simulation(head_dim=8, key=KVFormat(4), value=KVFormat(4))
  for i in range(48):
    run.step(check=i > 44)


@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_any_sequence(data: st.DataObject) -> None:
  """Sinks and rings of any size, rows that pause, masked slots, spills that are dropped."""
  formats = st.sampled_from([KVFormat(32), KVFormat(8, 8), KVFormat(4, 16)])
  run = Simulation(
    b=data.draw(st.integers(1, 3)),
    sink=data.draw(st.sampled_from([0, 1, 5])),
    recent=data.draw(st.sampled_from([0, 3, 16, 21])),
    block_size=data.draw(st.sampled_from([16, 32])),
    blocks=data.draw(st.integers(1, 3)),
    key=data.draw(formats),
    value=data.draw(formats),
    seed=data.draw(st.integers(0, 2**32 - 1)),
  )
  b = len(run.length)
  for i in range(data.draw(st.integers(70, 120))):
    on = (run.rng.random(b) < 0.9).tolist() if i else [True] * b
    run.step(on, drop=run.rng.random() < 0.2, check=i % 8 == 0, scores=i % 16 == 0)
    if i % 20 == 19:
      run.mask(int(run.rng.integers(b)), set(run.rng.integers(0, i, 12).tolist()))


def test_a_fully_masked_block() -> None:
  run = Simulation()
  for _ in range(60):
    run.step(check=False)
  run.mask(0, set(range(4, 20)))
  assert sum(t.place is None for t in run.tokens[0]) == 16
  run.step()


def test_large_logits() -> None:
  """A softmax that is one-hot: nothing overflows."""
  run = Simulation()
  for _ in range(40):
    run.step(check=False)
  run.change(k=np.asarray(run.cache.k) * 100)
  for row in run.tokens:
    for token in row:
      if token.place and token.place[0] == "dense":
        token.key = token.key * np.float64(100)
  run.step()


def test_without_scores() -> None:
  run = Simulation()
  for i in range(50):
    run.step(scores=False, check=i > 45)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"implementation": "metal"},
      "'metal' is not one of reference, cpu, pallas_tpu, mosaic_gpu",
    ),
    ({"layer": 2}, "layer=2 is none of the cache's 2 layers"),
    ({"q": np.zeros((2, 1, 3, 16), np.float32)}, r"q has shape \[2, 1, 3, 16\]"),
    ({"k": np.zeros((2, 1, 2, 8), np.float32)}, r"k is float32\[2, 1, 2, 8\]"),
    ({"v": np.zeros((2, 1, 2, 16), np.float16)}, r"v is float16\[2, 1, 2, 16\]"),
    ({"length": np.zeros(3, np.int32)}, r"length is int32\[3\]; it must be int32\[2\]"),
    ({"active": np.ones(2, np.int32)}, r"active is int32\[2\]; it must be bool\[2\]"),
    ({"sink": 5}, r"28 slots; it must have sink \+ recent \+ block_size = 5 \+ 8 \+ 16"),
    ({"slot_pos": np.zeros((9, 16), np.int32)}, r"slot_pos is int32\[9, 16\]"),
    ({"value_pages": "key_pages"}, "value_pages have"),
    ({"block_table": np.zeros((2, 4), np.int32)}, "block_table"),
  ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
  cache = Simulation().cache
  arguments: dict[str, Any] = {
    "q": np.zeros((2, 1, 4, 16), np.float32),
    "k": np.zeros((2, 1, 2, 16), np.float32),
    "v": np.zeros((2, 1, 2, 16), np.float32),
    "length": np.zeros(2, np.int32),
    "spilled": np.zeros(2, np.int32),
    "active": np.ones(2, bool),
    "layer": 0,
    "implementation": None,
  }
  for name, a in changes.items():
    if name in arguments:
      arguments[name] = a
    else:
      part = getattr(cache, a) if isinstance(a, str) else a
      cache = dataclasses.replace(cache, **{name: part})
  with pytest.raises(ValueError, match=message):
    decode_attention(cache=cache, scores=False, **arguments)
