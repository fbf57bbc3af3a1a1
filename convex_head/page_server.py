"""A web server for a built leaderboard, reachable from this machine alone.

It listens on the loopback address and answers only requests that name it so: a page elsewhere whose domain was
pointed at 127.0.0.1 gets nothing.
"""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from convex_head.errors import EntryError, InputError

_ADDRESS = "127.0.0.1"


class _Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of the folder's files; no log lines."""

    def send_head(self) -> Any:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in (_ADDRESS, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN, "this server answers to 127.0.0.1 only")
            return None
        return super().send_head()

    def end_headers(self) -> None:
        # 'build' in another terminal shows after a reload.
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


def page_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of ``folder``'s files on 127.0.0.1; the caller runs ``serve_forever()`` and closes it.

    Raises:
        EntryError: the folder has no index.html.
        InputError: the port cannot be taken.
    """
    if not (folder / "index.html").is_file():
        raise EntryError(f"{folder}/index.html is missing; run 'convex-head leaderboard build'.")
    try:
        return ThreadingHTTPServer((_ADDRESS, port), partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port} cannot be taken ({error}); choose another with --port, or 0.") from error
