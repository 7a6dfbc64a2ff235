"""How fast a model prefills and decodes: the engine's own programs, with nothing of text around.

The protocol is llama-bench's: a prompt test reads `n_prompt` random tokens in one go and computes
the logits of the last, a generation test samples `n_gen` tokens one by one, both with `n_depth`
tokens in the cache already; a repetition that is not counted runs first. With `n_batch` above 1 as
many sequences of these lengths run side by side, as llama-batched-bench does it, and their tokens
are counted together.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.engine.engine import Engine
from q4jax.engine.programs import Programs, State, new_state
from q4jax.engine.sampling import SamplingArrays, SamplingParams
from q4jax.errors import ConfigError
from q4jax.model.caches import Compressed

_NO_STOP = np.full(8, -1, np.int32)


@dataclass(frozen=True)
class Test:
  """One measurement: either n_prompt or n_gen is 0. Each of n_batch sequences has these tokens."""

  n_prompt: int
  n_gen: int
  n_depth: int = 0
  n_batch: int = 1

  @property
  def tokens(self) -> int:
    """Tokens that one repetition is timed for, of all sequences together."""
    return self.n_batch * (self.n_prompt + self.n_gen)

  @property
  def context(self) -> int:
    """Tokens of a sequence in the end."""
    return self.n_depth + self.n_prompt + self.n_gen


@dataclass(frozen=True)
class Result:
  """Seconds of each repetition of a test."""

  test: Test
  seconds: tuple[float, ...]

  @property
  def rates(self) -> list[float]:
    """Tokens a second of each repetition."""
    return [self.test.tokens / s for s in self.seconds]

  @property
  def avg_ts(self) -> float:
    """Mean of `rates`."""
    return statistics.fmean(self.rates)

  @property
  def stddev_ts(self) -> float:
    """Sample standard deviation of `rates`; 0 for a single repetition."""
    return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


def bench(engine: Engine, tests: Sequence[Test], repetitions: int = 5) -> Iterator[Result]:
  """Runs the tests one after another; sampling is greedy.

  Args:
    engine: its model, context limit, cache type and prefill chunk are what is measured.

  Raises:
    ConfigError: a test is empty or longer than the context. Nothing has run by then.
  """
  _check([engine], tests, repetitions)
  runner = _Runner(engine)
  return (_take_turns([runner], test, repetitions)[0] for test in tests)


def compare(engines: Sequence[Engine], test: Test, repetitions: int = 5) -> list[Result]:
  """The same test of several engines, which take turns in every repetition.

  A shared machine is faster in one minute than in the next: only so can they be compared.
  ConfigError as in `bench`.
  """
  _check(engines, [test], repetitions)
  return _take_turns([_Runner(engine) for engine in engines], test, repetitions)


def _take_turns(runners: "Sequence[_Runner]", test: Test, repetitions: int) -> list[Result]:
  states = [runner.at_depth(test) for runner in runners]
  seconds: list[list[float]] = [[] for _ in runners]
  for _ in range(repetitions + 1):  # The first compiles and warms up.
    for i, runner in enumerate(runners):
      run = runner.prompt if test.n_prompt else runner.generate
      took, states[i] = run(test, states[i])
      seconds[i].append(took)
  return [Result(test, tuple(each[1:])) for each in seconds]


def _check(engines: Sequence[Engine], tests: Sequence[Test], repetitions: int) -> None:
  if repetitions < 1:
    raise ConfigError(f"repetitions is {repetitions}; expected at least 1.")
  most = min(engine.max_context for engine in engines)
  for test in tests:
    if min(test.n_prompt, test.n_gen, test.n_depth) < 0 or (test.n_prompt > 0) == (test.n_gen > 0):
      raise ConfigError(f"{test} needs either n_prompt or n_gen above 0, and n_depth 0 or more.")
    if test.n_batch < 1:
      raise ConfigError(f"n_batch is {test.n_batch}; expected at least 1.")
    if test.context > most:
      raise ConfigError(
        f"a test of {test.n_prompt + test.n_gen} tokens at depth {test.n_depth} does not fit the "
        f"context of {most}. Lower its length or its depth."
      )


class _Runner:
  """Runs single repetitions. A state is taken and given back: its caches are donated and reused."""

  def __init__(self, engine: Engine) -> None:
    self._engine = engine
    self._leaves = engine.model.leaves
    self._programs = Programs.of(engine.model, logprobs=False)
    # Committed to it from the start: an uncommitted argument would compile a program of its own.
    self._device = next(iter(self._leaves[0].devices()))
    self._rng = np.random.default_rng(0)

  def at_depth(self, test: Test) -> State:
    """A state with the test's n_depth tokens in a cache that has room for the rest."""
    slots = max(256, 1 << (test.context - 1).bit_length())
    kv, depth = self._engine.kv, self._depth(test)
    config = self._engine.model.config
    state = new_state(config, test.n_batch, slots, self._engine.kv_dtype, kv)
    state = jax.device_put(state, self._device)
    if depth:
      state, _ = self._prefill(state, depth)
    return state

  def _depth(self, test: Test) -> int:
    """Tokens before the test: a compressed cache begins with a prompt, of one at least."""
    return test.n_depth if self._engine.kv is None else max(test.n_depth, 1)

  def prompt(self, test: Test, state: State) -> tuple[float, State]:
    """Seconds of one prefill, to the first token."""
    state = self._rewind(state, test.n_depth, 0)
    begin = time.perf_counter()
    state, hidden = self._prefill(state, test.n_prompt)
    limit = jnp.ones(test.n_batch, jnp.int32)
    params = _greedy(test.n_batch)
    if self._engine.kv is not None:
      lengths = np.full(test.n_batch, test.n_depth + test.n_prompt)
      jax.block_until_ready(self._engine.compress(state, lengths, lengths * 0).state)
    state, output = self._programs.first(self._leaves, state, hidden, params, limit, _NO_STOP)
    np.asarray(output.token)
    return time.perf_counter() - begin, state

  def generate(self, test: Test, state: State) -> tuple[float, State]:
    """Seconds of n_gen decode steps, each token read while the next step runs."""
    depth = self._depth(test)
    state = self._rewind(state, depth, test.n_gen)
    params = _greedy(test.n_batch)
    compressed, dense = None, state.cache
    if self._engine.kv is not None:
      lengths = np.full(test.n_batch, depth)
      compressed = self._engine.compress(state, lengths, np.full(test.n_batch, test.n_gen))
      state = jax.block_until_ready(replace(state, cache=compressed.state))
    running = np.ones(test.n_batch, bool)
    begin = time.perf_counter()
    before = None
    for _ in range(test.n_gen):
      if compressed is not None:
        assert isinstance(state.cache, Compressed)
        cache = compressed.before_step(state.cache, state.length, running)
        state = replace(state, cache=cache)
      state, output = self._programs.decode(self._leaves, state, params, _NO_STOP)
      if before is not None:
        np.asarray(before.token)
      before = output
    np.asarray(output.token)
    took = time.perf_counter() - begin
    # The dense cache was only read: the next repetition begins from it.
    return took, state if compressed is None else replace(state, cache=dense)

  def _prefill(self, state: State, count: int) -> tuple[State, jax.Array]:
    config, chunk = self._engine.model.config, self._engine.prefill_chunk
    batch = state.length.shape[0]
    hidden = jax.device_put(np.zeros((batch, config.d_model), np.float32), self._device)
    for begin in range(0, count, chunk):
      width = min(chunk, max(16, 1 << (count - begin - 1).bit_length()))
      tokens = self._rng.integers(0, config.vocab_size, (batch, width), dtype=np.int32)
      real = np.full(batch, min(width, count - begin), np.int32)
      state, hidden = self._programs.prefill(self._leaves, state, tokens, real, hidden)
    return state, hidden

  def _rewind(self, state: State, length: int, remaining: int) -> State:
    """The state with only its first `length` cached tokens and `remaining` tokens to sample.

    What lies behind `length` in the cache is never read, so it need not be cleared.
    """
    numbers = {"length": length, "token": 0, "remaining": remaining}
    arrays = {
      name: jax.device_put(np.full(state.length.shape, number, np.int32), self._device)
      for name, number in numbers.items()
    }
    return jax.block_until_ready(replace(state, **arrays))


def _greedy(batch: int) -> SamplingArrays:
  return SamplingArrays.of([SamplingParams(temperature=0)] * batch)
