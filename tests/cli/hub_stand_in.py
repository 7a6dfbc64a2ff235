"""A Hugging Face hub on loopback, as much of it as downloading a file needs.

Source: what huggingface_hub's `hf_hub_download` asks for: HEAD and GET of
/{org}/{repo}/resolve/{revision}/{file}, with ETag, X-Repo-Commit, Content-Length and Range.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
  """What the hub has and does; tests change it while it runs.

  Attributes:
    url: to give as HF_ENDPOINT.
    files: contents by "org/repo/path".
    token: what private repositories ("secret/...") want to see.
    break_after: bytes of a body after which every connection breaks; None for never.
    requests: (method, path) of all requests.
  """

  url: str = ""
  files: dict[str, bytes] = field(default_factory=dict)
  token: str = "hf_good"
  break_after: int | None = None
  requests: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
  """Runs the hub on a free port of loopback."""

  class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
      self._answer(body=False)

    def do_GET(self) -> None:
      self._answer(body=True)

    def _answer(self, body: bool) -> None:
      hub.requests.append((self.command, self.path))
      name = self.path.lstrip("/").replace("/resolve/main/", "/").partition("?")[0]
      if name.startswith("secret/") and self.headers["Authorization"] != f"Bearer {hub.token}":
        return self._refuse(401, "RepoNotFound")
      if name not in hub.files:
        known = any(file.startswith("/".join(name.split("/")[:2]) + "/") for file in hub.files)
        return self._refuse(404, "EntryNotFound" if known else "RepoNotFound")
      data, begin = hub.files[name], 0
      if wanted := self.headers["Range"]:
        begin = int(wanted.removeprefix("bytes=").split("-")[0])
      self.send_response(206 if begin else 200)
      self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
      self.send_header("X-Repo-Commit", COMMIT)
      self.send_header("Content-Length", str(len(data) - begin))
      if begin:
        self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
      self.end_headers()
      if body:
        end = len(data) if hub.break_after is None else begin + hub.break_after
        self.wfile.write(data[begin:end])
      self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
      self.send_response(status)
      self.send_header("X-Error-Code", code)
      if code == "EntryNotFound":
        self.send_header("X-Repo-Commit", COMMIT)  # The client remembers what is not there.
      self.send_header("Content-Length", "0")
      self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
      """Quiet."""

  server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  hub.url = f"http://127.0.0.1:{server.server_port}"
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield hub
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
