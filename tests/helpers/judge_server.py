"""A judge for tests: a real HTTP server on this machine that speaks OpenAI's protocol, and fails when told to."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "abc123-the-key"
Reply = tuple[int, dict[str, str], str]
BLOCK = r"<<<BEGIN {name} (\w+)>>>\n(.*)\n<<<END {name} \1>>>"


def reply_with(text: str) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Server(ThreadingHTTPServer):
    """Replies with the next of `replies`, then with what `judge` says of the messages."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply | float] = []  # a number: seconds of silence
        self.judge: Callable[[list[dict[str, str]]], str] = lambda messages: "Fine.\nScore: 7"
        self.requests: list[dict[str, Any]] = []
        self.at: list[float] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append({**body, "path": self.path, "authorization": self.headers.get("authorization")})
        self.server.at.append(time.monotonic())
        reply = self.server.replies.pop(0) if self.server.replies else reply_with(self.server.judge(body["messages"]))
        if isinstance(reply, float):
            time.sleep(reply)
            return
        status, headers, text = reply
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words: Any) -> None:
        pass


def block(messages: list[dict[str, str]], name: str) -> str:
    found = re.search(BLOCK.format(name=name), messages[1]["content"], re.DOTALL)
    assert found
    return found[2]


@contextmanager
def serving() -> Iterator[Server]:
    started = Server()
    thread = threading.Thread(target=started.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield started
    started.shutdown()
    started.server_close()
