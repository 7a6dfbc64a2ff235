"""Every test here compiles for a device that is not here; what it records is printed as a table."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def nothing_kept() -> Iterator[None]:
  """No kept program is looked for: it could be written, not read without its device."""
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  jax.config.update("jax_enable_compilation_cache", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  for item in items:
    if HERE in item.path.parents:
      item.add_marker(pytest.mark.aot)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  """Prints `record_property("aot", {...})` of all tests as Markdown, one table a set of columns."""
  tables: dict[tuple[str, ...], list[dict]] = {}
  for report in terminalreporter.stats.get("passed", []):
    for name, row in report.user_properties:
      if name == "aot":
        tables.setdefault(tuple(row), []).append(row)
  for columns, rows in tables.items():
    terminalreporter.section("compiled, not run")
    terminalreporter.write_line(f"| {' | '.join(columns)} |")
    terminalreporter.write_line(f"|{'---|' * len(columns)}")
    for row in sorted(rows, key=lambda row: [str(row[c]).zfill(12) for c in columns]):
      terminalreporter.write_line(f"| {' | '.join(str(row[c]) for c in columns)} |")
