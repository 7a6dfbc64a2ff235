"""Renders a chat template in a process that may use little memory and open no file.

`chat.ChatTemplate` runs this file as a script. A chat template is a program from a stranger, and
Jinja's sandbox limits what it may touch, not how long it runs or how much it allocates: this does.
Lines of JSON come in: first {"source", "seconds"}, the template and the processor time it may
take; then {"variables"}, each answered by {"text"} or {"error"}. SIGPROF ends the process when time
is up.
"""

import contextlib
import datetime
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY_BYTES = 160 << 20  # Python and Jinja take 25 MB of it.
OUTPUT_CHARS = 1 << 20  # beside the length of the request
_MESSAGE_CHARS = 500


class Generation(jinja2.ext.Extension):
  """`{% generation %}`, by which training finds the assistant's words; here it only holds them."""

  tags = {"generation"}  # noqa: RUF012  Jinja reads it from the class.

  def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> jinja2.Template:
  """The template in the environment that transformers documents for chat templates."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any], limit: int) -> str:
  """The rendered text; raises where it grows beyond `limit` characters."""
  chunks, size = [], 0
  for chunk in template.generate(**variables):
    size += len(chunk)
    if size > limit:
      raise jinja2.TemplateRuntimeError(f"it writes more than {limit} characters")
    chunks.append(chunk)
  return "".join(chunks)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  # Jinja's own escapes for HTML.
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


def _warm_up() -> None:
  """Makes Python and Jinja load what they load late, while files may still be opened."""
  compile_template("{{ 'a\\n'|tojson }}{{ strftime_now('%d %b %Y') }}").render()
  for wrong in ("{{ 1 / 0 }}", "{% for %}"):
    with contextlib.suppress(jinja2.TemplateError, ZeroDivisionError):
      compile_template(wrong).render()


def _limit() -> None:
  limits = {
    resource.RLIMIT_AS: MEMORY_BYTES,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NOFILE: 3,
    resource.RLIMIT_CORE: 0,
  }
  for kind, limit in limits.items():
    # macOS refuses to limit memory; the limits of time and output still hold.
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(kind, (limit, limit))


def main() -> None:
  _warm_up()
  _limit()
  print("ready", flush=True)
  job = json.loads(sys.stdin.buffer.readline())
  template: jinja2.Template | None = None
  for line in sys.stdin.buffer:
    signal.setitimer(signal.ITIMER_PROF, job["seconds"])
    try:
      request = json.loads(line)
      template = template or compile_template(job["source"])
      answer = {"text": render(template, request["variables"], len(line) + OUTPUT_CHARS)}
    except MemoryError:
      answer = {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as e:  # Whatever a template does wrong is an answer, not a crash.
      answer = {"error": f"{type(e).__name__}: {e}"[:_MESSAGE_CHARS].rstrip(".")}
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
