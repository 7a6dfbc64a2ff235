r"""What thresholds keep, and cost: median + alpha * std, a quantile, or an exact share of tokens.

  python -m experiments.kv_threshold                                   # 11 rows, 70 s
  python -m experiments.kv_threshold --policies=threshold,h2o --selects=quantile:0.75,keep:0.6
  python -m experiments.kv_threshold --speed_model=1b.Q4_K_M.gguf --selects= \
    --out=experiments/results/kv_rates_1b.json                         # tok/s at 4k, 8k

A prompt is read, evicted once as the rule says, and the text's rest stepped through. Measured are
the share of the prompt's tokens that stays (protected ones among them), the perplexity, the bytes,
and the lost mass: how much of the attention that later tokens pay in the dense cache goes to what
was evicted, mean over queries, heads and layers. Nothing of this is a time; any two cores do.

  selects  alpha:A (median + A std), quantile:Q, keep:K (the same rules calibrated to a share)

Rates at depth come from --speed_model (q4jax bench's protocol; a dense cache, int4 blocks, and the
same with keep 0.6 take turns in every repetition, medians), or else from a committed record of such
a run.

Expected: an uncalibrated rule keeps what the scores' distribution makes of it. H independent heads
of which any may keep a token keep 1 - q^H of them, so a quantile says nothing before H is known.
Which questions survive eviction is another table, kv_retrieval.
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import inputs, plots, stepping
from experiments.config_flags import option
from experiments.experiment import Claim, command, each
from q4jax.engine import bench
from q4jax.engine.engine import Engine
from q4jax.errors import ConfigError
from q4jax.kv.compress import attention, decide
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import MedianStd, Quantile, Select, UnionRank
from q4jax.model.caches import Recording, Span
from q4jax.model.llama import Llama
from q4jax_kernels.kv_format import KVFormat

Record = dict[str, Any]
SELECTS: dict[str, Any] = {
  "alpha": MedianStd, "quantile": Quantile, "keep": lambda keep: UnionRank(keep, by="rank"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """A row for each policy and rule, and of rates, for each depth."""

  model: str = option("tiny", "A model that q4jax.load takes, or tiny_f16.")
  text: str = option("held_out", "held_out or calibration, a file, or hf://datasets/...")
  policies: tuple[str, ...] = option(("threshold",), "What scores tokens.")
  selects: tuple[str, ...] = option(
    ("alpha:0", "alpha:0.5", "alpha:1", "quantile:0.5", "quantile:0.75", "quantile:0.9",
     "keep:0.8", "keep:0.6", "keep:0.4", "keep:0.2", "keep:0.1"),
    "Rules that choose by score; see above.",
  )  # fmt: skip
  ctx: int = option(512, "Tokens of a sequence; its first half is the prompt.")
  sequences: int = option(8, "Sequences.")
  sink: int = option(4, "First tokens that stay.")
  recent: int = option(16, "Newest tokens that stay.")
  speed_model: str = option("", "A model whose rates are measured at depth.")
  depths: tuple[int, ...] = option((4096, 8192), "Tokens in the cache when rates are measured.")
  reps: int = option(9, "Repetitions of 24 tokens.")
  speed_records: str = option(
    "experiments/results/kv_rates_1b_zen3.json",
    "Rates that were measured before, by --speed_model and --out; used without the former.",
  )


def select(name: str) -> Select:
  """The rule that a name stands for; ConfigError where there is none."""
  kind, _, number = name.partition(":")
  try:
    return SELECTS[kind](float(number))
  except (KeyError, ValueError) as error:
    raise ConfigError(
      f"--selects: '{name}' is no rule; expected alpha:A, quantile:Q or keep:K with a number."
    ) from error


def run(config: Config) -> list[Record]:
  """A record for each row of the table; `kind` is "quality" or "speed"."""
  model = inputs.model(config.model)
  rules = {name: select(name) for name in config.selects}
  sequences = inputs.sequences(model, config.text, config.sequences, config.ctx)
  records = []
  for policy in config.policies:
    for name, rule in rules.items():
      kv = KVConfig(
        policy=get_policy(policy), select=rule, protect=Protect(config.sink, config.recent, 0)
      )
      kept, lost = model.jit(_lost, static_argnums=2)(model.leaves, jnp.asarray(sequences), kv)
      record = {
        "kind": "quality", "policy": policy, "select": name, "heads": model.config.num_kv_heads,
        "prompt_kept": float(kept), "lost_mass": float(lost),
      }  # fmt: skip
      records.append(record | stepping.measure(model, sequences, kv))
      print(f"{policy} {name}: {records[-1]['ratio']:.4f}", file=sys.stderr, flush=True)
  return records + (_speeds(config) if config.speed_model else _cited(config))


def _lost(module: Llama, tokens: jax.Array, kv: KVConfig) -> tuple[jax.Array, jax.Array]:
  """int32[B, T] -> the share of prompts that stays, the share of later attention on the rest."""
  c, (batch, total) = module.config, tokens.shape
  prompt = total // 2
  zeros = jnp.zeros((c.num_layers, batch, c.num_kv_heads, total, c.head_dim))
  starts = jnp.zeros(batch, jnp.int32)
  _, read = module.hidden(
    tokens[:, :prompt], kv.recording((zeros, zeros), c.num_heads), Span(starts, starts + prompt)
  )
  assert isinstance(read, Recording)
  keep = decide(read, starts + prompt, kv)  # [L, B, S]
  pos = jnp.arange(total)
  # What neither stays in the ring nor in a block: `decide` says True of what goes to blocks alone.
  none = decide(read, starts + prompt, dataclasses.replace(kv, policy=None))
  gone = none & ~keep
  queries = jnp.zeros((c.num_layers, batch, total - prompt, c.num_heads, c.head_dim))
  _, whole = module.hidden(tokens, Recording((zeros, zeros), queries), Span(starts, starts + total))
  assert isinstance(whole, Recording) and whole.queries is not None

  def layer(arrays: tuple) -> jax.Array:
    q, k, gone = arrays
    p = attention(q, k, jnp.broadcast_to(pos, (batch, total)), starts + total)  # [B, N, W, S]
    return jnp.sum(p * gone[:, None, None], axis=-1).mean()

  lost = jax.lax.map(layer, (whole.queries, whole.cache[0], gone)).mean()
  return 1 - gone[:, :, :prompt].mean(), lost


def _speeds(config: Config) -> list[Record]:
  """Rates of decoding at depth: floats, int4 blocks, and those with eviction."""
  model = inputs.model(config.speed_model)
  group = next(g for g in (64, 32, None) if g is None or model.config.head_dim % g == 0)
  int4 = KVConfig(KVFormat(4, group), KVFormat(4, group), rotate=True)
  evicting = dataclasses.replace(int4, policy=get_policy("snapkv"), select=UnionRank(0.6))
  sides = {"dense float16": None, "int4": int4, "int4, keep 0.6": evicting}
  engines = [Engine(model, kv=kv, max_context=max(config.depths) + 32) for kv in sides.values()]
  records = []
  for depth in config.depths:
    results = bench.compare(engines, bench.Test(0, 24, depth), config.reps)
    for side, result in zip(sides, results, strict=True):
      records.append({"kind": "speed", "side": side, "depth": depth,
                      "tokens_per_s": statistics.median(result.rates), "rates": result.rates,
                      "from": Path(config.speed_model).name})  # fmt: skip
  return records


def _cited(config: Config) -> list[Record]:
  """The rates of a run before, with its date."""
  path = Path(config.speed_records)
  if not config.speed_records:
    return []
  if not path.is_file():
    raise ConfigError(f"--speed_records={path} is no file; give one, or an empty name for none.")
  whole = json.loads(path.read_text())
  rates = [r for r in whole["records"] if r["kind"] == "speed"]
  return [r | {"from": f"{r['from']}, {whole['time'][:10]}"} for r in rates]


def _speed_records(records: list[Record]) -> list[Record]:
  """Each once: every config that cites them has them."""
  unique = {(r["side"], r["depth"]): r for r in records if r["kind"] == "speed"}
  return list(unique.values())


def table(records: list[Record]) -> list[list[str]]:
  """Rows for Markdown."""
  head = ["policy", "rule", "prompt kept", "lost mass", "bytes of float16",
          "perplexity against dense", "KL", "tok/s"]  # fmt: skip
  rows = [
    [
      r["policy"],
      r["select"],
      f"{r['prompt_kept']:.3f}",
      f"{100 * r['lost_mass']:.2f} %",
      f"{1 / r['compression']:.3f}",
      stepping.change(r),
      f"{r['kl']:.4f}",
      "",
    ]
    for r in records
    if r["kind"] == "quality"
  ]
  rows += [
    [r["side"], f"at {r['depth']} ({r['from']})", "", "", "", "", "", f"{r['tokens_per_s']:.1f}"]
    for r in _speed_records(records)
  ]
  return [head, *rows]


def plot(records: list[Record], path: str) -> None:
  """Perplexity against what stays of the prompt, by rule; and against the lost mass."""
  with plots.figure(path, columns=2) as (left, right):
    mine = [r for r in records if r["kind"] == "quality"]
    for policy in dict.fromkeys(r["policy"] for r in mine):
      for kind in SELECTS:
        some = [r for r in mine if r["policy"] == policy and r["select"].startswith(kind)]
        some.sort(key=lambda r: r["prompt_kept"])
        if some:
          label = f"{policy}, {kind}"
          plots.with_interval(left, [r["prompt_kept"] for r in some], some, label=label)
          right.plot(
            [100 * r["lost_mass"] for r in some], [r["kl"] for r in some], "o-", label=label
          )
    plots.change_axis(left, xlabel="share of the prompt that stays", title="95% intervals")
    right.set(xlabel="lost mass, % of later attention", ylabel="KL, nats a token")
    right.grid(alpha=0.3)
    if mine:
      left.legend(fontsize="small")


def quick() -> list[Config]:
  """Nine rows, a minute and a half."""
  selects = tuple(name for name in Config().selects if name not in ("keep:0.8", "keep:0.1"))
  return each(Config(selects=selects), "policies", "selects")


def full() -> list[Config]:
  """Policies on attention, on more text."""
  policies = ("threshold", "snapkv", "value_snap", "h2o", "expected_attention", "keydiff", "random")
  return each(Config(policies=policies, sequences=32, ctx=1024), "policies", "selects")


def _speed(depth: int) -> Any:
  def measure(records: list[Record]) -> float | None:
    at = {r["side"]: r["tokens_per_s"] for r in _speed_records(records) if r["depth"] == depth}
    return at["int4, keep 0.6"] / at["int4"] if {"int4", "int4, keep 0.6"} <= set(at) else None

  return measure


def _evicted(records: list[Record]) -> float | None:
  found = [r for r in records if r["kind"] == "quality" and r["select"] == "quantile:0.75"]
  return 100 * (1 - found[0]["prompt_kept"]) if found else None


CLAIMS = (
  *(
    Claim(
      f"eviction at q = .75: speed at {depth}", claimed, "x",
      "int4 blocks with keep 0.6 (snapkv) over the same without eviction, tok/s",
      _speed(depth),
      "attention over int4 is the smaller part of such a step (docs/kv.md), so that evicting 40% "
      "of the tokens saves at most 40% of that part",
    )
    for depth, claimed in ((4096, 1.39), (8192, 1.51))
  ),
  Claim(
    "eviction at q = .75: cache", 38.0, "% less", "share of the prompt that is evicted", _evicted,
    "a union over H independent heads evicts q^H: 75% with one KV head, as tiny has, 32% with "
    "4, 10% with 8; the claim does not say how many it had",
  ),
)  # fmt: skip
VERSION = 1

if __name__ == "__main__":
  command(__name__)
