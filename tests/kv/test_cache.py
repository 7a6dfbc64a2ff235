"""The compressed cache decodes as the dense one does, but for what it was told to lose.

The models have float weights: with activations rounded to int8 no two ways of computing agree.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from kv_steps import Decoding, Holds, attend_all, dims, spilled, store_of
from oracles.float64_llama import Float64Llama
from oracles.models import SPECS, Spec, write
from q4jax.errors import ConfigError, PoolExhaustedError
from q4jax.kv.cache import CompressedKV, _pool_size
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import LogZ, MedianStd, Select, TopP, UnionRank
from q4jax.model.caches import Compressed, Recording
from q4jax.model.model import Model
from q4jax_kernels.kv_format import KVFormat

SPEC = SPECS["llama"]  # two layers, heads of 32, two query heads to a KV head
FLOAT = KVFormat(32)
KV = KVConfig(FLOAT, FLOAT, protect=Protect(sink=2, recent=6, grace=0), block_size=16)
EVICT = replace(KV, policy=get_policy("snapkv", window=8), select=UnionRank(0.5))
LENGTH, STEPS = np.array([1, 37, 80]), 110  # a row short of the sinks; seven spills each


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return write(SPEC, tmp_path_factory.mktemp("kv") / "model.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
  return q4jax.load(path)


def text(spec: Spec = SPEC, rows: int = len(LENGTH)) -> np.ndarray:
  shape = (rows, LENGTH.max() + STEPS)
  return np.random.default_rng(5).integers(3, spec.vocab, shape).astype(np.int32)


def decode(model: Model, kv: KVConfig | None) -> tuple[np.ndarray, Decoding]:
  """Logits of all steps, float32[steps, B, V], and what was left."""
  tokens, rows = text(), np.arange(len(LENGTH))
  run = Decoding.start(model, tokens, LENGTH.copy(), kv, STEPS)
  return np.stack([run.step(tokens[rows, run.length]) for _ in range(STEPS)]), run


@pytest.fixture(scope="module")
def dense(model: Model) -> np.ndarray:
  return decode(model, None)[0]


@pytest.fixture(scope="module")
def evicted(model: Model) -> tuple[np.ndarray, Decoding]:
  return decode(model, EVICT)


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-4) -> None:
  assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_floats_without_a_policy_are_the_dense_cache(model: Model, dense: np.ndarray) -> None:
  found, run = decode(model, KV)
  close(found, dense)
  assert isinstance(run.state, Compressed)
  assert run.state.spilled.tolist() == [spilled(n, KV) for n in run.length]


def test_hiding_what_is_evicted_changes_nothing(
  model: Model, evicted: tuple[np.ndarray, Decoding]
) -> None:
  found, run = decode(model, replace(EVICT, mask=True))
  close(found, evicted[0])
  assert run.compressed is not None and evicted[1].compressed is not None
  mine, other = run.compressed.usage, evicted[1].compressed.usage
  assert mine.blocks > other.blocks, "hidden tokens keep their blocks"
  assert (mine.kept, mine.seen) == (other.kept, other.seen)


def test_after_eviction_against_exact_arithmetic(
  path: Path, evicted: tuple[np.ndarray, Decoding]
) -> None:
  """A float64 Llama whose queries after the prompt do not see what was evicted."""
  logits, run = evicted
  tokens, oracle = text(), Float64Llama(path)
  assert isinstance(run.state, Compressed)
  holds, gone = Holds.of(run.state), 0
  for b, prompt in enumerate(LENGTH):
    total = prompt + STEPS
    hidden = np.zeros((SPEC.layers, total, total), bool)
    for layer in range(SPEC.layers):
      lost = sorted(set(range(total)) - holds.seen(total, layer, b).keys())
      assert not lost or 2 <= lost[0] <= lost[-1] < prompt - 6
      hidden[layer, prompt:, lost] = True
      gone += len(lost)
    exact = oracle.logits(tokens[b, :total], hidden)
    close(logits[:, b], exact[prompt:], 2e-5)
    if hidden.any():
      blind = oracle.logits(tokens[b, :total])
      assert np.abs(exact - blind).max() > 1e-2 * np.abs(exact).max(), "what is lost matters"
  # Of 80 half go. Of 37 the 21 that do not leave the dense part are more than half, so all others.
  assert gone == 2 * (16 + 40)


AGAIN = replace(EVICT, policy=get_policy("h2o"), evict_every=16)  # h2o: with sums carried along


def seen(run: Decoding, layer: int, row: int) -> set[int]:
  """Positions that a row's last query saw."""
  assert isinstance(run.state, Compressed)
  paged, gone = run.state.paged, int(run.state.spilled[row])
  table = np.asarray(paged.block_table)[layer, row, : int(paged.num_blocks[layer, row])]
  slots = np.asarray(paged.slot_pos)[table]
  sinks = min(paged.sink, run.length[row])
  return {*range(sinks), *slots[slots >= 0].tolist(), *range(sinks + gone, run.length[row])}


def test_evicting_while_decoding(path: Path, model: Model) -> None:
  """Many times over: against hiding, and against a float64 Llama that does not see what is gone."""
  tokens, rows = text(), np.arange(len(LENGTH))
  run = Decoding.start(model, tokens, LENGTH.copy(), AGAIN, STEPS)
  assert run.compressed is not None
  total = LENGTH.max() + STEPS
  hidden, found = np.zeros((len(LENGTH), SPEC.layers, total, total), bool), []
  for _ in range(STEPS):
    at = run.length
    found.append(run.step(tokens[rows, at]))
    for b in rows:
      for layer in range(SPEC.layers):
        hidden[b, layer, at[b], sorted(set(range(at[b] + 1)) - seen(run, layer, b))] = True
  logits, oracle = np.stack(found), Float64Llama(path)
  for b, prompt in enumerate(LENGTH):
    end = prompt + STEPS
    close(logits[:, b], oracle.logits(tokens[b, :end], hidden[b, :, :end, :end])[prompt:], 3e-5)
    gone = hidden[b, :, end - 1].sum(-1)
    # A turn comes every 16 tokens, so that of what there is now at most so many came since.
    assert (gone > end / 2 - 18).all() and (gone[0] != hidden[b, :, prompt + 40].sum(-1)).any()

  masked, other = decode(model, replace(AGAIN, mask=True))
  close(masked, logits)
  assert other.compressed is not None
  mine, whole = run.compressed.usage, other.compressed.usage
  assert (mine.kept, mine.seen) == (whole.kept, whole.seen) and mine.blocks < whole.blocks / 1.5
  assert run.compressed.store.num_blocks < other.compressed.store.num_blocks
  assert isinstance(run.state, Compressed)
  run.compressed.close(run.state)
  run.compressed.pool.check()
  assert run.compressed.pool.stats().in_use == 0


def test_coded_and_rotated_is_near(model: Model, dense: np.ndarray) -> None:
  kv = replace(KV, key=KVFormat(8, 32), value=KVFormat(8, 32), rotate=True)
  error = decode(model, kv)[0] - dense
  assert 1e-4 < error.std() / dense.std() < 0.02


class Fixed:
  """Random keys, values and queries, and the steps of a cache over them without a model."""

  def __init__(self, kv: KVConfig, num_blocks: int | None = None) -> None:
    self.length, rng = np.array([30, 41]), np.random.default_rng(0)
    self.k, self.v = rng.normal(size=(2, 2, 2, 2, 256, 16)).astype(np.float32)
    self.q = rng.normal(size=(256, 2, 2, 4, 16)).astype(np.float32)
    self.host = CompressedKV(
      kv,
      dims(),
      Recording((jnp.asarray(self.k), jnp.asarray(self.v))),
      self.length.copy(),
      np.full(2, 200),
      None if num_blocks is None else store_of(kv, dims(), num_blocks),
    )
    self.state = self.host.state

  def step(self) -> np.ndarray:
    at, active = jnp.asarray(self.length, jnp.int32), np.ones(2, bool)
    self.state = self.host.before_step(self.state, at, active)
    new = [
      np.stack([c[:, b, :, self.length[b]] for b in range(2)], axis=1) for c in (self.k, self.v)
    ]
    out, self.state = attend_all(self.q[self.length[0]], *new, self.state, at, active)
    self.length += 1
    return np.asarray(out)


def test_exhaustion_changes_nothing_and_can_be_waited_out() -> None:
  free, tight = Fixed(KV), Fixed(KV)
  others = tight.host.pool.allocate(tight.host.pool.stats().free - 5)
  before = tight.host.usage
  with pytest.raises(PoolExhaustedError, match="2 KV blocks asked for, 1 of"):
    for _ in range(200):
      np.testing.assert_array_equal(tight.step(), free.step())
  at = tight.host.usage
  assert at.seen == tight.length.sum() > before.seen and at.blocks == before.blocks + 4
  for _ in range(3):  # asking again is in vain, and harmless
    with pytest.raises(PoolExhaustedError):
      tight.step()
  tight.host.pool.check()
  assert tight.host.usage == at
  tight.host.pool.release(others)
  for _ in range(60):
    np.testing.assert_array_equal(tight.step(), free.step())
  assert tight.host.usage == free.host.usage


def test_a_prompt_that_does_not_fit_and_release() -> None:
  with pytest.raises(PoolExhaustedError, match="6 KV blocks asked for, 5 of 5 free"):
    Fixed(KV, num_blocks=6)
  with pytest.raises(ConfigError, match="num_blocks is 0"):
    Fixed(KV, num_blocks=0)
  one = Fixed(KV, num_blocks=7)
  assert one.host.pool.stats().free == 0
  for _ in range(2):  # the second time there is nothing left to give
    one.host.close(one.state)
    one.host.pool.check()
    assert one.host.pool.stats().in_use == 0 and one.host.usage.blocks == 0


@pytest.mark.parametrize(("symmetric", "head_dim"), [(True, 64), (False, 128)])
def test_bytes(symmetric: bool, head_dim: int) -> None:
  """4096 tokens, 0.6 of them kept, in int4 with groups of 32; counted by hand."""
  int4 = KVFormat(4, 32, symmetric)
  kv = KVConfig(int4, int4, policy=get_policy("knorm"), protect=Protect(4, 64, 0))
  layers, rows, heads = 1, 1, 2
  shape = (layers, rows, heads, 4096, head_dim)
  config = dims(layers, 4, heads, head_dim)
  dense = [jax.random.normal(jax.random.key(i), shape).astype(jnp.float16) for i in range(2)]
  length, room = np.array([4096]), np.array([0])
  kept = 2458  # ceil(0.6 * 4096)
  ring = 4096 - 4 - 4000  # 125 blocks of 32 leave the rest in the ring
  blocks = layers * -(-(kept - 4 - ring) // 32)
  scales = head_dim // 32 * 2 * (1 if symmetric else 2)
  store = store_of(kv, config, 1 + blocks)
  held = CompressedKV(kv, config, Recording((dense[0], dense[1])), length, room, store)
  use, paged = held.usage, held.state.paged
  block = 32 * (2 * heads * (head_dim // 2 + scales) + 4)  # and four bytes of position
  ends = layers * 2 * heads * (4 + 64 + 32) * head_dim * 2
  bfloat16 = layers * 2 * heads * 4096 * head_dim * 2
  assert (use.blocks, use.block_bytes, use.dense_bytes) == (blocks, blocks * block, ends)
  assert (use.seen, use.kept, use.float16_bytes) == (4096, kept, bfloat16)
  assert use.keep_ratio == kept / 4096
  assert use.compression == bfloat16 / (use.block_bytes + use.dense_bytes)

  pages = sum(a.nbytes for a in jax.tree.leaves((paged.key_pages, paged.value_pages)))
  live = sum(a.nbytes for a in jax.tree.leaves(held.state))
  assert pages + paged.slot_pos.nbytes == (blocks + 1) * block  # the null block
  assert use.block_bytes == blocks * (pages + paged.slot_pos.nbytes) // held.store.num_blocks
  # Asymmetric codes take 5 bits: with the dense ends they come to 0.21.
  assert use.block_bytes <= bfloat16 / 5
  assert live <= bfloat16 * (0.2 if symmetric else 0.212)


def test_a_pool_is_hardly_larger_than_what_it_must_hold() -> None:
  sizes = {n: _pool_size(n) for n in range(1, 5000)}
  assert all(n <= size < n + max(16, n / 8) for n, size in sizes.items())
  assert len(set(sizes.values())) < 70, "or each number of blocks compiles programs of its own"


def check(kv: KVConfig, head_dim: int = 64) -> None:
  kv.check(dims(head_dim=head_dim))


@pytest.mark.parametrize(
  ("kv", "message"),
  [
    (KVConfig(key=KVFormat(4, 48)), "keys cannot.*group_size=48 does not divide head_dim=64"),
    (KVConfig(value=KVFormat(8, 128)), "values cannot.*group_size=128.*head_dim of 64"),
    (KVConfig(block_size=20), "block_size is 20; expected 16 to 256, a multiple of 16"),
    (KVConfig(block_size=0), "block_size is 0"),
    (KVConfig(block_size=272), "block_size is 272"),
    (KVConfig(policy=get_policy("knorm"), select=TopP()), "TopP needs scores of 0.*KNorm"),
    (KVConfig(policy=get_policy("knorm"), select=LogZ()), "LogZ needs.*Choose UnionRank"),
    (KVConfig(policy=get_policy("knorm"), select=UnionRank(by="logz")), "UnionRank needs"),
  ],
)
def test_misuse(kv: KVConfig, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    check(kv)


@pytest.mark.parametrize("select", [TopP(), LogZ(), MedianStd(), UnionRank(by="logz")])
def test_amounts_of_attention_are_fine(select: Select) -> None:
  check(KVConfig(policy=get_policy("snapkv"), select=select))


def test_more_bits_than_a_float16_are_not_claimed() -> None:
  assert KVConfig(KVFormat(8, 32), KVFormat(4, 32, True)).bits_per_value(64) == (9 + 4.5) / 2


@pytest.mark.parametrize("kv", [KV, replace(EVICT, evict_every=16)])
def test_what_the_device_may_be_reading_is_never_written_to(
  model: Model, kv: KVConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  """On CPUs the device reads host arrays as they lie, some time later: they must be done with."""
  given = jnp.asarray

  def freezing(x: object, *args: object, **options: object) -> jax.Array:
    if isinstance(x, np.ndarray) and x.flags.owndata:
      x.flags.writeable = False
    return given(x, *args, **options)

  monkeypatch.setattr("q4jax.kv.cache.jnp.asarray", freezing)
  _, run = decode(model, kv)
  assert run.compressed is not None
  run.compressed.close(run.state)
