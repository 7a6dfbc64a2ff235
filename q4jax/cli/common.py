"""What the commands share: flags, models and progress bars, texts, output for machines."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from q4jax.cli import compile_cache, cpus, kv, memory
from q4jax.cli.parsing import UsageError
from q4jax.errors import ConfigError

if TYPE_CHECKING:  # The model brings JAX, which only a command that runs should wait for.
  from q4jax.engine import Engine
  from q4jax.model.model import Model


def define_json(flags: absl_flags.FlagValues, what: str = "one JSON object") -> None:
  """--json."""
  absl_flags.DEFINE_boolean("json", False, f"Print {what} on stdout.", flag_values=flags)


def define_model(flags: absl_flags.FlagValues) -> None:
  """--tokenizer, and the flags of `define_machine`."""
  absl_flags.DEFINE_string(
    "tokenizer",
    None,
    "A tokenizer.json or tokenizer.model to use in place of the file's vocabulary.",
    flag_values=flags,
  )
  define_machine(flags)


def define_machine(flags: absl_flags.FlagValues) -> None:
  """The flags that `load_model` reads."""
  absl_flags.DEFINE_integer(
    "threads",
    None,
    "CPUs to use, each with one thread: the process is kept to that many (Linux). All that it may "
    "use, if not given.",
    lower_bound=1,
    flag_values=flags,
  )
  absl_flags.DEFINE_string(
    "implementation",
    None,
    "The int4 matmul to use, for study: reference, xla, cpu_scalar, cpu_avx2, cpu_avx512, "
    "cpu_neon, cpu_exact (float activations), pallas_tpu or mosaic_gpu; the best if not given.",
    flag_values=flags,
  )
  absl_flags.DEFINE_string(
    "compile_cache",
    None,
    "Directory of compiled programs, so that the next start need not compile them; none to keep "
    "nothing. JAX_COMPILATION_CACHE_DIR if that is set, else ~/.cache/q4jax/programs.",
    flag_values=flags,
  )


def define_engine(flags: absl_flags.FlagValues, pool: bool = True) -> None:
  """The flags that `make_engine` reads; with a `pool`, those of one that lasts too."""
  absl_flags.DEFINE_integer(
    "max_context",
    None,
    "Most tokens a sequence may have, prompt and output; the model's limit if not given.",
    lower_bound=1,
    flag_values=flags,
  )
  absl_flags.DEFINE_enum(
    "kv_dtype",
    None,
    ["f16", "bf16", "f32"],
    "Type of the KV cache; f16 on a CPU and bf16 elsewhere, if not given.",
    flag_values=flags,
  )
  kv.define(flags)
  if pool:
    kv.define_pool(flags)


def define_text(flags: absl_flags.FlagValues, help: str) -> None:
  """--text, and how much of it is taken: --ctx, --sequences, --seed."""
  absl_flags.DEFINE_string("text", None, help, flag_values=flags)
  absl_flags.DEFINE_integer("ctx", 512, "Tokens in a sequence.", 2, flag_values=flags)
  absl_flags.DEFINE_integer(
    "sequences", 128, "Sequences, drawn from all over the text.", 1, flag_values=flags
  )
  absl_flags.DEFINE_integer("seed", 0, "Of the draw.", 0, flag_values=flags)


def define_rotate(flags: absl_flags.FlagValues) -> None:
  """--rotate and --rotate_seed, which `rotate_seed` reads."""
  absl_flags.DEFINE_boolean(
    "rotate", False, "Fold a random Hadamard rotation into the weights first: the model computes "
    "the same, and outliers are spread.", flag_values=flags,
  )  # fmt: skip
  absl_flags.DEFINE_integer("rotate_seed", 0, "Of the rotation.", 0, flag_values=flags)


def rotate_seed(flags: absl_flags.FlagValues) -> int | None:
  """The seed of the rotation that is asked for; None where none is.

  Raises:
    UsageError: a seed for no rotation.
  """
  if flags["rotate_seed"].present and not flags.rotate:
    raise UsageError("--rotate_seed is for --rotate; give that too.")
  return flags.rotate_seed if flags.rotate else None


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def define_sampling(flags: absl_flags.FlagValues, max_tokens: int) -> None:
  """The flags that `sampling` reads."""
  absl_flags.DEFINE_integer("max_tokens", max_tokens, "Most new tokens.", 1, flag_values=flags)
  absl_flags.DEFINE_float(
    "temperature", 0.7, "0 always takes the likeliest token; higher is more varied.", 0.0,
    flag_values=flags,
  )  # fmt: skip
  absl_flags.DEFINE_integer("top_k", 0, "Keep the k likeliest; 0 keeps all.", 0, flag_values=flags)
  absl_flags.DEFINE_float(
    "top_p", 1.0, "Keep the likeliest tokens that together have this probability; 1 keeps all.",
    flag_values=flags,
  )  # fmt: skip
  absl_flags.DEFINE_float(
    "min_p", 0.0, "Keep tokens at least this times as likely as the likeliest; 0 keeps all.",
    flag_values=flags,
  )  # fmt: skip
  absl_flags.DEFINE_float(
    "repetition_penalty", 1.0, "Above 1 makes tokens that were there already less likely.",
    flag_values=flags,
  )  # fmt: skip
  absl_flags.DEFINE_integer(
    "seed", 0, "Same seed, prompt and settings: same tokens.", 0, flag_values=flags
  )
  absl_flags.DEFINE_multi_string(
    "stop", [], "A text that ends the output and is not part of it; may be given several times.",
    flag_values=flags,
  )  # fmt: skip


def sampling(flags: absl_flags.FlagValues) -> dict[str, Any]:
  """The arguments of `Engine.stream` that the sampling flags set."""
  return {name: flags[name].value for name in ("max_tokens", *_SAMPLING, "stop")}


def load_model(
  name: str, flags: absl_flags.FlagValues, tokenizer: str | None = None
) -> "tuple[Model, float]":
  """The model called `name`, and the seconds that loading it took (importing JAX apart).

  Args:
    flags: those of `define_machine`, and --json.
    tokenizer: a tokenizer.json or tokenizer.model in place of the file's vocabulary.

  A bar on stderr shows how far it is, where someone is watching.
  """
  cpus.limit_threads(flags.threads)
  compile_cache.use(flags.compile_cache)
  memory.give_back_after_compiling()
  from q4jax.loading import load

  begin = time.perf_counter()
  with bar(f"loading {name}") if watched(flags) else nullcontext() as advance:
    model = load(
      find_model(name, flags),
      tokenizer=tokenizer,
      implementation=flags.implementation,
      progress=advance,
    )
  memory.give_back()
  return model, time.perf_counter() - begin


def find_model(name: str, flags: absl_flags.FlagValues) -> Path:
  """The model's local path; a download shows its progress only where someone is watching."""
  if not watched(flags):
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
  from q4jax.formats.hub import resolve

  return resolve(name)


def make_engine(model: "Model", flags: absl_flags.FlagValues) -> "Engine":
  """An engine with the model and the flags of `define_engine`."""
  from q4jax.engine import Engine

  return Engine(
    model,
    max_context=flags.max_context,
    kv_dtype=flags.kv_dtype,
    kv=kv.config(flags),
    **kv.pool(flags),
  )


def watched(flags: absl_flags.FlagValues) -> bool:
  """Whether progress on stderr is for someone's eyes."""
  return sys.stderr.isatty() and not flags.json


def check_out(out: Path, force: bool) -> None:
  """Raises ConfigError where something is called `out` already and is not to be replaced."""
  if out.exists() and not force:
    raise ConfigError(f"{out} exists; give another name, or --force to replace it.")


def read_text(path: str) -> str:
  """A UTF-8 file as it is, line ends included; "-" is standard input.

  Raises:
    ConfigError: it cannot be read, or is no UTF-8.
  """
  try:
    data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    return data.decode()
  except OSError as error:
    raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
  except UnicodeDecodeError as error:
    raise ConfigError(
      f"{path} is not UTF-8 (byte {error.start}); convert it, for example with iconv."
    ) from None


def print_json(value: Any) -> None:
  """One line of JSON on stdout."""
  print(json.dumps(value), flush=True)


def note(text: str) -> None:
  """One line for people, on stderr, below what stdout has shown so far."""
  sys.stdout.flush()
  print(text, file=sys.stderr, flush=True)


def size(nbytes: float) -> str:
  """Bytes for people: "763.4 MiB"."""
  for unit in ("B", "KiB", "MiB"):
    if nbytes < 1024:
      return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
    nbytes /= 1024
  return f"{nbytes:.2f} GiB"


class bar:
  """A progress bar on stderr; a context manager that gives a function (done, total)."""

  def __init__(self, title: str) -> None:
    self._title = title

  def __enter__(self) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    self._progress = Progress(console=Console(stderr=True), transient=True)
    task = self._progress.add_task(self._title, total=None)
    self._progress.start()
    return lambda done, total: self._progress.update(task, completed=done, total=total)

  def __exit__(self, *_: object) -> None:
    self._progress.stop()
