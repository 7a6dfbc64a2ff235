"""`chat`: a conversation through a pipe and at a terminal."""

import io
import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest

from q4jax.engine import Completion, Engine
from q4jax.loading import load
from q4jax.text.chat import ChatTemplate, encode_chat

from .conftest import Result, Run, finished, start

FLAGS = ("--chat_template=chatml", "--max_tokens=6", "--temperature=0")


def talk(q4jax: Run, monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: object) -> Result:
  monkeypatch.setattr("sys.stdin", io.StringIO(typed))
  return q4jax("chat", *arguments)


def test_answers_with_the_whole_conversation(
  q4jax: Run, monkeypatch: pytest.MonkeyPatch, model_file: Path
) -> None:
  typed = "hello\n\n/help\nand you\n/reset\nhello\n/exit\nnever read\n"
  result = talk(q4jax, monkeypatch, typed, model_file, *FLAGS, "--system=be kind", "--json")
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert result.code == 0 and len(rows) == 3
  assert result.err.count("\n") == 1 and "/reset forgets" in result.err

  model = load(model_file)
  engine, template = Engine(model), ChatTemplate.for_tokenizer(model.tokenizer, "chatml")
  messages = [{"role": "system", "content": "be kind"}]
  for row, said in zip(rows[:2], ("hello", "and you"), strict=True):
    messages.append({"role": "user", "content": said})
    ids = encode_chat(model.tokenizer, template, messages)
    answer = engine.generate(ids, max_tokens=6, temperature=0.0)
    assert isinstance(answer, Completion)
    assert (row["text"], row["prompt_tokens"]) == (answer.text, len(ids))
    messages.append({"role": "assistant", "content": answer.text})
  # After /reset it is the first message again.
  assert {**rows[2], "timing": 0} == {**rows[0], "timing": 0}


def test_text_for_people(q4jax: Run, monkeypatch: pytest.MonkeyPatch, model_file: Path) -> None:
  result = talk(q4jax, monkeypatch, "hello\n/rest\n", model_file, *FLAGS)
  assert result.code == 0 and result.out.endswith("\n") and len(result.out.strip()) >= 4
  assert "There is no /rest." in result.err and "tok/s" in result.err


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ((), "--chat_template"),
    (("--chat_template=none",), "'none'"),
    ((*FLAGS, "--max_context=8"), "8"),
  ],
)
def test_errors_end_a_pipe(
  q4jax: Run,
  monkeypatch: pytest.MonkeyPatch,
  model_file: Path,
  flags: tuple[str, ...],
  said: str,
) -> None:
  result = talk(q4jax, monkeypatch, "hello\n", model_file, *flags)
  assert result.code == 1 and result.out == "" and said in result.err
  assert result.err.startswith("q4jax: error: ") and result.err.count("\n") == 1


def test_ctrl_c_ends_a_pipe(model_file: Path) -> None:
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  flags = ("--chat_template=chatml", "--temperature=0", "--max_tokens=8000")
  child = start("chat", model_file, *flags, stdin=subprocess.PIPE)
  signal.signal(signal.SIGINT, old)
  assert child.stdin and child.stdout
  child.stdin.write("hello\nmore\n")
  child.stdin.flush()
  begun = child.stdout.read(5)
  child.send_signal(signal.SIGINT)
  result = finished(child)
  assert result.code == 130 and "Traceback" not in result.err
  assert 5 < len(begun + result.out) < 8000 and result.out.count("\n") == 1


def test_at_a_terminal(model_file: Path) -> None:
  """Ctrl-C stops an answer, a message too long is refused, and the talk goes on; Ctrl-D leaves."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  ours, theirs = pty.openpty()
  flags = ("--chat_template=chatml", "--temperature=0", "--max_tokens=4000", "--max_context=6000")
  child = start("chat", model_file, *flags, stdin=theirs)
  signal.signal(signal.SIGINT, old)
  os.close(theirs)
  assert child.stdout
  os.write(ours, b"hello\n")
  begun = child.stdout.read(20)
  child.send_signal(signal.SIGINT)
  # A space is three tokens here, so these are too many.
  os.write(ours, b"/nothing\na" + b" b" * 2000 + b"\n/nothing\n\x04")
  result = finished(child)
  os.close(ours)
  assert result.code == 0 and len(begun) == 20
  assert result.err.count("There is no /nothing.") == 2
  assert result.err.count("tok/s") == 2  # One answer: prefill and decode.
  assert result.err.count("q4jax: error: ") == 1 and "Traceback" not in result.err
