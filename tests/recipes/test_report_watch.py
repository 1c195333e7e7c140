"""`dsv2 report --watch`: the page of runs that go on."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from recipes.cli import main
from recipes.listening import listen
from recipes.lock import hold_directory
from recipes.report.watch import LivePage, _Server

from ..helpers.run_files import make_stage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has begun."""
    run = make_stage(tmp_path / "run", "sft", [{"step": step, "loss": 3 / step} for step in (1, 2)])
    (run / "final").rmdir()
    (run / "samples.jsonl").unlink()
    (run / "manifest.json").write_text(json.dumps({"status": "running", "started": "2026-01-01T00:00:00+00:00"}))
    return run


class Server:
    """The pages of runs, served in this process."""

    def __init__(self, *runs: Path):
        self.page, self.listener = LivePage(runs), listen("127.0.0.1", 0)
        self.server = _Server(self.page, self.listener)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def get(self, path: str = "/", **headers: str) -> tuple[int, str, str | None]:
        """Status, text and version."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers["ETag"]


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    server = Server(run)
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_the_page_is_made_again_when_a_run_has_written_something(run: Path, server: Server) -> None:
    status, page, version = server.get()
    assert status == 200 and version and "from 3 to 1.5 over steps 1 to 2" in page
    assert server.get(If_None_Match=version) == (304, "", version)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1}\n')
    server.page._next = 0.0
    status, page, later = server.get(If_None_Match=version)
    assert status == 200 and later != version and "from 3 to 1 over steps 1 to 3" in page


def test_making_the_page_takes_a_tenth_of_the_time_at_most(run: Path, server: Server) -> None:
    version = server.get()[2]
    server.page._next = time.monotonic() + 60
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1}\n')
    assert server.get()[2] == version


def test_only_this_machine_and_only_the_page(run: Path, server: Server) -> None:
    assert server.get(Host=f"localhost:{server.port}")[0] == server.get(Host="127.0.0.1:9")[0] == 200
    for name in ("evil.example", f"evil.example:{server.port}", "localhost.evil.example", ""):
        assert server.get(Host=name)[0] == 403, "a name that was made to point here"
    assert server.get("/metrics.jsonl")[0] == 404 and server.get("/../run/recipe.yaml")[0] == 404
    (run / "recipe.yaml").rename(run.parent / "recipe.yaml")
    for path in run.iterdir():
        path.unlink()
    status, text, _ = server.get()
    assert status == 503 and "not a run directory" in text


def test_the_one_script_is_the_one_that_the_policy_allows(server: Server) -> None:
    page = server.get()[1]
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src" in policy and "script-src 'sha256-" in policy and page.count("<script") == 1


def test_the_command_shows_a_run_that_grows_until_it_is_stopped(run: Path) -> None:
    """Somebody works on the run; a line of its metrics is half written."""
    command = [sys.executable, "-m", "recipes.cli", "report", str(run), "--watch", "--port", "0"]
    with (
        hold_directory(run),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as at,
    ):
        assert at.stdout and at.stderr
        said = at.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/; Ctrl-C stops", said)[1])  # type: ignore[index]
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "loss": 0.75}\n{"step": 4, "lo')
        page, deadline = "", time.monotonic() + 60
        while "over steps 1 to 3" not in page and time.monotonic() < deadline:
            connection = HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/")
            page = connection.getresponse().read().decode()
            time.sleep(0.1)
        at.send_signal(signal.SIGINT)
        assert at.wait(30) == 0 and at.stderr.read() == "stopped\n"
    assert "from 3 to 0.75 over steps 1 to 3" in page and f"running: process {os.getpid()}" in page
    assert "unreadable" not in page and "is missing" not in page, "nothing is wrong with a run that goes on"
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--port", "8001"], "--port belongs to --watch"),
        (["RUN", "--watch", "--output", "x.html"], "--output: with --watch the page is served"),
        (["RUN", "--watch", "--port", "70000"], "--port is 70000; it must be from 0 to 65535"),
        (["nowhere", "--watch", "--port", "0"], "nowhere: no such directory"),
    ],
)
def test_wrong_words(words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *(str(run) if word == "RUN" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert main(["report", str(run), "--watch", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"--port {port}: " in said and "in use; choose another" in said and "--host" not in said
