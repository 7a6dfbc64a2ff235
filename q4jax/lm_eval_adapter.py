r"""q4jax as a model of lm-evaluation-harness (pip install 'q4jax[eval]').

  python -m q4jax.lm_eval_adapter --model q4jax --model_args pretrained=tiny --tasks arc_easy
  ... --model_args pretrained=model.gguf,kv_bits=4,kv_rotate=True,keep=0.6,kv_policy=snapkv

is the command `lm_eval` with the model `q4jax` registered; in Python, `register()` does that. The
arguments are those of `open_scorer`; batch_size is the harness' --batch_size. Its --device is not
used: jax runs on what it finds, or on what JAX_PLATFORMS says. --apply_chat_template is not
supported.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from q4jax.errors import ConfigError, MissingDependencyError, PromptError
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import UnionRank
from q4jax.loading import load
from q4jax.model.model import Model
from q4jax.scoring import Pair, Scorer
from q4jax_kernels.kv_format import KVFormat

_SAMPLING = {"temperature", "top_k", "top_p", "min_p"}


def open_scorer(
  pretrained: str,
  *,
  tokenizer: str | None = None,
  batch_size: int | str = 8,
  max_length: int | None = None,
  kv_bits: int = 16,
  kv_group: int = 32,
  kv_rotate: bool = False,
  keep: float | None = None,
  kv_policy: str = "snapkv",
  kv_sink: int = 4,
  kv_recent: int = 64,
) -> Scorer:
  """Loads what `q4jax.load` takes; the cache is compressed if kv_bits or keep ask for it.

  Raises:
    Q4JaxError: see `q4jax.load` and `KVConfig.check`.
  """
  auto = str(batch_size).startswith("auto")
  kv = None
  if kv_bits < 16 or keep is not None:
    stored = KVFormat(kv_bits, kv_group) if kv_bits < 16 else KVFormat(kv_bits)
    policy = None if keep is None else get_policy(kv_policy)
    select = UnionRank() if keep is None else UnionRank(keep)
    protect = Protect(kv_sink, kv_recent, 0)
    kv = KVConfig(stored, stored, kv_rotate, policy, select, protect)
  model = load(pretrained, tokenizer=tokenizer)
  return Scorer(model, kv, 8 if auto else int(batch_size), max_length)


def encode_pair(model: Model, context: str, continuation: str) -> Pair:
  """Ids of both, cut where the context's own ids end; spaces between them go to the continuation.

  Raises:
    PromptError: no continuation, or no context and no token that could stand for it.
  """
  stripped = context.rstrip()
  continuation = context[len(stripped) :] + continuation
  if not stripped:
    return prefix(model), plain(model, continuation)
  whole, before = model.tokenizer.encode(stripped + continuation), model.tokenizer.encode(stripped)
  after = whole[len(before) :]
  return (before, after) if after else (whole[:-1], whole[-1:])


def prefix(model: Model) -> list[int]:
  """What stands before a text: BOS, or EOS where there is none."""
  for token in (model.tokenizer.bos_id, model.tokenizer.eos_id):
    if token is not None:
      return [token]
  raise PromptError("the model has neither BOS nor EOS; a text without context cannot be scored.")


def plain(model: Model, text: str) -> list[int]:
  """The ids of a text alone."""
  ids = model.tokenizer.encode(text, add_special=False)
  if not ids:
    raise PromptError(f"there is nothing to score: {text!r} has no tokens.")
  return ids


def windows(first: list[int], ids: list[int], limit: int) -> Iterator[Pair]:
  """Cuts a long text so that each id is scored once, with as much before it as fits.

  All but the last window begin where the one before ended; the last is moved back to be full.
  A window's context and continuation are `limit` + 1 ids together, of which the last is not read.
  """
  whole = [*first, *ids]
  for begin in range(len(first), len(whole), limit):
    end = min(begin + limit, len(whole))
    yield whole[max(0, end - limit - 1) : begin], whole[begin:end]


def rolling(scorer: Scorer, texts: Sequence[str]) -> list[float]:
  """The log-probability of each whole text, in windows of the scorer's `max_length`."""
  pairs: list[Pair] = []
  ends = []
  for text in texts:
    pairs += windows(prefix(scorer.model), plain(scorer.model, text), scorer.max_length)
    ends.append(len(pairs))
  logprobs = [score.logprob for score in scorer.scores(pairs)]
  return [sum(logprobs[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def generate(scorer: Scorer, prompts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
  """Text after each prompt, by the harness' options: until, max_gen_toks, do_sample, ..."""
  kwargs, most = sampling(options)
  room = scorer.max_length - most
  if room < 1:
    raise ConfigError(
      f"max_gen_toks is {most}; the context of {scorer.max_length} must hold a prompt too."
    )
  texts = []
  for begin in range(0, len(prompts), scorer.batch):
    ids = [scorer.model.tokenizer.encode(p)[-room:] for p in prompts[begin : begin + scorer.batch]]
    answers = scorer.engine.generate(ids, max_tokens=most, **kwargs)
    texts += [a.text for a in (answers if isinstance(answers, list) else [answers])]
  return texts


def sampling(options: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
  """The engine's arguments and the most tokens, of the harness' options.

  Raises:
    ConfigError: an option that would be ignored.
  """
  rest = dict(options)
  until, most = rest.pop("until", None) or (), rest.pop("max_gen_toks", 256)
  sample = rest.pop("do_sample", rest.get("temperature", 0) > 0)
  unknown = set(rest) - _SAMPLING
  if unknown:
    raise ConfigError(
      f"generation options {', '.join(sorted(unknown))} are not known; there are until, "
      f"max_gen_toks, do_sample, {', '.join(sorted(_SAMPLING))}."
    )
  stops = [until] if isinstance(until, str) else list(until)
  kwargs = {**rest, "stop": [stop for stop in stops if stop]}
  if not sample:
    kwargs["temperature"] = 0.0
  return kwargs, int(most)


def register() -> type:
  """Makes the harness know the model `q4jax`; returns its class.

  Raises:
    MissingDependencyError: lm_eval is not installed.
  """
  try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
  except ImportError as error:
    raise MissingDependencyError(
      "lm-evaluation-harness is not installed; pip install 'q4jax[eval]'."
    ) from error

  @register_model("q4jax")
  class Q4JaxLM(LM):  # type: ignore[misc,unused-ignore]
    """See q4jax.lm_eval_adapter."""

    def __init__(self, pretrained: str = "tiny", **options: Any) -> None:
      super().__init__()
      # The harness always gives a device, of torch, and what is for batch_size=auto, 8 here.
      for unused in ("device", "max_batch_size"):
        options.pop(unused, None)
      try:
        self.scorer = open_scorer(pretrained, **options)
      except TypeError as error:
        raise ConfigError(f"--model_args: {error}. See open_scorer for those there are.") from error

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
      pairs = [encode_pair(self.scorer.model, *request.args) for request in requests]
      return [(score.logprob, score.greedy) for score in self.scorer.scores(pairs)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
      return rolling(self.scorer, [request.args[0] for request in requests])

    def generate_until(self, requests: list[Any]) -> list[str]:
      groups: dict[str, list[int]] = {}
      for i, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
      texts = [""] * len(requests)
      for rows in groups.values():
        prompts = [requests[i].args[0] for i in rows]
        made = generate(self.scorer, prompts, requests[rows[0]].args[1])
        for i, text in zip(rows, made, strict=True):
          texts[i] = text
      return texts

  return Q4JaxLM


def main() -> None:
  """The command `lm_eval`, with the model registered."""
  register()
  from lm_eval.__main__ import cli_evaluate

  sys.argv[0] = "lm_eval"
  cli_evaluate()


if __name__ == "__main__":
  main()
