"""Packed blocks: every byte where the module's docstring says it lies, and nothing else changed."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax_kernels import kv_pages
from q4jax_kernels.kv_format import KVFormat, dequantize, quantize
from q4jax_kernels.kv_pages import KINDS, LAYOUTS, Pages, Parts

FORMATS = (
  *(KVFormat(b, g, s) for b in (4, 8) for g, s in ((8, False), (32, True), (None, False))),
  KVFormat(4, 64),
  KVFormat(16),
  KVFormat(16, bfloat16=True),
  KVFormat(32),
)
CODES = tuple(f for f in FORMATS if not f.is_float)
EVERY = [(f, layout, kind) for f in FORMATS for layout, kind in itertools.product(LAYOUTS, KINDS)]


def code_at(
  codes: np.ndarray, bits: int, layout: str, kind: str, slot: int, dim: int, bs: int, h: int
) -> int:
  """The code of one slot and dim in the packed codes of one block and head, by the docstring."""
  if layout == "rows":
    if bits == 8:
      return codes[slot, dim]
    return codes[slot, dim % (h // 2)] >> (4 if dim >= h // 2 else 0) & 15
  if kind == "key":
    d = dim if bits == 8 else dim % (h // 2)
    byte = codes[slot // 16, d // 4, slot % 16, d % 4]
    high = dim >= h // 2
  else:
    s = slot if bits == 8 else slot % (bs // 2)
    byte = codes[dim // 16, s // 4, dim % 16, s % 4]
    high = slot >= bs // 2
  return byte if bits == 8 else byte >> (4 if high else 0) & 15


def scale_at(scale: np.ndarray, layout: str, kind: str, slot: int, g: int) -> np.float16:
  if layout == "rows":
    return scale[slot, g]
  return scale[slot // 16, g, slot % 16] if kind == "key" else scale[g, slot]


def random_parts(format: KVFormat, *lead: int, bs: int, h: int) -> Parts:
  rng = np.random.default_rng(3)
  codes = rng.integers(0, 2**format.bits, (*lead, bs, h)).astype(np.uint8)
  scale, minimum = rng.normal(size=(2, *lead, bs, format.groups(h))).astype(np.float16)
  return Parts(codes, scale, None if format.symmetric else minimum)


@pytest.mark.parametrize(("bs", "h"), [(16, 16), (32, 64), (48, 80), (32, 128)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_position(bits: int, layout: str, kind: str, bs: int, h: int) -> None:
  format = KVFormat(bits, 8)
  parts = random_parts(format, bs=bs, h=h)
  packed = kv_pages.pack(parts, format, layout, kind)
  codes, scale, minimum = map(np.asarray, packed)
  assert codes.size == bs * h * bits // 8
  for slot in range(bs):
    for dim in range(h):
      assert code_at(codes, bits, layout, kind, slot, dim, bs, h) == parts.codes[slot, dim]
    for g in range(h // 8):
      assert scale_at(scale, layout, kind, slot, g) == parts.scale[slot, g]
      assert scale_at(minimum, layout, kind, slot, g) == parts.minimum[slot, g]


SHAPES = {  # of codes, and of scales where they have three axes too many: NB, K, then the layout's
  ("rows", "key", 8): ((5, 2, 32, 64), (5, 2, 32, 2)),
  ("rows", "value", 4): ((5, 2, 32, 32), (5, 2, 32, 2)),
  ("x16", "key", 8): ((5, 2, 2, 16, 16, 4), (5, 2, 2, 2, 16)),
  ("x16", "key", 4): ((5, 2, 2, 8, 16, 4), (5, 2, 2, 2, 16)),
  ("x16", "value", 8): ((5, 2, 4, 8, 16, 4), (5, 2, 2, 32)),
  ("x16", "value", 4): ((5, 2, 4, 4, 16, 4), (5, 2, 2, 32)),
}


@pytest.mark.parametrize("at", SHAPES)
def test_shapes(at: tuple[str, str, int]) -> None:
  layout, kind, bits = at
  pages = Pages.zeros(5, 2, 64, KVFormat(bits, 32), layout=layout, kind=kind)
  codes, scale = SHAPES[at]
  assert pages.codes.shape == codes and pages.codes.dtype == jnp.uint8
  for a in (pages.scale, pages.minimum):
    assert a is not None and a.shape == scale and a.dtype == jnp.float16
  assert (pages.num_blocks, pages.kv_heads) == (5, 2)
  assert pages.nbytes * 8 == 5 * 2 * 32 * 64 * pages.format.bits_per_value(64)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3, 1)])
@pytest.mark.parametrize(("format", "layout", "kind"), [c for c in EVERY if not c[0].is_float])
def test_pack_and_unpack(format: KVFormat, layout: str, kind: str, lead: tuple[int, ...]) -> None:
  parts = random_parts(format, *lead, bs=32, h=64)
  packed = kv_pages.pack(parts, format, layout, kind)
  jax.tree.map(np.testing.assert_array_equal, kv_pages.unpack(packed, format, layout, kind), parts)


def filled(format: KVFormat, layout: str, kind: str, h: int = 64) -> tuple[Pages, np.ndarray]:
  """A pool of seven blocks, and the numbers [7, K, bs, H] that were written into 1..6."""
  x = np.random.default_rng(4).normal(size=(7, 2, 32, h)).astype(np.float32)
  pages = Pages.zeros(7, 2, h, format, layout=layout, kind=kind)
  ids = np.array([4, 1, 6, 2, 3, 5], np.int32)
  return kv_pages.write(pages, ids, jnp.array(x[ids])), x


def stored(format: KVFormat, x: np.ndarray) -> np.ndarray:
  """What becomes of numbers in a format; test_kv_format holds for the grid itself."""
  if format.is_float:
    return x.astype(format.dtype).astype(np.float32)
  return np.asarray(dequantize(*quantize(x, format), format))


@pytest.mark.parametrize(("format", "layout", "kind"), EVERY)
def test_write_and_read(format: KVFormat, layout: str, kind: str) -> None:
  pages, x = filled(format, layout, kind)
  found = kv_pages.read(pages, jnp.arange(1, 7).reshape(2, 3))
  assert found.dtype == jnp.float32 and found.shape == (2, 3, *x.shape[1:])
  np.testing.assert_array_equal(found.reshape(x[1:].shape), stored(format, x[1:]))
  assert not np.asarray(kv_pages.read(pages, jnp.array(0))).any()

  # Nothing is written to block 0, and only the blocks named change.
  other = jax.jit(kv_pages.write)(pages, np.array([0, 3, 0], np.int32), jnp.array(x[4:7]))
  for old, new in zip(jax.tree.leaves(pages), jax.tree.leaves(other), strict=True):
    rest = np.array([0, 1, 2, 4, 5, 6])
    np.testing.assert_array_equal(np.asarray(old)[rest], np.asarray(new)[rest])
  np.testing.assert_array_equal(kv_pages.read(other, jnp.array(3)), stored(format, x[5]))


@pytest.mark.parametrize(("format", "layout", "kind"), EVERY)
def test_slots_move_bit_for_bit(format: KVFormat, layout: str, kind: str) -> None:
  pages, _ = filled(format, layout, kind)
  rng = np.random.default_rng(5)
  block, slot = rng.integers(1, 7, (3, 32)), rng.integers(0, 32, (3, 32))
  ids = np.array([2, 0, 5], np.int32)  # 2 and 5 are sources as well.
  moved = jax.jit(kv_pages.gather_slots)(pages, block, slot, ids)

  def by_slot(pages: Pages) -> Parts:
    if format.is_float:
      return Parts(np.asarray(pages.codes))
    return jax.tree.map(np.asarray, kv_pages.unpack(pages.parts, format, layout, kind))

  before, after = by_slot(pages), by_slot(moved)
  for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    expected = old.copy()
    for i, target in enumerate(ids):
      for s in range(32):
        if target:
          expected[target, :, s] = old[block[i, s], :, slot[i, s]]
    np.testing.assert_array_equal(new.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("format", [KVFormat(4, 8), KVFormat(8), KVFormat(4, 4), KVFormat(32)])
def test_small_heads_in_rows(format: KVFormat) -> None:
  """Eight dims, as stories260K has."""
  pages, x = filled(format, "rows", "key", h=8)
  np.testing.assert_array_equal(kv_pages.read(pages, jnp.arange(1, 7)), stored(format, x[1:]))
  with pytest.raises(ValueError, match="multiple of 16; got 8"):
    filled(format, "x16", "key", h=8)


def test_pages_are_a_pytree() -> None:
  pages, _ = filled(KVFormat(4, 32), "x16", "value")
  leaves, tree = jax.tree.flatten(pages)
  assert len(leaves) == 3 and jax.tree.unflatten(tree, leaves).format == pages.format
  traces = []
  jax.jit(lambda p: traces.append(0) or p.codes)(pages)
  step = jax.jit(partial(kv_pages.write), donate_argnums=0)
  at = pages.codes.unsafe_buffer_pointer()
  after = step(pages, np.array([1], np.int32), jnp.ones((1, 2, 32, 64)))
  assert after.codes.unsafe_buffer_pointer() == at, "written in place where donated"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"layout": "x8"}, "layout='x8'"),
    ({"kind": "query"}, "kind='query'"),
    ({"block_size": 24}, "block_size=24"),
    ({"block_size": 0}, "block_size=0"),
    ({"format": KVFormat(4, 48)}, "group_size=48 does not divide head_dim=64"),
  ],
)
def test_refuses_what_cannot_be_laid_out(changes: dict, message: str) -> None:
  arguments = {"format": KVFormat(4, 32), "kind": "key"} | changes
  with pytest.raises(ValueError, match=message):
    Pages.zeros(4, 2, 64, **arguments)
