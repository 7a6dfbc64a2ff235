"""How the KV cache is compressed: the one description that engine, flags and experiments share."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError
from q4jax.kv.policy import Policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import Select, UnionRank
from q4jax.model.caches import Recording
from q4jax_kernels.attention import Cache
from q4jax_kernels.kv_format import KVFormat

FLOAT16 = KVFormat(16)


@dataclass(frozen=True)
class KVConfig:
  """Storage and eviction, each of which may be left out.

  Attributes:
    key, value: how tokens that have left the recent window are stored; float16 keeps them as they
      are.
    rotate: whether heads are rotated (Hadamard) before they are stored.
    policy: scores tokens at the end of prefill; None evicts nothing.
    select: turns scores into the tokens that stay.
    protect: the first tokens and the newest, which always stay, in floats.
    mask: hide evicted tokens instead of removing them: the same output, nothing freed.
    block_size: tokens of a kv block.
    evict_every: after so many more tokens of a sequence, what it holds is scored and evicted again;
      sooner where the pool is exhausted. A multiple of block_size; 0: only after the prompt.
  """

  key: KVFormat = FLOAT16
  value: KVFormat = FLOAT16
  rotate: bool = False
  policy: Policy | None = None
  select: Select = field(default_factory=UnionRank)
  protect: Protect = field(default_factory=Protect)
  mask: bool = False
  block_size: int = 32
  evict_every: int = 0

  def check(self, config: LlamaConfig) -> None:
    """ConfigError unless a model of these dimensions can have such a cache."""
    if self.block_size < 16 or self.block_size % 16 or self.block_size > 256:
      raise ConfigError(f"block_size is {self.block_size}; expected 16 to 256, a multiple of 16.")
    if self.evict_every < 0 or self.evict_every % self.block_size:
      raise ConfigError(
        f"evict_every is {self.evict_every}; expected 0 (only after the prompt) or a multiple of "
        f"the block_size of {self.block_size}."
      )
    if self.evict_every and self.policy is None:
      raise ConfigError(
        f"evict_every is {self.evict_every}, but there is no policy to say what goes. Give one, or "
        "leave evict_every at 0."
      )
    for name, format in (("keys", self.key), ("values", self.value)):
      try:
        format.groups(config.head_dim)
      except ValueError as error:
        raise ConfigError(
          f"{name} cannot be stored so: {error} Choose a group size that divides the model's "
          f"head_dim of {config.head_dim}."
        ) from error
    if self.policy is not None and self.select.amounts and not self.policy.nonnegative:
      raise ConfigError(
        f"{type(self.select).__name__} needs scores of 0 or more, and {type(self.policy).__name__} "
        "does not promise them. Choose UnionRank, TopK, MedianStd or Quantile."
      )

  @property
  def window(self) -> int:
    """Queries that must be remembered for the policy, of the prompt's last; 0 if none."""
    if self.policy is None:
      return 0
    needs = self.policy.needs
    return needs.window if needs.attn == "window" or needs.queries else 0

  @property
  def mass(self) -> bool:
    """Whether the attention that each slot gets must be summed for the policy."""
    return self.policy is not None and self.policy.needs.attn == "cumulative"

  @property
  def evicts_again(self) -> bool:
    """Whether decoding must go on remembering these."""
    return self.policy is not None and self.evict_every > 0

  def recording(self, dense: Cache, num_heads: int) -> Recording:
    """An empty dense cache [L, B, K, S, H] that remembers what the policy needs of a prompt."""
    layers, batch, _, _, head_dim = dense[0].shape
    shape = (layers, batch, self.window, num_heads, head_dim)
    queries = jnp.zeros(shape) if self.window else None
    return Recording(dense, queries, jnp.zeros(dense[0].shape[:-1]) if self.mass else None)

  def bits_per_value(self, head_dim: int) -> float:
    """Mean bits of a number in the blocks, its part of scales and minimums counted."""
    return (self.key.bits_per_value(head_dim) + self.value.bits_per_value(head_dim)) / 2
