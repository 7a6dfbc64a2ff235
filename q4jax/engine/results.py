"""What generation gives back: chunks, completions, and where the time went."""

from dataclasses import dataclass, field

import numpy as np

from q4jax.engine.programs import Output
from q4jax.kv.cache import KVUsage


@dataclass(frozen=True)
class TokenLogprobs:
  """Log-probabilities under the model, before penalties and temperature.

  Attributes:
    token: the sampled token; logprob: its natural-log probability.
    top: the likeliest (token, logprob) pairs, best first, as many as were asked for.
  """

  token: int
  logprob: float
  top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chunk:
  """One sampled token of one sequence, and the text that it completed.

  Attributes:
    index: which prompt of the batch.
    token: its id; None in a closing chunk that only carries held-back text.
    text: new text, never half a UTF-8 character nor part of a stop string.
    finish_reason: None, or on the last chunk "stop" (a stop token or string) or "length".
  """

  index: int
  token: int | None
  text: str
  logprobs: TokenLogprobs | None = None
  finish_reason: str | None = None


@dataclass
class Timing:
  """Where one call's time went. Seconds; tokens of all sequences together.

  Attributes:
    prompt_tokens: of which `shared_tokens` were not read, for the pool had them.
    kv: what a compressed cache held in the end.
  """

  prompt_tokens: int = 0
  shared_tokens: int = 0
  prefill_s: float = 0.0
  first_token_s: float = 0.0
  decoded_tokens: int = 0
  decode_s: float = 0.0
  kv: KVUsage | None = None

  def prefilled(self, tokens: int, shared: int, seconds: float) -> None:
    """Counts the prompts of one batch; the first token of a call is that of its first batch."""
    self.first_token_s = self.first_token_s or seconds
    self.prompt_tokens += tokens
    self.shared_tokens += shared
    self.prefill_s += seconds

  @property
  def prefill_rate(self) -> float:
    """Prompt tokens a second, of those that were read."""
    read = self.prompt_tokens - self.shared_tokens
    return read / self.prefill_s if self.prefill_s else 0.0

  @property
  def decode_rate(self) -> float:
    """Tokens a second after the first of each sequence."""
    return self.decoded_tokens / self.decode_s if self.decode_s else 0.0


@dataclass
class Completion:
  """What one prompt was answered with.

  Attributes:
    text: without the prompt, the stop token or the stop string.
    tokens: every sampled token, the stop token included.
    finish_reason: "stop" or "length".
  """

  text: str
  tokens: list[int]
  finish_reason: str
  prompt_tokens: int
  timing: Timing
  logprobs: list[TokenLogprobs] = field(default_factory=list)


def logprobs_of(output: Output, row: int, token: int, count: int) -> TokenLogprobs:
  """The sampled token's, and those of the `count` likeliest, of one row."""
  assert output.logprob is not None and output.top_ids is not None
  assert output.top_logprobs is not None
  ids, values = np.asarray(output.top_ids[row]), np.asarray(output.top_logprobs[row])
  top = tuple((int(i), float(v)) for i, v in zip(ids[:count], values[:count], strict=True))
  return TokenLogprobs(token, float(output.logprob[row]), top)
