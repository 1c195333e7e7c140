"""Canonical rows: the row format shared by this package and all stages.

A canonical row has one of these sets of keys:

    messages                     a conversation; a prompt if it ends with a user turn
    prompt, chosen, rejected     a preference pair; all three are lists of messages; also `margin` (a number) if the
                                 source says by how much the first is better
    prompt, completion, label    a judged answer (true or false), both lists of messages
    prompt, completion, score    a scored answer (a number)
    prompt, right_answers,       a question with right and with wrong answers, each answer a list of messages
        wrong_answers
    text                         plain text, for language modelling

In addition, if the source has them: `reference` (the answer that a verifier compares with) and `meta` (a dict of all
its other keys). A message has `role` (system, user or assistant) and `content`; an assistant message that the file's
own flags exclude from training also has `train: false`.
"""

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]
Refuse = Callable[[Row], str | None]  # why a stage cannot use a canonical row; None if it can

PAIR = ("prompt", "chosen", "rejected")
JUDGED = ("prompt", "completion")
RANKED = ("prompt", "right_answers", "wrong_answers")
MARGIN = "margin"  # optional beside PAIR
VERDICTS = ("label", "score")  # exactly one of them beside JUDGED


def answers_of(row: Row) -> list[list[Message]]:
    """All answers of a row with judged ones, the right ones first."""
    lists = [row[key] for key in RANKED[1:] if key in row]
    return [answer for listed in lists for answer in listed] or [
        row[key] for key in (*PAIR[1:], JUDGED[1]) if key in row
    ]


def conversations_of(row: Row) -> list[list[Message]]:
    """A row's conversation, or its prompt with each of its answers."""
    return [row["messages"]] if "messages" in row else [[*row["prompt"], *answer] for answer in answers_of(row)]


def is_utf8(text: str) -> bool:
    """Whether text that was decoded with "surrogateescape" was UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def without_nulls(value: Any, keep: Sequence[str] = ()) -> Any:
    """Remove the keys whose values are null from all objects in a value, except those in `keep`.

    In a table all objects of a column have the same keys, and those missing in a row are null. They are
    indistinguishable from nulls that the data had before it became a table.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item, keep) for key, item in value.items() if item is not None or key in keep}
    return [without_nulls(item, keep) for item in value] if isinstance(value, list) else value
