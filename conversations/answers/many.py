"""Judges many answers by one rule, on all cores if that pays off. No torch."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from conversations.answers.rules import Prompt, find_rule, verify
from conversations.answers.verdict import Verdict
from conversations.answers.workers import Died, TooLong, cores, shared_workers
from conversations.errors import ToolkitError

FEW = 16  # answers, for which no process is started
AT_ONCE = 8  # answers handed to a process together
ENDED = (TooLong, Died)
SECONDS = 30.0  # for those; a rule that takes long has a limit of its own, and this one is for where it hangs


class Asked(NamedTuple):
    """The arguments of `verify` for one answer."""

    completion: str
    prompt: Prompt | None = None
    reference: Any = None
    settings: Mapping[str, Any] = {}


def verify_all(name: str, asked: Sequence[Asked]) -> list[Verdict | ToolkitError]:
    """The verdict on each answer, in order; a ToolkitError in its place where the rule cannot read a reference. A check
    that hangs is ended; its score is None, as that of one whose process dies."""
    return [_without_verdict(judged) or judged for judged in _WAYS[find_rule(name).many](name, asked)]


def _without_verdict(judged: Any) -> Verdict | None:
    if isinstance(judged, TooLong):
        return Verdict(None, f"not judged within {SECONDS:g} s")
    return Verdict(None, f"not judged: its process ended ({judged})") if isinstance(judged, Died) else None


def _one(name: str, asked: Asked) -> Verdict | ToolkitError:
    try:
        return verify(name, asked.completion, prompt=asked.prompt, reference=asked.reference, **asked.settings)
    except ToolkitError as error:
        return error


def _here(name: str, asked: Sequence[Asked]) -> list[Any]:
    return [_one(name, answer) for answer in asked]


def _in_threads(name: str, asked: Sequence[Asked]) -> list[Any]:
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(partial(_one, name), asked))


def _in_processes(name: str, asked: Sequence[Asked]) -> list[Any]:
    if len(asked) < FEW:
        return _here(name, asked)
    judged = shared_workers().map(partial(_here, name), asked, AT_ONCE, SECONDS)
    fault = next((v for v in judged if isinstance(v, Exception) and not isinstance(v, (ToolkitError, *ENDED))), None)
    if fault is not None:
        raise fault
    return judged


_WAYS: dict[str, Callable[[str, Sequence[Asked]], list[Any]]] = {
    "here": _here,
    "threads": _in_threads,
    "processes": _in_processes,
}
