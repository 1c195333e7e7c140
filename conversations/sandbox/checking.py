"""Whether code passes its tests: the code in one sandbox, the tests in another, so that the verdict cannot be forged.

The code never sees its tests: it is called, and gives values back (guest/tester.py). A program sees what it is to read,
and what it is to write is compared here.
"""

import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any

from conversations.sandbox.box import MIB, Limits, guest
from conversations.sandbox.guest.wire import Channel, Gone
from conversations.sandbox.tests import Tests


@dataclass(frozen=True)
class Outcome:
    """passed and failed: tests (asserts, or inputs of a program). why: the first of the failures."""

    passed: int
    failed: int
    why: str | None = None


def check_functions(code: str, tests: Tests, limits: Limits, *, isolated: bool = True) -> Outcome:
    """Run tests on the functions and classes that the code defines."""
    (of_candidate, of_tester), (here, there) = socket.socketpair(), socket.socketpair()
    with of_candidate, of_tester, here, there:
        in_tester = [of_tester.fileno(), there.fileno()]
        with (
            guest("candidate.py", [of_candidate.fileno(), "functions"], limits, isolated, [of_candidate.fileno()]),
            guest("tester.py", in_tester, limits, isolated, in_tester) as tester,
        ):
            for end in (of_candidate, of_tester, there):
                end.close()
            late, host = threading.Event(), Channel(here.fileno(), _nothing, _nothing)

            def stop() -> None:
                late.set()
                tester.kill()

            timer = threading.Timer(limits.seconds, stop)
            timer.start()
            try:
                host.send((code, *tests.task))
                return _reached(Outcome(*host.receive()), tests)
            except (Gone, ValueError, TypeError):
                why = (
                    f"not done after {limits.seconds:g} s"
                    if late.is_set()
                    else "the tests took too much memory or time"
                )
                return Outcome(0, 1, why)
            finally:
                timer.cancel()


def _reached(outcome: Outcome, tests: Tests) -> Outcome:
    """A failure if no assert was reached, as in a loop over an empty result of the code."""
    missed = tests.counted and not outcome.passed + outcome.failed
    return Outcome(0, 1, "no assert of the tests was reached") if missed else outcome


def _nothing(value: Any) -> Any:
    raise ValueError("only plain values leave a sandbox")


def check_program(code: str, cases: Sequence[Mapping[str, str]], limits: Limits, *, isolated: bool = True) -> Outcome:
    """Runs a program on each case's stdin, and compares what it writes with the case's stdout (white space at the ends
    of lines, and empty lines at the end, aside)."""
    passed, why, began = 0, None, time.monotonic()
    for case in cases:
        left = limits.seconds - (time.monotonic() - began)
        wrong = _wrong(code, case, limits, max(left, 0.0), isolated)
        passed += wrong is None
        why = why or wrong
    return Outcome(passed, len(cases) - passed, why)


def _wrong(code: str, case: Mapping[str, str], limits: Limits, seconds: float, isolated: bool) -> str | None:
    """Why the program fails the case; None if it passes."""
    here, there = socket.socketpair()
    with here, there, TemporaryFile() as read, TemporaryFile() as written:
        read.write(case["stdin"].encode())
        read.seek(0)
        arguments, pipes = [there.fileno(), "program"], {"stdin": read, "stdout": written}
        with guest("candidate.py", arguments, limits, isolated, [there.fileno()], **pipes) as run:
            there.close()
            try:
                Channel(here.fileno(), _nothing, _nothing).send(code)
                code_of_end = run.wait(seconds)
            except Gone:
                return "the program did not start"
            except subprocess.TimeoutExpired:
                return f"not done after {limits.seconds:g} s"
        if written.tell() > limits.output * MIB:
            return f"more than {limits.output} MiB of output"
        written.seek(0)
        out = written.read().decode(errors="replace")
    if code_of_end:
        return f"the program ended with exit code {code_of_end}"
    return None if _lines(out) == _lines(case["stdout"]) else f"wrote {out[:100]!r}, not {case['stdout'][:100]!r}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
