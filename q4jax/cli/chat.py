"""Talks with a model, in the form that its chat template gives to messages.

  q4jax chat model.gguf
  q4jax chat model.gguf --system="You answer in one sentence." --temperature=0.3
  q4jax chat model.gguf --chat_template=chatml
  printf 'Hello\\nAnd you?\\n' | q4jax chat model.gguf --json

Each line is a message; the answer is written as it comes, and all that was said stays in the
conversation. /reset forgets it, /help lists the commands, /exit or Ctrl-D leaves. Ctrl-C stops an
answer and keeps what there is of it. What you type is plain text to the model, special tokens too.

With stdin from a file or a pipe, each line that is not empty is a message, and Ctrl-C or an error
ends the command. --json prints one object an answer, each on its line: text, tokens (ids),
finish_reason (stop, length, interrupted), prompt_tokens (of the whole conversation) and timing.
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from q4jax.cli import common
from q4jax.errors import Q4JaxError

if TYPE_CHECKING:
  from q4jax.engine import Engine
  from q4jax.text.chat import ChatTemplate

ARGUMENTS = ("MODEL",)
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_string("system", None, "What the model is told first.", flag_values=FLAGS)
absl_flags.DEFINE_string(
  "chat_template",
  None,
  "A built-in template (chatml, llama3 and others) in place of the model's own.",
  flag_values=FLAGS,
)
common.define_sampling(FLAGS, max_tokens=512)
common.define_engine(FLAGS)
common.define_model(FLAGS)
common.define_json(FLAGS, "one JSON object an answer")

_COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Reads messages and answers them until there are no more."""
  model, _ = common.load_model(arguments[0], flags, flags.tokenizer)
  from q4jax.text.chat import ChatTemplate

  template = ChatTemplate.for_tokenizer(model.tokenizer, flags.chat_template)
  talk = _Talk(common.make_engine(model, flags), template, flags)
  typed = sys.stdin.isatty()
  if typed:
    common.note(f"Talking with {arguments[0]}. {_COMMANDS}")
  for line in _typed_lines() if typed else sys.stdin:
    message = line.strip()
    if message == "/exit":
      break
    if message == "/reset":
      talk.reset()
    elif message.startswith("/"):
      common.note(_COMMANDS if message == "/help" else f"There is no {message}. {_COMMANDS}")
    elif message:
      try:
        finished = talk.say(message)
      except Q4JaxError as error:
        if not typed:
          raise
        common.note(f"q4jax: error: {error} (/reset begins a new conversation.)")
        continue
      if not (finished or typed):
        return 130
  return 0


def _typed_lines() -> Iterator[str]:
  """Lines from a terminal, with the editing keys and history of readline."""
  import readline  # noqa: F401  # It changes what input() does.

  while True:
    try:
      yield input("> ")
    except KeyboardInterrupt:
      print()
      common.note("Ctrl-D or /exit leaves.")
    except EOFError:
      print()
      return


class _Talk:
  """A conversation and the engine that takes part in it."""

  def __init__(
    self, engine: "Engine", template: "ChatTemplate", flags: absl_flags.FlagValues
  ) -> None:
    self._engine, self._template, self._flags = engine, template, flags
    self.reset()

  def reset(self) -> None:
    """Forgets everything but the system's message."""
    system = self._flags.system
    self._messages = [] if system is None else [{"role": "system", "content": system}]

  def say(self, message: str) -> bool:
    """Answers a message, on stdout; False if Ctrl-C stopped the answer.

    Raises:
      Q4JaxError: the message cannot be answered; the conversation is as it was before.
    """
    from q4jax.cli import streaming
    from q4jax.text.chat import encode_chat

    as_json = self._flags.json
    messages = [*self._messages, {"role": "user", "content": message}]
    ids = encode_chat(self._engine.model.tokenizer, self._template, messages)
    options = common.sampling(self._flags)
    show = streaming.discard if as_json else streaming.write
    (answer,), speed = streaming.answer(self._engine, [ids], options, show)
    self._messages = [*messages, {"role": "assistant", "content": answer.text}]
    if as_json:
      common.print_json({**answer.json(), "timing": speed.json()})
    else:
      print(flush=True)
      common.note(speed.line())
    return answer.finish_reason != "interrupted"
