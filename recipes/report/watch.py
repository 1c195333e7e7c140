"""`dsv2 report --watch`: serves the page on this machine, and makes it again when a run has written something."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from threading import Lock
from typing import Any

from conversations.errors import ToolkitError
from recipes.listening import HOME, listen
from recipes.lock import LOCK, owner_of
from recipes.report.report import report_page
from recipes.report.run_files import READ, run_places

PORT = 8001  # unless another is asked for
REST = 10  # times as long as making the page took: how long it stays before it is made again


class LivePage:
    """The page of some runs, made again when asked for if their files have changed."""

    def __init__(self, runs: Sequence[Path]):
        self._runs = runs
        self._lock = Lock()
        self._state: object = None
        self._page, self._version, self._next = "", "", 0.0

    def current(self) -> tuple[str, str]:
        """The page and its version; not made again within REST times the seconds that it took.

        Raises:
            ToolkitError: there is no run, or no longer.
        """
        with self._lock:
            state = _state(self._runs)
            if state != self._state and time.monotonic() >= self._next:
                began = time.monotonic()
                self._page = report_page(self._runs, watched=True)
                self._version = f'"{hashlib.sha256(self._page.encode()).hexdigest()[:16]}"'
                self._state, self._next = state, time.monotonic() + REST * (time.monotonic() - began)
            return self._page, self._version


def watch(arguments: argparse.Namespace) -> None:
    """Serve the page of the runs on 127.0.0.1 until SIGINT or SIGTERM.

    Raises:
        ToolkitError: a directory does not hold a run, or the port is taken.
    """
    if arguments.output is not None:
        raise ToolkitError("--output: with --watch the page is served and not written; leave one of them out")
    with listen(HOME, PORT if arguments.port is None else arguments.port) as listener:
        page = LivePage(arguments.runs)
        page.current()
        with _Server(page, listener) as server:
            print(
                f"{', '.join(map(str, arguments.runs))} on http://{HOME}:{server.server_port}/; Ctrl-C stops",
                flush=True,
            )
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)


def _state(runs: Sequence[Path]) -> list[tuple[str, float, int, bool]]:
    """What tells one state of the runs from another: their files, and whether somebody works on them."""
    state = []
    for place in (place for run in runs for place in run_places(run)):
        lock = place / LOCK
        for file in (*(place / name for name in READ), lock):
            with suppress(OSError):
                found = file.stat()
                held = file == lock and owner_of(place) is not None
                state.append((str(file), found.st_mtime, found.st_size, held))
    return state


class _Server(ThreadingHTTPServer):
    """Serves a page on a socket that listens already."""

    daemon_threads = True

    def __init__(self, page: LivePage, listener: socket):
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.server_port, self.page = listener, listener.getsockname()[1], page

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong, but not that a browser has gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET / alone, and only under this machine's own names: a page from elsewhere whose name is made to point
    here must not read it."""

    server: _Server

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0] not in (HOME, "localhost"):  # any port: it may be forwarded
            return self._answer(403, "this page is for this machine only\n")
        if self.path.partition("?")[0] != "/":
            return self._answer(404, "nothing here; the page is /\n")
        try:
            page, version = self.server.page.current()
        except (ToolkitError, OSError) as error:
            return self._answer(503, f"{error}\n")
        known = self.headers.get("If-None-Match") == version
        return self._answer(304 if known else 200, "" if known else page, "text/html", ETag=version)

    def _answer(self, status: int, text: str, kind: str = "text/plain", **headers: str) -> None:
        body = text.encode("utf-8", "replace")
        stated = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), **headers}
        self.send_response(status)
        for name, value in {**stated, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests: the page asks every two seconds."""
