"""The flags of the compressed KV cache, and what they describe."""

from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from q4jax.cli.parsing import UsageError

if TYPE_CHECKING:
  from q4jax.kv.config import KVConfig


def define(flags: absl_flags.FlagValues) -> None:
  """The flags that `config` reads."""

  def text(name: str, default: str | None, help: str) -> None:
    absl_flags.DEFINE_string(name, default, help, flag_values=flags)

  def whole(name: str, default: int, help: str) -> None:
    absl_flags.DEFINE_integer(name, default, help, lower_bound=0, flag_values=flags)

  def number(name: str, default: float | None, help: str) -> None:
    absl_flags.DEFINE_float(name, default, help, flag_values=flags)

  def switch(name: str, help: str) -> None:
    absl_flags.DEFINE_boolean(name, False, help, flag_values=flags)

  text(
    "kv_bits",
    None,
    "Bits of a stored key and value: 4, 8, 16 or 32; two numbers for keys and values, as 8,4.",
  )
  whole("kv_group", 32, "Numbers that share a scale, a divisor of the head; 0 for a whole head.")
  switch("kv_symmetric", "Codes around zero, without minimums.")
  switch("kv_rotate", "Rotate heads (Hadamard) before they are stored: 4 bits lose less.")
  number("keep", None, "Share of the tokens that stay, 0 to 1: evicts the others.")
  text("kv_policy", "snapkv", "What scores tokens; `--kv_policy=?` lists all.")
  text(
    "kv_select",
    "union_rank",
    "How scores decide: union_rank (exactly --keep), median_std (--kv_alpha), quantile "
    "(--kv_quantile), log_z (--kv_alpha), top_p (--kv_quantile).",
  )
  number("kv_alpha", 0.5, "Deviations above the median that a token must score.")
  number("kv_quantile", 0.75, "Quantile above which a token must score; top_p's p.")
  whole("kv_sink", 4, "First tokens, which always stay.")
  whole("kv_recent", 64, "Newest tokens, which always stay, in floats.")
  whole(
    "kv_evict_every",
    0,
    "Evict again after so many more tokens of a sequence, a multiple of 32: --keep is then of all "
    "tokens. 0: only the prompt's.",
  )
  switch("kv_mask", "Hide evicted tokens and keep their memory, to compare with.")


def define_pool(flags: absl_flags.FlagValues) -> None:
  """The flags that `pool` reads."""
  absl_flags.DEFINE_integer(
    "kv_pool_tokens",
    0,
    "Room of the compressed cache, in tokens, for all prompts of a call; those that do not fit "
    "wait. 0: as much as they can need.",
    lower_bound=0,
    flag_values=flags,
  )
  absl_flags.DEFINE_boolean(
    "kv_share_prefixes",
    False,
    "Keep what was read of prompts in the pool, and do not read it again where another begins "
    "alike, as a conversation's next turn does. Needs --kv_pool_tokens, and no eviction.",
    flag_values=flags,
  )


def config(flags: absl_flags.FlagValues) -> "KVConfig | None":
  """The cache that the flags ask for; None where they ask for none.

  Raises:
    UsageError, ConfigError: a value that no cache can have.
  """
  evicts = flags.keep is not None or flags["kv_select"].present
  asked = ("kv_policy", "kv_alpha", "kv_quantile", "kv_mask", "kv_evict_every")
  if flags.kv_policy == "?":
    from q4jax.kv.policy import policy_names

    raise UsageError(f"--kv_policy is one of {', '.join(policy_names())}.")
  if not evicts and (idle := [name for name in asked if flags[name].present]):
    raise UsageError(f"--{idle[0]} needs --keep=SHARE or --kv_select: nothing is evicted.")
  if not evicts and flags.kv_bits is None:
    return None
  from q4jax.kv.config import KVConfig
  from q4jax.kv.policy import get_policy
  from q4jax.kv.protect import Protect

  key, value = _formats(flags)
  protect = Protect(flags.kv_sink, flags.kv_recent, 0)
  options: dict[str, Any] = {"key": key, "value": value, "rotate": flags.kv_rotate}
  if evicts:
    options |= {"policy": get_policy(flags.kv_policy), "select": _select(flags)}
  return KVConfig(**options, protect=protect, mask=flags.kv_mask, evict_every=flags.kv_evict_every)


def pool(flags: absl_flags.FlagValues) -> dict[str, Any]:
  """The arguments of `Engine` that the flags of the pool set, if the command has them.

  Raises:
    UsageError: there is no compressed cache, or what is shared would be evicted.
  """
  asked = [
    name for name in ("kv_pool_tokens", "kv_share_prefixes") if name in flags and flags[name].value
  ]
  if not asked:
    return {}
  kv = config(flags)
  if kv is None:
    raise UsageError(f"--{asked[0]} is for a compressed cache; give --kv_bits (16 rounds nothing).")
  if flags.kv_share_prefixes and (kv.policy is not None or not flags.kv_pool_tokens):
    raise UsageError("--kv_share_prefixes needs --kv_pool_tokens=N, and no --keep or --kv_select.")
  return {"kv_pool_tokens": flags.kv_pool_tokens, "share_prefixes": flags.kv_share_prefixes}


def _formats(flags: absl_flags.FlagValues) -> list[Any]:
  from q4jax_kernels.kv_format import KVFormat

  words = (flags.kv_bits or "16").split(",")
  if len(words) > 2 or any(word not in ("4", "8", "16", "32") for word in words):
    raise UsageError(f"--kv_bits={flags.kv_bits}; expected 4, 8, 16 or 32, or two of them: 8,4.")
  formats = []
  for bits in map(int, words):
    coded = bits < 16
    group = (flags.kv_group or None) if coded else None
    formats.append(KVFormat(bits, group, symmetric=flags.kv_symmetric and coded))
  return formats * 2 if len(formats) == 1 else formats


def _select(flags: absl_flags.FlagValues) -> Any:
  from q4jax.kv.select import get_select

  name = flags.kv_select
  if name == "union_rank" and flags.keep is None:
    raise UsageError("--kv_select=union_rank needs --keep=SHARE.")
  if name != "union_rank" and flags.keep is not None:
    raise UsageError(f"--keep is for --kv_select=union_rank; {name} has a threshold of its own.")
  options = {
    "union_rank": {"keep": flags.keep},
    "median_std": {"alpha": flags.kv_alpha},
    "log_z": {"alpha": flags.kv_alpha},
    "quantile": {"q": flags.kv_quantile},
    "top_p": {"p": flags.kv_quantile},
  }
  return get_select(name, **options.get(name, {}))
