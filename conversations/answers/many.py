"""Judges many answers by one rule, on all cores where that pays off. No torch."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from conversations.answers.rules import Prompt, find_rule, verify
from conversations.answers.verdict import Verdict
from conversations.answers.workers import Died, TooLong, cores, shared_workers
from conversations.errors import ToolkitError

FEW = 16  # for fewer answers no process is started
AT_ONCE = 8  # answers sent to a process together
ENDED = (TooLong, Died)
SECONDS = 30.0  # time limit for those, in case a rule hangs; slow rules have shorter limits of their own


class Asked(NamedTuple):
    """The arguments of `verify` for one answer."""

    completion: str
    prompt: Prompt | None = None
    reference: Any = None
    settings: Mapping[str, Any] = {}


def verify_all(name: str, asked: Sequence[Asked]) -> list[Verdict | ToolkitError]:
    """The verdict on each answer, in order, or a ToolkitError if the rule cannot read its reference. A check that hangs
    is stopped; its score is None, as is that of a check whose process dies."""
    return [_without_verdict(judged) or judged for judged in _WAYS[find_rule(name).many](name, asked)]


def _without_verdict(result: Any) -> Verdict | None:
    if isinstance(result, TooLong):
        return Verdict(None, f"not judged within {SECONDS:g} s")
    return Verdict(None, f"not judged: its process ended ({result})") if isinstance(result, Died) else None


def _verdict(name: str, asked: Asked) -> Verdict | ToolkitError:
    try:
        return verify(name, asked.completion, prompt=asked.prompt, reference=asked.reference, **asked.settings)
    except ToolkitError as error:
        return error


def _in_this_thread(name: str, batch: Sequence[Asked]) -> list[Any]:
    return [_verdict(name, answer) for answer in batch]


def _in_threads(name: str, asked: Sequence[Asked]) -> list[Any]:
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(partial(_verdict, name), asked))


def _in_processes(name: str, asked: Sequence[Asked]) -> list[Any]:
    if len(asked) < FEW:
        return _in_this_thread(name, asked)
    judged = shared_workers().map(partial(_in_this_thread, name), asked, AT_ONCE, SECONDS)
    fault = next((v for v in judged if isinstance(v, Exception) and not isinstance(v, (ToolkitError, *ENDED))), None)
    if fault is not None:
        raise fault
    return judged


_WAYS: dict[str, Callable[[str, Sequence[Asked]], list[Any]]] = {
    "here": _in_this_thread,
    "threads": _in_threads,
    "processes": _in_processes,
}
