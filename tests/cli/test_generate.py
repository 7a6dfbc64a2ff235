"""`generate`: what it prints is what the engine gives, and every way to stop it is clean."""

import functools
import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from q4jax.engine import Chunk, Completion, Engine
from q4jax.loading import load
from shared_data import shared

from .conftest import CONTEXT, Result, Run, finished, start


@functools.cache
def engine(path: Path) -> Engine:
  return Engine(load(path))


def expected(path: Path, prompt: str, **options: Any) -> Completion:
  completion = engine(path).generate(prompt, **options)
  assert isinstance(completion, Completion)
  return completion


def test_streams_text_to_stdout_and_speeds_to_stderr(q4jax: Run, model_file: Path) -> None:
  line = ("generate", model_file, "--prompt=once upon", "--temperature=0", "--max_tokens=20")
  result = q4jax(*line)
  text = expected(model_file, "once upon", temperature=0.0, max_tokens=20).text
  assert len(text) > 10
  assert (result.code, result.out) == (0, text + "\n")
  for part in ("prefill 12 tokens", "decode 19 tokens", "tok/s", "first token", "peak memory"):
    assert part in result.err
  assert result.err.count("\n") == 1


def test_json(q4jax: Run, model_file: Path) -> None:
  flags = ["--temperature=0.9", "--top_k=20", "--top_p=0.9", "--min_p=0.01", "--seed=5"]
  flags += ["--repetition_penalty=1.1", "--max_tokens=12", "--logprobs=2", "--json"]
  result = q4jax("generate", model_file, "--prompt=a dog", *flags)
  row = json.loads(result.out)
  answer = expected(
    model_file, "a dog", temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=5,
    repetition_penalty=1.1, max_tokens=12, logprobs=2,
  )  # fmt: skip
  assert result.code == 0 and result.err == "" and result.out.count("\n") == 1
  assert row["text"] == answer.text and row["tokens"] == answer.tokens
  assert row["finish_reason"] == "length" and row["prompt_tokens"] == 8
  assert [entry["token"] for entry in row["logprobs"]] == answer.tokens
  assert all(len(entry["top"]) == 2 for entry in row["logprobs"])
  timing = row["timing"]
  assert timing["prompt_tokens"] == 8 and timing["decoded_tokens"] == 11
  assert timing["prefill_s"] < timing["first_token_s"]  # Compiling is counted apart.
  assert timing["peak_rss_bytes"] > 1 << 26
  rate = timing["decoded_tokens"] / timing["decode_s"]
  assert timing["decode_tokens_per_s"] == pytest.approx(rate, rel=0.01)


def test_several_prompts_get_what_each_gets_alone(q4jax: Run, model_file: Path) -> None:
  prompts = ["a", "a longer prompt"]
  line = ["generate", model_file, *(f"--prompt={p}" for p in prompts), "--max_tokens=8", "--seed=3"]
  rows = json.loads(q4jax(*line, "--json").out)["completions"]
  alone = [expected(model_file, p, max_tokens=8, seed=3 + i) for i, p in enumerate(prompts)]
  assert [row["text"] for row in rows] == [answer.text for answer in alone]
  result = q4jax(*line)
  blocks = [f"[{i}/2] {prompts[i - 1]!r}\n{alone[i - 1].text}\n" for i in (1, 2)]
  assert result.out == "".join(blocks)


def test_stop_strings(q4jax: Run, model_file: Path) -> None:
  line = ["generate", model_file, "--prompt=once upon", "--temperature=0", "--max_tokens=20"]
  text = q4jax(*line).out[:-1]
  stop = text[6:8]
  row = json.loads(q4jax(*line, "--stop=QQ", "--stop", stop, "--json").out)
  assert row["text"] == text[: text.index(stop)] and row["finish_reason"] == "stop"


def test_prompts_from_files(q4jax: Run, model_file: Path, tmp_path: Path) -> None:
  (tmp_path / "prompt").write_text("once upon\n")  # The newline at the end is dropped.
  flags = ("--temperature=0", "--max_tokens=5")
  a = q4jax("generate", model_file, f"--file={tmp_path}/prompt", *flags)
  b = q4jax("generate", model_file, "--prompt=once upon", *flags)
  assert a.code == 0 and a.out == b.out


def test_empty_prompt_begins_from_bos(q4jax: Run, model_file: Path) -> None:
  row = json.loads(q4jax("generate", model_file, "--prompt=", "--max_tokens=3", "--json").out)
  assert row["prompt_tokens"] == 1 and len(row["tokens"]) == 3


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ((f"--prompt={'x' * CONTEXT}",), f"context of {CONTEXT}"),
    (("--prompt=abc", "--max_context=4"), "context of 4"),
    (("--prompt=abc", f"--max_context={CONTEXT + 1}"), "max_context"),
    (("--prompt=abc", "--top_p=0"), "top_p"),
    (("--prompt=abc", "--min_p=2"), "min_p"),
    (("--prompt=abc", "--repetition_penalty=0"), "repetition_penalty"),
    (("--prompt=abc", f"--seed={2**32}"), "seed"),
    (("--prompt=abc", "--stop="), "stop"),
    (("--prompt=abc", "--tokenizer=/none.json"), "/none.json"),
    (("--prompt=abc", f"--threads={10**6}"), "--threads"),
    (("--prompt=abc", "--implementation=cpu_avx"), "cpu_avx2"),
    (("--prompt=abc", "--implementation=pallas_tpu"), "'pallas_tpu' of the int4 matmul"),
  ],
)
def test_values_that_cannot_work(
  q4jax: Run, model_file: Path, flags: tuple[str, ...], said: str
) -> None:
  result = q4jax("generate", model_file, *flags)
  assert result.code == 1 and result.out == "" and said in result.err
  assert result.err.startswith("q4jax: error: ") and result.err.count("\n") == 1


def interrupt(*line: object) -> Result:
  """Starts a long generation and sends Ctrl-C once it writes."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)  # A child inherits being deaf.
  child = start(*line)
  signal.signal(signal.SIGINT, old)
  assert child.stdout
  begun = child.stdout.read(20)
  child.send_signal(signal.SIGINT)
  result = finished(child)
  return Result(result.code, begun + result.out, result.err)


LONG = ("--prompt=a", f"--max_tokens={CONTEXT - 2}", "--temperature=0")


def test_ctrl_c_keeps_what_there_is(model_file: Path) -> None:
  result = interrupt("generate", model_file, *LONG)
  assert result.code == 130
  assert result.out.endswith("\n") and 20 < len(result.out) < CONTEXT - 2
  assert "decode" in result.err and "Traceback" not in result.err


def test_ctrl_c_in_json_is_still_json(
  q4jax: Run, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  whole = Engine.stream

  def interrupted(self: Engine, *arguments: Any, **options: Any) -> Iterator[Chunk]:
    yield from itertools.islice(whole(self, *arguments, **options), 10)
    raise KeyboardInterrupt

  monkeypatch.setattr(Engine, "stream", interrupted)
  result = q4jax("generate", model_file, *LONG, "--json")
  row = json.loads(result.out)
  assert result.code == 130 and result.err == ""
  assert row["finish_reason"] == "interrupted" and len(row["tokens"]) == 10


def test_threads_take_effect(model_file: Path) -> None:
  allowed = sorted(os.sched_getaffinity(0))
  if len(allowed) < 2:
    pytest.skip("this machine gives one CPU only")
  child = start("generate", model_file, *LONG, "--threads=1")
  assert child.stdout
  child.stdout.read(5)
  masks = {
    line.split()[1]
    for task in Path(f"/proc/{child.pid}/task").iterdir()
    for line in (task / "status").read_text().splitlines()
    if line.startswith("Cpus_allowed_list:")
  }
  child.kill()
  child.communicate()
  assert len(masks) == 1 and masks.pop().isdecimal()  # Every thread, XLA's too, on the same CPU.


def test_a_real_model_tells_a_story(q4jax: Run) -> None:
  path = shared("models/stories260K-Q8_0.gguf")
  result = q4jax(
    "generate", path, "--prompt=Once upon a time", "--temperature=0", "--max_tokens=24"
  )
  assert result.code == 0
  assert result.out.startswith(", there was a little girl named Lily. She loved to play")
