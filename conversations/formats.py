"""The known formats of rows, as a table, and a row's way from one of them to its canonical form.

Canonical rows (`Row`) have one of these sets of keys:

    messages                     a conversation; a prompt where it ends in a user turn
    prompt, chosen, rejected     a preference pair; all three are lists of messages
    prompt, completion, label    a judged answer (true or false), both lists of messages
    prompt, completion, score    a scored answer (a number)

and, where the source has them, `reference` (the answer that a verifier compares with) and `meta` (a dict of
all the source's other keys).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from conversations.conversions import (
    VERDICTS,
    Row,
    alpaca,
    conversation,
    esft_test,
    gsm8k_question,
    judged,
    pair,
    prompt_only,
    question,
    reference_text,
    self_instruct,
    whole_pair,
)
from conversations.turns import BadRow

# Keys that every format may have beside its own.
_COMMON_KEYS = ("system", "reference", "meta")


class UnknownFormat(BadRow):
    """A row whose keys fit no known format."""


@dataclass(frozen=True)
class Format:
    """A format is recognised by its keys: a row has the first entry of FORMATS whose keys it has.

    name: as it is told to the user. keys: all are there, and not null. convert: source row -> canonical row.
    optional: further keys that `convert` reads; what else a row has goes to `meta`.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row], Row]
    optional: tuple[str, ...] = ()


# --- The table

_PAIRS = (
    *(
        Format(f"preference pairs with {key}", (key, "chosen", "rejected"), partial(pair, prompt_key=key))
        for key in ("prompt", "conversations", "messages", "question")
    ),
    Format("preference pairs", ("chosen", "rejected"), whole_pair),
)

_ANSWERED = (
    Format("messages", ("messages",), partial(conversation, key="messages")),
    Format("ShareGPT", ("conversations",), partial(conversation, key="conversations")),
    *(
        Format(f"instruction/{key}", ("instruction", key), partial(alpaca, answer_key=key), ("input",))
        for key in ("output", "response")
    ),
    Format(
        "question/answer",
        ("question", "answer"),
        partial(gsm8k_question, prompt_key="question", answer_key="answer"),
    ),
    *(
        Format(f"prompt/{key}", ("prompt", key), partial(question, prompt_key="prompt", answer_key=key))
        for key in ("completion", "response", "answer", "output", "canonical_solution")
    ),
)

_JUDGED = tuple(
    Format(
        f"{source.name} with {verdict}",
        (*source.keys, verdict),
        partial(judged, convert=source.convert, verdict=verdict),
        source.optional,
    )
    for source in _ANSWERED
    for verdict in VERDICTS
)

# Longer sets of keys stand before the shorter ones that they contain.
FORMATS: tuple[Format, ...] = (
    *_PAIRS,
    *_JUDGED,
    Format("Self-Instruct tasks", ("instruction", "instances"), self_instruct),
    *_ANSWERED,
    Format("ESFT test prompts", ("prompt", "answers"), esft_test),
    Format("prompts", ("prompt",), partial(prompt_only, key="prompt")),
)


# --- What the reader calls


def recognise(row: Mapping[str, Any]) -> Format | None:
    """The format of a source row, by its keys; a key whose value is null counts as absent."""
    present = {key for key, value in row.items() if value is not None}
    return next((known for known in FORMATS if present.issuperset(known.keys)), None)


def convert_row(row: Row, columns: Mapping[str, str] | None = None) -> tuple[Format, Row]:
    """The format of a source row and its canonical form.

    columns: {key of a known format: name that the source has for it}, applied first.
    Raises BadRow with the reason where there is no known format, or where the row does not keep to it.
    """
    row = _renamed(row, columns or {})
    known = recognise(row)
    if known is None:
        raise UnknownFormat(f"no known format has the keys {', '.join(map(str, row)) or '(none)'}")
    converted = known.convert(row)
    if row.get("reference") is not None:
        converted["reference"] = reference_text(row["reference"])
    used = {*known.keys, *known.optional, *_COMMON_KEYS}
    meta = {key: value for key, value in row.items() if key not in used and value is not None}
    given = row.get("meta")
    meta = given | meta if isinstance(given, dict) else meta | ({} if given is None else {"meta": given})
    return known, converted | ({"meta": meta} if meta else {})


def known_formats() -> str:
    """The keys of all formats on one line, for messages."""
    return "; ".join(" + ".join(known.keys) for known in FORMATS if known not in _JUDGED)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    for source in columns.values():
        if source not in row:
            raise BadRow(f"has no column {source!r}; its columns are {', '.join(map(str, row))}")
    renamed = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    return renamed | {key: row[source] for key, source in columns.items()}
