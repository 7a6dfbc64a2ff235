r"""Fewer tokens in more bits, or more tokens in fewer: perplexity at equal bytes of the KV cache.

  python -m experiments.kv_frontier                                # 12 rows, 80 s
  python -m experiments.kv_frontier --budgets=0.2 --policy=keydiff --stores=f16,int4r

Any two CPU cores (nothing here is a time). A budget is a share of the bytes that float16 blocks of
all tokens would take. A store of b effective bits may hold the share budget * 16 / b of the tokens;
where that is all of them, it holds all and stays below its budget. The rest is evicted, after the
prompt and again every 32 tokens of stepping. Sinks and the newest tokens lie beside the blocks in
floats and count as kept; they are the same for all stores, so bytes of a row are a little more.

Expected: 4 bits win wherever bytes are scarce, and all win the same where they are not. There is no
2-bit store here, which is where published curves collapse.
"""

import dataclasses
import sys
from typing import Any

from experiments import inputs, kv_quality, plots, stepping
from experiments.config_flags import option
from experiments.experiment import Claim, command, each
from q4jax.errors import ConfigError
from q4jax.kv.policy import get_policy
from q4jax.kv.select import UnionRank

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
  """A row for each budget and store."""

  model: str = option("tiny", "A model that q4jax.load takes, or tiny_f16.")
  text: str = option("held_out", "held_out or calibration, a file, or hf://datasets/...")
  budgets: tuple[float, ...] = option((0.1, 0.15, 0.2, 0.3), "Shares of float16's bytes.")
  stores: tuple[str, ...] = option(("f16", "int8r", "int4r"), "As kv_quality's rows name them.")
  policy: str = option("snapkv", "What scores tokens.")
  group: int = option(32, "Numbers that share a scale.")
  ctx: int = option(512, "Tokens of a sequence; its first half is the prompt.")
  sequences: int = option(8, "Sequences.")
  sink: int = option(4, "First tokens that stay.")
  recent: int = option(16, "Newest tokens that stay.")


def run(config: Config) -> list[Record]:
  """A record for each row of the table."""
  if not all(0 < budget <= 1 for budget in config.budgets):
    raise ConfigError(f"--budgets={config.budgets}: expected shares above 0, up to 1.")
  model = inputs.model(config.model)
  sequences = inputs.sequences(model, config.text, config.sequences, config.ctx)
  named = kv_quality.Config(group=config.group, sink=config.sink, recent=config.recent)
  records = []
  for budget in config.budgets:
    for store in config.stores:
      kv = kv_quality.kv_config(store, named, model.config.head_dim)
      bits = kv.bits_per_value(model.config.head_dim)
      keep = round(min(1.0, budget * 16 / bits), 4)
      if keep < 1:
        select = UnionRank(keep, by="rank")
        kv = dataclasses.replace(
          kv, policy=get_policy(config.policy), select=select, evict_every=32
        )
      measured = stepping.measure(model, sequences, kv)
      record = {"budget": budget, "store": store, "bits": bits, "keep": keep}
      records.append(record | {"policy": config.policy} | measured)
      print(f"{budget} {store}: {measured['ratio']:.4f}", file=sys.stderr, flush=True)
  return records


def table(records: list[Record]) -> list[list[str]]:
  """Rows for Markdown."""
  head = ["budget", "store", "bits", "tokens", "bytes of float16", "against dense", "KL"]
  return [head] + [
    [
      f"{r['budget']:g}",
      r["store"],
      f"{r['bits']:.2f}",
      f"{r['keep']:.2f}",
      f"{1 / r['compression']:.3f}",
      stepping.change(r),
      f"{r['kl']:.4f}",
    ]
    for r in records
  ]


def plot(records: list[Record], path: str) -> None:
  """The change of perplexity, and KL, against the budget; a line for each store."""
  with plots.figure(path, columns=2) as (left, right):
    for store in dict.fromkeys(r["store"] for r in records):
      mine = sorted((r for r in records if r["store"] == store), key=lambda r: r["budget"])
      x = [r["budget"] for r in mine]
      plots.with_interval(left, x, mine, label=f"{store}, {mine[0]['bits']:g} bits")
      right.plot(x, [r["kl"] for r in mine], "o-", label=store)
    plots.change_axis(left, xlabel="budget, share of float16", title="95% intervals")
    right.set(yscale="log", xlabel="budget, share of float16", ylabel="KL, nats a token")
    right.grid(alpha=0.3)
    for axis in (left, right):
      axis.set_xticks(sorted({r["budget"] for r in records}))
    left.legend()


def quick() -> list[Config]:
  """Nine rows."""
  return each(Config(budgets=(0.1, 0.2, 0.3)), "budgets", "stores")


def full() -> list[Config]:
  """More budgets, policies and text."""
  budgets = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
  return [
    one
    for policy in ("snapkv", "keydiff", "expected_attention", "streaming")
    for one in each(
      Config(budgets=budgets, policy=policy, sequences=32, ctx=1024), "budgets", "stores"
    )
  ]


CLAIMS: tuple[Claim, ...] = ()
VERSION = 1

if __name__ == "__main__":
  command(__name__)
