"""Checks code against its tests: the code in one sandbox, the tests in another, so that the verdict cannot be forged.

The code never sees its tests: it is called, and returns values (guest/tester.py). A program gets only its input; its
output is compared with the expected one in this process.
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
    """passed and failed: numbers of tests (asserts, or inputs of a program). why: the first failure."""

    passed: int
    failed: int
    why: str | None = None


def check_functions(code: str, tests: Tests, limits: Limits, *, isolated: bool = True) -> Outcome:
    """Run tests on the functions and classes that the code defines."""
    (candidate_end, candidate_end_of_tester), (host_end, tester_end) = socket.socketpair(), socket.socketpair()
    with candidate_end, candidate_end_of_tester, host_end, tester_end:
        in_tester = [candidate_end_of_tester.fileno(), tester_end.fileno()]
        with (
            guest("candidate.py", [candidate_end.fileno(), "functions"], limits, isolated, [candidate_end.fileno()]),
            guest("tester.py", in_tester, limits, isolated, in_tester) as tester,
        ):
            for end in (candidate_end, candidate_end_of_tester, tester_end):
                end.close()
            late, host = threading.Event(), Channel(host_end.fileno(), _nothing, _nothing)

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
    """The outcome, or a failure if no assert was reached, as in a loop over an empty result."""
    missed = tests.counted and not outcome.passed + outcome.failed
    return Outcome(0, 1, "no assert of the tests was reached") if missed else outcome


def _nothing(value: Any) -> Any:
    raise ValueError("only plain values leave a sandbox")


def check_program(code: str, cases: Sequence[Mapping[str, str]], limits: Limits, *, isolated: bool = True) -> Outcome:
    """Runs a program on each case's stdin and compares its output with the case's stdout, ignoring trailing white space
    and trailing empty lines."""
    passed, why, began = 0, None, time.monotonic()
    for case in cases:
        remaining = limits.seconds - (time.monotonic() - began)
        failure = _failure(code, case, limits, max(remaining, 0.0), isolated)
        passed += failure is None
        why = why or failure
    return Outcome(passed, len(cases) - passed, why)


def _failure(code: str, case: Mapping[str, str], limits: Limits, seconds: float, isolated: bool) -> str | None:
    """Why the program fails the case; None if it passes."""
    ran = run_program(code, case["stdin"], limits, seconds=seconds, isolated=isolated)
    if ran.fault:
        return ran.fault
    out = ran.output
    return None if _lines(out) == _lines(case["stdout"]) else f"wrote {out[:100]!r}, not {case['stdout'][:100]!r}"


@dataclass(frozen=True)
class Ran:
    """A program's output, and why it did not end well; None if it did."""

    output: str
    fault: str | None = None


def run_program(
    code: str,
    stdin: str,
    limits: Limits,
    *,
    seconds: float | None = None,
    isolated: bool = True,
    with_errors: bool = False,
) -> Ran:
    """Runs a program once.

    Args:
        seconds: of wall-clock time, if other than the limits'.
        with_errors: whether its output includes stderr.
    """
    host_end, program_end = socket.socketpair()
    with host_end, program_end, TemporaryFile() as stdin_file, TemporaryFile() as output:
        stdin_file.write(stdin.encode())
        stdin_file.seek(0)
        arguments = [program_end.fileno(), "program"]
        pipes = {"stdin": stdin_file, "stdout": output, **({"stderr": subprocess.STDOUT} if with_errors else {})}
        with guest("candidate.py", arguments, limits, isolated, [program_end.fileno()], **pipes) as run:
            program_end.close()
            fault = None
            try:
                Channel(host_end.fileno(), _nothing, _nothing).send(code)
                if code_of_end := run.wait(limits.seconds if seconds is None else seconds):
                    fault = f"the program ended with exit code {code_of_end}"
            except Gone:
                fault = "the program did not start"
            except ValueError as error:
                fault = str(error)  # too long to be sent
            except subprocess.TimeoutExpired:
                fault = f"not done after {limits.seconds:g} s"
        if output.seek(0, 2) > limits.output * MIB:
            fault = f"more than {limits.output} MiB of output"
        output.seek(0)
        return Ran(output.read(limits.output * MIB).decode(errors="replace"), fault)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
