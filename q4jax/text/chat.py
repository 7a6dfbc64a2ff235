"""Chat messages to a prompt, by a Jinja template that may come from a stranger.

The template runs in a process of its own (`chat_worker`) with limits on time, memory and output. It
decides what is structure and what is not; `encode_chat` sees to it that the text of a message never
becomes a control token, whatever it contains.
"""

import collections
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from q4jax.errors import ChatTemplateError
from q4jax.text.chat_templates import BUILT_IN
from q4jax.text.tokenizer import Tokenizer

TIME_LIMIT_S = 2.0  # of a processor, for one rendering
_WAIT_LIMIT_S = 60.0  # for an answer, however busy the machine is
_MAX_REQUEST_BYTES = 16 << 20
_WORKER = Path(__file__).with_name("chat_worker.py")
# What Python needs to find its packages, and the time zone; no secrets that a template could take.
_ENVIRONMENT = ("PYTHON", "LD_", "DYLD_", "TZ")
_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # Unicode's plane 15: assigned to nothing.


class ChatTemplate:
  """A chat template. The first `render` starts its worker; `close`, or being collected, ends it.

  Renders as Hugging Face's transformers does: Jinja's immutable sandbox, `raise_exception`,
  `strftime_now`, `tojson`, loop controls and `{% generation %}`. Safe to share between threads.
  """

  def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
    """Takes Jinja source, and the text of the tokens that it may write around messages."""
    self.source = source
    self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
    self._worker: _Worker | None = None
    self._lock = threading.Lock()

  @classmethod
  def for_tokenizer(cls, tokenizer: Tokenizer, name: str | None = None) -> "ChatTemplate":
    """The template called `name` in BUILT_IN, or else the model's own.

    Raises:
      ChatTemplateError: there is no such template, or the model brings none.
    """
    names = ", ".join(sorted(BUILT_IN))
    if name is not None and name not in BUILT_IN:
      raise ChatTemplateError(f"chat_template={name!r} is not built in; expected one of {names}.")
    source = tokenizer.chat_template if name is None else BUILT_IN[name]
    if source is None:
      raise ChatTemplateError(
        "The model brings no chat template; it may not be made for chats. Name the one that its "
        f"makers document, --chat_template=<one of {names}>, or complete plain text instead."
      )
    ids = (tokenizer.bos_id, tokenizer.eos_id)
    bos, eos = ("" if id is None else tokenizer.id_to_piece(id) for id in ids)
    return cls(source, bos, eos)

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    **extra: Any,
  ) -> str:
    """The prompt for these messages, as text.

    Args:
      messages: dicts with a "role" and usually a "content"; anything that JSON can hold.
      add_generation_prompt: ends with what begins the assistant's turn.
      **extra: further variables that the template knows, such as `tools` or `date_string`.

    Raises:
      ChatTemplateError: the template fails, refuses the messages, or exceeds a limit.
    """
    variables = {
      **self._tokens,
      **extra,
      "messages": _checked(messages),
      "add_generation_prompt": add_generation_prompt,
    }
    try:
      request = json.dumps({"variables": variables}).encode()
    except (TypeError, ValueError, RecursionError) as e:
      raise ChatTemplateError(f"The messages hold what JSON cannot: {e}.") from e
    if len(request) > _MAX_REQUEST_BYTES:
      raise ChatTemplateError(
        f"The messages take {len(request)} bytes; expected at most {_MAX_REQUEST_BYTES}. Send less."
      )
    answer = self._ask(request)
    if "error" in answer:
      raise ChatTemplateError(
        f"The chat template cannot render these messages: {answer['error']}. Change the messages, "
        f"or use another template, --chat_template=<one of {', '.join(sorted(BUILT_IN))}>."
      )
    text: str = answer["text"]
    return text

  def close(self) -> None:
    """Ends the worker. A later `render` starts another."""
    with self._lock:
      self._end_worker()

  def _ask(self, request: bytes) -> dict[str, str]:
    with self._lock:
      try:
        if self._worker is None:
          self._worker = _Worker(self.source)
        answer: dict[str, str] = json.loads(self._worker.ask(request))
        return answer
      except (OSError, EOFError, ValueError) as e:
        status = self._end_worker()
        if status == -signal.SIGPROF or isinstance(e, TimeoutError):
          return {"error": f"it ran for more than {TIME_LIMIT_S:g} seconds"}
        return {"error": f"its process ended with status {status}, perhaps for want of memory"}

  def _end_worker(self) -> int | None:
    worker, self._worker = self._worker, None
    return worker.stop() if worker is not None else None


def encode_chat(
  tokenizer: Tokenizer,
  template: ChatTemplate,
  messages: Sequence[Mapping[str, Any]],
  add_generation_prompt: bool = True,
  **extra: Any,
) -> list[int]:
  """The token ids of a chat: control tokens where the template writes them, and only there.

  Each character in the messages at which a control token begins, or could begin if more text
  followed, is replaced by a private one before the template sees it, one for one, and put back once
  control tokens have been found. So "<|eot_id|>" that a user typed stays text, also where the
  template joins two messages. A template that writes control tokens out of pieces of messages, as
  '<|' + role + '|>' does, still does so: check roles before they come here.

  BOS is added if the model wants it and the template did not write it; EOS is not.

  Raises:
    ChatTemplateError: see `ChatTemplate.render`.
  """
  try:
    used = set(json.dumps([messages, extra], ensure_ascii=False)) | set(template.source)
    private = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    stand_ins: dict[str, str] = collections.defaultdict(lambda: next(private))

    def guard(value: Any) -> Any:
      if isinstance(value, str):
        chars = list(value)
        for at in tokenizer.control_positions(value):
          chars[at] = stand_ins[value[at]]
        return "".join(chars)
      if isinstance(value, Mapping):
        return {guard(key): guard(item) for key, item in value.items()}
      return [guard(item) for item in value] if isinstance(value, list | tuple) else value

    messages, extra = guard(messages), guard(extra)
  except (TypeError, ValueError, RecursionError) as e:
    raise ChatTemplateError(f"The messages hold what JSON cannot: {e}.") from e
  text = template.render(messages, add_generation_prompt, **extra)
  back = str.maketrans({stand_in: char for char, stand_in in stand_ins.items()})
  parts = tokenizer.split(text, parse_special=True)
  plain = [part if isinstance(part, int) else part.translate(back) for part in parts]
  return tokenizer.encode_parts(plain, add_bos=True, add_eos=False)


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  for number, message in enumerate(messages):
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
      raise ChatTemplateError(
        f"messages[{number}] is {str(message)[:80]!r}; expected a dict with 'role' and 'content'."
      )
  if not messages:
    raise ChatTemplateError("messages is empty; expected at least one message.")
  return list(messages)


class _Worker:
  """The process that renders one template."""

  def __init__(self, source: str) -> None:
    kept = {key: value for key, value in os.environ.items() if key.startswith(_ENVIRONMENT)}
    self._process = subprocess.Popen(
      [sys.executable, "-P", str(_WORKER)],
      bufsize=0,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env=kept,
      start_new_session=True,  # Ctrl-C in a terminal is not for it.
    )
    self.stop = weakref.finalize(self, _stop, self._process)
    try:
      self._read_line()
    except (TimeoutError, EOFError) as e:
      self.stop()
      raise ChatTemplateError(
        f"The process that renders chat templates did not start; see what "
        f"`{sys.executable} -P {_WORKER}` says."
      ) from e
    self._write(json.dumps({"source": source, "seconds": TIME_LIMIT_S}).encode())

  def ask(self, request: bytes) -> bytes:
    """The answer to a request; TimeoutError, OSError or EOFError if none comes."""
    self._write(request)
    return self._read_line()

  def _write(self, line: bytes) -> None:
    assert self._process.stdin is not None
    view = memoryview(line + b"\n")
    while view:
      view = view[self._process.stdin.write(view) :]

  def _read_line(self) -> bytes:
    assert self._process.stdout is not None
    deadline = time.monotonic() + _WAIT_LIMIT_S
    line = bytearray()
    with selectors.DefaultSelector() as selector:
      selector.register(self._process.stdout, selectors.EVENT_READ)
      while not line.endswith(b"\n"):
        if not selector.select(max(0.0, deadline - time.monotonic())):
          raise TimeoutError
        chunk = self._process.stdout.read(1 << 16)
        if not chunk:
          raise EOFError
        line += chunk
    return bytes(line)


def _stop(process: "subprocess.Popen[bytes]") -> int:
  process.kill()
  for pipe in (process.stdin, process.stdout):
    if pipe is not None:
      pipe.close()
  return process.wait()
