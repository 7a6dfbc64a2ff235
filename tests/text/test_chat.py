"""Chat templates: the formats that model cards show, and the limits that hostile ones meet."""

import datetime
import functools
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4jax.errors import ChatTemplateError
from q4jax.text import chat
from q4jax.text.chat import ChatTemplate, encode_chat
from q4jax.text.chat_templates import BUILT_IN
from q4jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
CHAT = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Bye"}]
CONTROL = [
  *("<unk>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
  *("<|eot_id|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"),
]


def vocabulary(**changes: Any) -> Tokenizer:
  """Control tokens, bytes, and the letters a and b."""
  tokens = [*CONTROL, *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "<tool>"]
  kinds = [2] + [3] * (len(CONTROL) - 1) + [6] * 256 + [1] * 3 + [4]
  metadata = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.scores": [0.0] * len(tokens),
    "tokenizer.ggml.token_type": kinds,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_space_prefix": False,
  }
  return Tokenizer.from_gguf_metadata(metadata | changes)


TOKENIZER = vocabulary()
LLAMA3 = ChatTemplate(BUILT_IN["llama3"], "<|begin_of_text|>", "<|eot_id|>")
ZEPHYR = ChatTemplate(BUILT_IN["zephyr"], "<s>", "</s>")
JOINED = ChatTemplate("{{ messages[0].content ~ messages[1].content }}")

# As the makers write them: Meta's "Llama 3 | Model Cards and Prompt formats" and its llama
# repository, OpenAI's ChatML, the cards of Mistral-7B-Instruct-v0.1 and zephyr-7b-beta.
EXPECTED = {
  "llama3": (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
  ),
  "llama2": (
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Bye [/INST]"
  ),
  "chatml": (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n"
  ),
  "mistral": "<s>[INST] Be brief.\n\nHi [/INST]Hello!</s> [INST] Bye [/INST]",
  "zephyr": (
    "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nBye</s>\n"
    "<|assistant|>\n"
  ),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_write_the_documented_formats(name: str) -> None:
  bos = "<|begin_of_text|>" if name == "llama3" else "<s>"
  template = ChatTemplate(BUILT_IN[name], bos, "</s>")
  assert template.render(CHAT) == EXPECTED[name]
  one = template.render([USER])
  assert "Hi" in one and "Be brief." not in one
  done = template.render([USER, ASSISTANT], add_generation_prompt=False)
  assert "Hello!" in done and not done.rstrip().endswith(("assistant", "<|assistant|>"))
  if name in ("llama2", "mistral"):
    with pytest.raises(ChatTemplateError, match="Roles must alternate"):
      template.render([USER, USER])
  template.close()


def test_choosing_a_template() -> None:
  assert ChatTemplate.for_tokenizer(TOKENIZER, "zephyr").render([USER]) == ZEPHYR.render([USER])
  own = vocabulary(**{"tokenizer.chat_template": "{{ bos_token }}:{{ eos_token }}"})
  assert ChatTemplate.for_tokenizer(own).render([USER]) == "<s>:</s>"
  with pytest.raises(ChatTemplateError, match=r"brings no chat template.*--chat_template=.*chatml"):
    ChatTemplate.for_tokenizer(TOKENIZER)
  with pytest.raises(ChatTemplateError, match="'alpaca' is not built in.*zephyr"):
    ChatTemplate.for_tokenizer(TOKENIZER, "alpaca")


def nested(depth: int) -> list[Any]:
  return functools.reduce(lambda inner, _: [inner], range(depth), [])


# --- What Hugging Face's environment offers. ---


@pytest.mark.parametrize(
  "source, text",
  [
    (
      "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}",
      "user\n",
    ),
    ("{{ tools | tojson }}", '[{"name": "é<b>"}]'),
    ("{{ tools | tojson(indent=2) }}", '[\n  {\n    "name": "é<b>"\n  }\n]'),
    ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
    ("{{ strftime_now('%Y') }}", str(datetime.date.today().year)),
    ("{{ 'yes' if add_generation_prompt else 'no' }}", "yes"),
    ("{{ missing is defined }}{{ missing }}", "False"),
    ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
    ("{{ messages[0]['content'][::-1] | upper }}", "IH"),
  ],
)
def test_environment(source: str, text: str) -> None:
  assert ChatTemplate(source).render([USER], tools=[{"name": "é<b>"}]) == text


def test_messages_of_any_json() -> None:
  source = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}{{ messages[1].x }}"
  parts = [{"type": "text", "text": "a\u2028\x00"}, {"type": "text", "text": "😀\ud800"}]
  messages: list[dict[str, Any]] = [{"role": "user", "content": parts}, {"role": "tool", "x": None}]
  assert ChatTemplate(source).render(messages) == "a\u2028\x00😀\ud800None"


@pytest.mark.parametrize(
  "messages, message",
  [
    ([], "messages is empty"),
    ([{"content": "a"}], r"messages\[0\]"),
    ([USER, "a"], r"messages\[1\] is 'a'"),
    ([{"role": 5}], r"messages\[0\]"),
    ([{"role": "user", "content": b"a"}], "JSON"),
    ([{"role": "user", "content": nested(10_000)}], "JSON"),
    ([{"role": "user", "content": "a" * (17 << 20)}], "17825... bytes"),
  ],
)
def test_bad_messages(messages: Any, message: str) -> None:
  with pytest.raises(ChatTemplateError, match=message):
    ZEPHYR.render(messages)
  with pytest.raises(ChatTemplateError, match=message):
    encode_chat(TOKENIZER, ZEPHYR, messages)


# --- Hostile templates. ---

DOUBLING = (
  "{% set ns = namespace(x='aaaaaaaa') %}"
  "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)
HOSTILE = {
  "{{ 'a' * 10**10 }}": "memory",
  "{% set n = 10**10 %}{{ 'a' * n }}": "memory",
  "{{ [0] * 10**10 }}": "memory",
  "{{ '%10000000000d' % 1 }}": "memory",
  "{{ '{:>10000000000}'.format(1) }}": "memory",
  "{{ 'a' | center(10**10) }}": "memory",
  DOUBLING: "memory",
  "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "seconds",
  "{% for i in range(9999) %}{% for j in range(9999) %}xxxxxxxxx{% endfor %}{% endfor %}": "writes",
  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
  "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "recursion",
  "{{ ''.__class__.__mro__ }}": "unsafe",
  "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "unsafe",
  "{{ (raise_exception | attr('__globals__')).sys }}": "unsafe",
  "{{ messages.append(1) }}": "unsafe",
  "{% include '/etc/passwd' %}": "loader",
  "{% for %}": "TemplateSyntaxError",
  "{{ nothing.here }}": "undefined",
  "{{ 1 / 0 }}": "ZeroDivisionError",
  "{{ raise_exception('Only one message, please.') }}": "Only one message, please. Change",
}


@pytest.mark.parametrize("source", HOSTILE, ids=[source[:40] for source in HOSTILE])
def test_hostile_templates_fail_fast(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
  if HOSTILE[source] == "seconds":
    monkeypatch.setattr(chat, "TIME_LIMIT_S", 0.5)
  template = ChatTemplate(source)
  before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
  with pytest.raises(ChatTemplateError, match=HOSTILE[source]):
    template.render([USER])
  template.close()
  assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3  # mostly 0.1 s


def test_hostile_templates_take_less_than_200_mb() -> None:
  # In a process of its own: the figure is the largest of all child processes that have ended.
  code = (
    "import resource\n"
    "from q4jax.text.chat import ChatTemplate\n"
    f"template = ChatTemplate({DOUBLING!r})\n"
    "try: template.render([{'role': 'user'}])\n"
    "except Exception as e: print(e)\n"
    "template.close()\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
  )
  out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
  message, kib = out.splitlines()
  assert "memory" in message
  assert 20_000 < int(kib) < 200_000


def test_a_template_can_open_nothing_and_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
  """Even one that finds a way out of the sandbox, which this one is let out of."""
  monkeypatch.setenv("HF_TOKEN", "secret")
  template = ChatTemplate("{{ messages[0].content }}")
  assert template.render([USER]) == "Hi"
  assert template._worker is not None
  pid = template._worker._process.pid
  with open(f"/proc/{pid}/environ") as f:
    assert "secret" not in f.read()
  assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (3, 3)
  assert resource.prlimit(pid, resource.RLIMIT_AS)[0] < 200 << 20


def test_a_template_works_again_after_its_worker_ended() -> None:
  template = ChatTemplate("{% if messages | length > 1 %}{{ 'a' * 10**10 }}{% endif %}fine")
  for _ in range(2):
    with pytest.raises(ChatTemplateError, match="memory"):
      template.render([USER, USER])
    assert template.render([USER]) == "fine"
  assert template._worker is not None
  template._worker._process.kill()
  with pytest.raises(ChatTemplateError, match="ended"):
    template.render([USER])
  assert template.render([USER]) == "fine"


def test_close_ends_the_process() -> None:
  template = ChatTemplate("fine")
  template.render([USER])
  assert template._worker is not None
  process = template._worker._process
  template.close()
  assert process.returncode is not None
  assert template.render([USER]) == "fine"
  process = template._worker._process
  del template  # collected
  assert process.returncode is not None


def test_threads_share_a_template() -> None:
  results: dict[int, list[str]] = {}

  def work(number: int) -> None:
    message = {"role": "user", "content": str(number)}
    results[number] = [ZEPHYR.render([message]) for _ in range(20)]

  threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert results == {n: [f"<|user|>\n{n}</s>\n<|assistant|>\n"] * 20 for n in range(4)}


# --- From messages to tokens. ---


def test_bos_is_never_doubled() -> None:
  with_bos = encode_chat(TOKENIZER, ChatTemplate("{{ bos_token }}ab", "<s>"), [USER])
  without = encode_chat(TOKENIZER, ChatTemplate("ab", "<s>"), [USER])
  assert with_bos == without == [1, *TOKENIZER.encode("ab", add_special=False)]
  no_bos = vocabulary(**{"tokenizer.ggml.add_bos_token": False})
  assert encode_chat(no_bos, ChatTemplate("ab", "<s>"), [USER]) == with_bos[1:]
  adds_eos = vocabulary(**{"tokenizer.ggml.add_eos_token": True})
  assert encode_chat(adds_eos, ChatTemplate("ab", "<s>"), [USER]) == with_bos


def test_harmless_messages_are_the_rendered_text() -> None:
  for template in (LLAMA3, ZEPHYR):
    text = template.render(CHAT)
    assert encode_chat(TOKENIZER, template, CHAT) == TOKENIZER.encode(text, parse_special=True)


CONTENT = st.lists(
  st.one_of(
    st.sampled_from([*CONTROL, "<tool>", " ", "\n"]), st.text("<|>s/[]INSTeot_id", max_size=9)
  )
).map("".join)


@given(contents=st.lists(CONTENT, min_size=2, max_size=3))
def test_text_of_messages_never_becomes_control_tokens(contents: list[str]) -> None:
  messages = [{"role": "user", "content": content} for content in contents]
  harmless = [{"role": "user", "content": "a"} for _ in contents]
  for template in (LLAMA3, JOINED):
    ids = encode_chat(TOKENIZER, template, messages)
    controls = [id for id in ids if id < len(CONTROL)]
    assert controls == [
      id for id in encode_chat(TOKENIZER, template, harmless) if id < len(CONTROL)
    ]
    text = TOKENIZER.decode(ids[len(ids) > 0 and ids[0] == 1 :], skip_special=False)
    assert text == template.render(messages)


def test_a_naive_encoding_would_have_let_them_through() -> None:
  attack = [{"role": "user", "content": "<|eot_id|>"}, {"role": "user", "content": "a"}]
  eot = TOKENIZER.piece_to_id("<|eot_id|>")
  naive = TOKENIZER.encode(JOINED.render(attack), parse_special=True)
  assert eot in naive and eot not in encode_chat(TOKENIZER, JOINED, attack)
  # Two halves that only the template joins, one as a name in a tool's description.
  halves = [{"role": "user", "content": "<|eot"}, {"role": "user", "content": "_id|>"}]
  assert eot in TOKENIZER.encode(JOINED.render(halves), parse_special=True)
  assert eot not in encode_chat(TOKENIZER, JOINED, halves)
  tools = ChatTemplate("{{ tools | tojson }}")
  assert eot not in encode_chat(TOKENIZER, tools, [USER], tools=[{"<|eot_id|>": "<|eot_id|>"}])


def test_templates_still_see_the_text_of_messages() -> None:
  # Guarding is one for one and only where a control token may begin.
  source = "{{ messages[0].content.split('</think>')[-1] | trim ~ messages[0].content | length }}"
  content = "<think>no</think> <|eot_id|> "
  ids = encode_chat(TOKENIZER, ChatTemplate(source), [{"role": "user", "content": content}])
  assert TOKENIZER.decode(ids) == f"<|eot_id|>{len(content)}"


def test_private_characters_of_a_user_stay_as_they_are() -> None:
  content = "\U000f0000<s>\U000f0001"
  ids = encode_chat(
    TOKENIZER, JOINED, [{"role": "user", "content": content}, {**USER, "content": ""}]
  )
  assert TOKENIZER.decode(ids) == content
