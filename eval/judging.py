"""Answers judged by a rule, with what is read from each: the same in metrics and in tasks of lm-eval. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from conversations.answers.choice import chosen_letters, options_in
from conversations.answers.code import code_reference, written_code
from conversations.answers.extracting import candidates
from conversations.answers.many import Asked, verify_all
from conversations.answers.number import final_number
from conversations.answers.rules import question_of
from conversations.answers.verdict import Verdict
from conversations.errors import ToolkitError


@dataclass(frozen=True)
class Judged:
    """The verdict on an answer; its score is never None. read: what was read from the answer, such as a number; None
    if it holds no answer."""

    text: str
    verdict: Verdict
    read: str | None

    @property
    def shown(self) -> dict[str, Any]:
        """What samples.jsonl says of it."""
        return {"read": self.read, "value": self.verdict.score, "reason": self.verdict.reason}


def judged_by(rule: str, asked: Sequence[Asked]) -> list[Judged]:
    """The verdict of a rule on each answer. One that could not be judged in time scores 0.

    Raises:
        ToolkitError: the rule cannot read a reference.
    """
    verdicts = verify_all(rule, asked)
    if fault := next((verdict for verdict in verdicts if isinstance(verdict, ToolkitError)), None):
        raise fault
    read = READS.get(rule, whole_text)
    return [
        Judged(one.completion, Verdict(verdict.score or 0.0, verdict.reason), read(one))
        for one, verdict in zip(asked, verdicts, strict=True)
        if isinstance(verdict, Verdict)
    ]


def whole_text(asked: Asked) -> str | None:
    """The answer itself; None if there is nothing but spaces."""
    return asked.completion.strip() or None


def _number(asked: Asked) -> str | None:
    value = final_number(asked.completion)
    return None if value is None else str(value)


def _final_answer(asked: Asked) -> str | None:
    return next(iter(candidates(asked.completion)), None)


def _letters(asked: Asked) -> str | None:
    options = {} if asked.prompt is None else options_in(question_of(asked.prompt))
    chosen = chosen_letters(asked.completion, options)
    return ", ".join(sorted(chosen)) if chosen else None


def _code(asked: Asked) -> str | None:
    return written_code(asked.completion, code_reference(asked.reference))


# The rules that look for an answer in the text, and what each finds. All others judge the text as a whole.
READS: dict[str, Callable[[Asked], str | None]] = {
    "number": _number,
    "math": _final_answer,
    "choice": _letters,
    "code": _code,
}
