"""From sampled tokens to text that can be shown at once, with stop strings held back."""

from q4jax.text.tokenizer import Tokenizer


class TextAssembler:
  """Turns one sequence's tokens into text, a token at a time.

  What `push` returns is final: whole UTF-8 characters, and nothing that could still become part of
  a stop string. `stopped` tells whether a stop string was met; the text ends before it.
  """

  def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
    # The text goes on from the prompt's: a space that begins it is the model's own.
    self._stream = tokenizer.stream(continues=True)
    self._stops = stops
    self._held = ""
    self.stopped = False

  def push(self, token: int) -> str:
    """The text that this token completes, often empty."""
    return self._release(self._stream.push(token))

  def flush(self) -> str:
    """The rest, once no token follows."""
    text = self._release(self._stream.flush())
    if self.stopped:
      return text
    rest, self._held = self._held, ""
    return text + rest

  def _release(self, new: str) -> str:
    if self.stopped:
      return ""
    text = self._held + new
    found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
    if found:
      self.stopped, self._held = True, ""
      return text[: min(found)]
    keep = max((_overlap(text, stop) for stop in self._stops), default=0)
    self._held = text[len(text) - keep :]
    return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` that begins `stop`."""
  for size in range(min(len(text), len(stop) - 1), 0, -1):
    if text.endswith(stop[:size]):
      return size
  return 0
