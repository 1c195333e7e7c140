"""Why a stage cannot use a canonical row: each function returns the reason, or None if the stage can use it.

A row that a stage cannot use is a bad row, reported before any weight is loaded.
"""

from collections.abc import Sequence
from functools import cache

from conversations.answers.prompts import split_prompt
from conversations.errors import ToolkitError
from conversations.row import RANKED, Refuse, Row


def first_of(*refusals: Refuse) -> Refuse:
    """The first reason that any of the refusals gives."""
    return lambda row: next((why for refuse in refusals if (why := refuse(row))), None)


def no_answer(row: Row) -> str | None:
    """Refuses all but conversations with an answer and plain text."""
    if "text" in row:
        return None
    if "messages" not in row:
        return f"is {_kind(row)}, not a conversation or plain text; for preferences use dsv2 reward"
    has_answer = any(message["role"] == "assistant" for message in row["messages"])
    return None if has_answer else "has no answer to train on; for prompts use dsv2 rl or dsv2 eval"


def no_conversation(row: Row) -> str | None:
    """Refuses all but conversations with an answer."""
    return "is plain text, not a conversation" if "text" in row else no_answer(row)


def no_question(row: Row) -> str | None:
    """Refuses rows without a question for a model to answer."""
    if "text" in row:
        return "is plain text and contains no question"
    return None if split_prompt(row.get("prompt") or row["messages"])[0] else "has no question before its answer"


def no_reference(row: Row) -> str | None:
    """Refuses rows without a question or a reference answer."""
    return no_question(row) or (None if "reference" in row else "has no reference to compare an answer with")


def no_pair(row: Row) -> str | None:
    """Refuses rows without a pair of answers."""
    return None if "chosen" in row else f"is {_kind(row)}, not a pair of chosen and rejected"


def not_judged(row: Row) -> str | None:
    """Refuses rows without judged answers: a pair, a label, a score or a ranking."""
    judged = any(key in row for key in ("chosen", "completion", RANKED[1]))
    return None if judged else f"is {_kind(row)}, not a pair and not an answer with a label or a score"


def no_verdict(row: Row) -> str | None:
    """Refuses rows without an answer with a label or a score."""
    judged = "completion" in row
    return None if judged else f"is {_kind(row)}, not an answer with a label or a score, which loss: pointwise needs"


def other_verdict() -> Refuse:
    """Refuses rows as `no_verdict` does, and a mix of labels and scores, which are trained differently."""
    kinds: list[str] = []

    def refuse(row: Row) -> str | None:
        if why := no_verdict(row):
            return why
        kind = "label" if "label" in row else "score"
        kinds.append(kind)
        if kind != kinds[0]:
            return f"has a {kind}, but earlier rows have a {kinds[0]}; train on one kind at a time"
        return None

    return refuse


def unreadable_reference(rules: Sequence[str]) -> Refuse:
    """Refuses references that one of the rules cannot read, before any answer is judged."""
    from conversations.answers.rules import check_reference

    @cache
    def fault(reference: str) -> str | None:
        for rule in rules:
            try:
                check_reference(rule, reference)
            except ToolkitError as error:
                return f"cannot be judged by the rule {rule}: {error}"
        return None

    def refuse(row: Row) -> str | None:
        if row.get("reference") is None:
            return None
        return fault(row["reference"]) or next(
            (why for rule in rules if (why := _unusable_with_prompt(rule, row))), None
        )

    return refuse


def _unusable_with_prompt(rule: str, row: Row) -> str | None:
    """Why a rule that looks up the reference in the prompt (choice) does not find it there; None if it does."""
    from conversations.answers.rules import find_rule, verify

    if "prompt" not in find_rule(rule).optional:
        return None
    prompt = split_prompt(row.get("prompt") or row["messages"])[0]
    verdict = verify(rule, "", prompt=prompt, reference=row["reference"])
    return f"cannot be judged by the rule {rule}: {verdict.reason}" if verdict.score is None else None


def _kind(row: Row) -> str:
    kinds = {
        "text": "plain text",
        "messages": "a conversation",
        "chosen": "a pair",
        "completion": "a judged answer",
        RANKED[1]: "a question with right and wrong answers",
    }
    return next(name for key, name in kinds.items() if key in row)
