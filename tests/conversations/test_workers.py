"""Answers judged side by side: the same verdicts as one by one, and one that hangs or dies takes no other with it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from conversations import verify
from conversations.answers import many
from conversations.answers.many import Asked, verify_all
from conversations.answers.workers import Died, TooLong, Workers, shared_workers
from conversations.errors import ToolkitError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers(2)
    yield started
    started.close()


def doubled(numbers: Sequence[int]) -> list[int]:
    """Twice each number; what it does for some is not nice."""
    for number in numbers:
        if number == 13:
            time.sleep(600)
        if number == 14:
            os._exit(1)
        if number == 15:
            raise ToolkitError("15 is no number")
    return [2 * number for number in numbers]


def test_one_that_hangs_is_ended_alone(workers: Workers) -> None:
    found = workers.map(doubled, range(20, 8, -1), 3, 1.0)
    alone = {number: value for number, value in zip(range(20, 8, -1), found, strict=True)}
    assert isinstance(alone.pop(13), TooLong)
    assert type(alone.pop(14)).__name__ == "ProcessExpired"
    assert isinstance(alone.pop(15), ToolkitError)
    assert alone == {number: 2 * number for number in (20, 19, 18, 17, 16, 12, 11, 10, 9)}


def test_many_verdicts_are_those_of_one_by_one() -> None:
    answers = [f"So it is \\boxed{{{n}/7}}." for n in range(40)]
    references = [f"\\frac{{{n + n % 2}}}{{7}}" for n in range(40)]
    asked = [Asked(*both) for both in zip(answers, [None] * 40, references, strict=True)]
    assert verify_all("math", asked) == [
        verify("math", answer, reference=reference) for answer, reference in zip(answers, references, strict=True)
    ]


@pytest.mark.parametrize("count", [3, 40])
def test_a_reference_that_cannot_be_read_is_its_answers_alone(count: int) -> None:
    asked = [
        Asked("7", reference="7" if n != 1 else "we begin with what is known and then go on " * 9) for n in range(count)
    ]
    found = verify_all("math", asked)
    assert [isinstance(verdict, ToolkitError) for verdict in found] == [n == 1 for n in range(count)]


def test_a_check_that_hangs_or_dies_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(many._WAYS, "processes", lambda name, asked: [TooLong(), Died("killed")])
    hung, died = verify_all("math", [Asked("7", reference="7")] * 2)
    assert hung == many.Verdict(None, "not judged within 30 s")
    assert isinstance(died, many.Verdict) and died.score is None and "its process ended (killed" in died.reason


def test_workers_end_with_their_process(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, time\n"
        "from conversations.answers.many import Asked, verify_all\n"
        "if __name__ == '__main__':\n"
        "    verify_all('math', [Asked('7', reference='7')] * 40)\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment, text=True) as run:
        assert run.stdout and run.stdout.readline() == "ready\n"
        assert children(run.pid)
        workers = children(run.pid)
        run.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive their process")


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in listed.splitlines()[1:]]
    return [int(child) for child, parent in pairs if int(parent) == pid]


def test_the_rules_share_their_workers() -> None:
    assert shared_workers() is shared_workers()
