"""How fast it went, how much memory it took: the closing line and its JSON twin."""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from q4jax.cli.common import size
from q4jax.engine import Timing


def rss_bytes(peak: bool = False) -> int:
  """Bytes of memory that this process has now, or had at its peak; files mapped in included."""
  # Not getrusage: its peak is the parent's where that was larger (Linux keeps it across exec).
  field = "VmHWM:" if peak else "VmRSS:"
  try:
    status = Path("/proc/self/status").read_text()
  except OSError:  # Not Linux: the next best thing.
    import resource

    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


class CompileClock:
  """Seconds in which JAX traced and compiled, from now until `close`.

  A program's first call compiles it; without this, that time would pass for slow prefill or decode.
  """

  def __init__(self) -> None:
    self._spans: list[tuple[float, float]] = []
    jax.monitoring.register_event_duration_secs_listener(self._hear)

  def between(self, begin: float, end: float) -> float:
    """The seconds of those compilations that ended within [begin, end] of time.perf_counter."""
    return sum(stop - start for start, stop in self._spans if begin <= stop <= end)

  def close(self) -> None:
    """Stops listening."""
    jax.monitoring.unregister_event_duration_listener(self._hear)

  def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
    if not event.startswith("/jax/core/compile/"):
      return
    now = time.perf_counter()
    # Tracing one function reports those inside it first: their time is part of its own.
    self._spans = [span for span in self._spans if span[0] < now - duration_secs]
    self._spans.append((now - duration_secs, now))


@dataclass(frozen=True)
class Speed:
  """What one call of the engine took. Seconds without compiling, but for `first_token_s`.

  Attributes:
    shared_tokens: of the prompt's, those that were in the cache already and were not read.
    first_token_s: from the call to its first token, compiling included: what the user waited.
    compile_s: of it all, the seconds of compiling, which a second call would not spend.
    peak_rss_bytes: of the process, so far.
  """

  prompt_tokens: int
  shared_tokens: int
  prefill_s: float
  prefill_tokens_per_s: float
  first_token_s: float
  decoded_tokens: int
  decode_s: float
  decode_tokens_per_s: float
  compile_s: float
  peak_rss_bytes: int

  @classmethod
  def of(cls, timing: Timing, clock: CompileClock, began: float) -> "Speed":
    """From the engine's timing of a call that began at `began` (time.perf_counter)."""
    first = began + timing.first_token_s
    compile_prefill = clock.between(began, first)
    compile_decode = clock.between(first, float("inf"))
    prefill_s = max(timing.prefill_s - compile_prefill, 0.0)
    decode_s = max(timing.decode_s - compile_decode, 0.0)
    return cls(
      prompt_tokens=timing.prompt_tokens,
      shared_tokens=timing.shared_tokens,
      prefill_s=prefill_s,
      prefill_tokens_per_s=_rate(timing.prompt_tokens - timing.shared_tokens, prefill_s),
      first_token_s=timing.first_token_s,
      decoded_tokens=timing.decoded_tokens,
      decode_s=decode_s,
      decode_tokens_per_s=_rate(timing.decoded_tokens, decode_s),
      compile_s=compile_prefill + compile_decode,
      peak_rss_bytes=rss_bytes(peak=True),
    )

  def json(self) -> dict[str, float]:
    """As a JSON object; times to the microsecond."""
    return {key: round(value, 6) for key, value in asdict(self).items()}

  def line(self) -> str:
    """The closing line of a command."""
    shared = f" ({self.shared_tokens} shared)" if self.shared_tokens else ""
    return (
      f"prefill {self.prompt_tokens} tokens{shared}, {self.prefill_tokens_per_s:.1f} tok/s | "
      f"decode {self.decoded_tokens} tokens, {self.decode_tokens_per_s:.1f} tok/s | "
      f"first token after {self.first_token_s:.2f} s ({self.compile_s:.2f} s compiling in all) | "
      f"peak memory {size(self.peak_rss_bytes)}"
    )


def _rate(count: int, seconds: float) -> float:
  return count / seconds if seconds else 0.0
