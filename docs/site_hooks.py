"""What mkdocs does beside its own: links that leave docs/, for pages that GitHub shows as well.

A page links to a record or a source file as GitHub wants it, `../experiments/results/tiny.json`;
the site has no such page, so the link goes to the repository, whose address pyproject.toml holds. A
picture is copied into the site. What does not exist is a warning, which --strict makes an error.
"""

import logging
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LOG = logging.getLogger("mkdocs.hooks.links")
_LINK = re.compile(
  r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>\.\./[^)#\s]*)(?P<anchor>#[^)\s]*)?\)"
)


def on_config(config: Any) -> Any:
  """The repository's address."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  config.repo_url = project["urls"]["Repository"]
  config.site_description = project["description"]
  return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
  """The page with its links to files outside docs/ replaced."""
  here = posixpath.dirname(page.file.src_uri)

  def replaced(match: re.Match[str]) -> str:
    path = posixpath.normpath(posixpath.join("docs", here, match["path"]))
    if path.startswith("docs/"):
      return match[0]
    target = ROOT / path
    if not target.exists():
      LOG.warning("%s links to %s, which does not exist.", page.file.src_uri, path)
    if match["image"]:
      uri = f"outside/{path}"
      if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, abs_src_path=str(target)))
      link = posixpath.relpath(uri, here or ".")
    else:
      kind = "tree" if target.is_dir() else "blob"
      link = f"{config.repo_url}/{kind}/main/{path}{match['anchor'] or ''}"
    return f"{match['image']}[{match['text']}]({link})"

  return _LINK.sub(replaced, markdown)
