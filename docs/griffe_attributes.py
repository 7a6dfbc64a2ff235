"""How griffe (behind mkdocstrings) must read our `Attributes:` sections.

Griffe knows one name a line, and gives a name without an annotation the type of the one before it.
We write `key, value: ...` where two share a description; their type is that of their annotation.
"""

from typing import Any

import griffe


class Attributes(griffe.Extension):
  """Parses each docstring once, and mends names and types of attributes."""

  def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
    self._visit(pkg)

  def _visit(self, obj: griffe.Object) -> None:
    if obj.docstring is not None:
      sections = obj.docstring.parse("google", warnings=False)
      for section in sections:
        if section.kind is griffe.DocstringSectionKind.attributes:
          for item in section.value:
            self._mend(obj, item)
      obj.docstring.__dict__["parsed"] = sections  # a cached property
    for member in obj.members.values():
      if not member.is_alias:
        self._visit(member)

  def _mend(self, obj: griffe.Object, item: griffe.DocstringAttribute) -> None:
    if item.name.endswith(","):  # the other names have been taken for its type
      item.name = f"{item.name} {item.annotation}".replace("(", "").replace(")", "")
    member = obj.members.get(item.name.split(",")[0])
    item.annotation = getattr(member, "annotation", None)
