"""Slots that no score may evict."""

from dataclasses import dataclass

import jax

from q4jax.kv import checks


@dataclass(frozen=True)
class Protect:
  """The first and the newest tokens of a text, by their positions in it.

  Protected slots count as kept. If they alone exceed the target, they all stay, and nothing else.

  Attributes:
    sink: first positions, which take attention whatever they say (StreamingLLM, arXiv 2309.17453).
    recent: last positions.
    grace: a slot stays until so many queries, its own included, could have seen it. By position
      this is what `recent` is, and the larger of the two rules; but its reason is another: a mean
      over fewer visits is noise, so policies on cumulative attention want 16 even where an
      experiment sets `recent=0`.
  """

  sink: int = 4
  recent: int = 64
  grace: int = 16

  def __post_init__(self) -> None:
    for name in ("sink", "recent", "grace"):
      checks.whole(self, name, at_least=0)

  def __call__(self, pos: jax.Array, length: jax.Array, valid: jax.Array) -> jax.Array:
    """bool[B, S], from pos int32[B, S], length int32[B] (tokens seen so far), valid bool[B, S]."""
    newest = pos >= length[:, None] - max(self.recent, self.grace)
    return valid & ((pos < self.sink) | newest)
