"""The known formats of rows, as a table, and a row's way from one of them to its canonical form.

Canonical rows (`Row`) have one of these sets of keys:

    messages                     a conversation; a prompt where it ends in a user turn
    prompt, chosen, rejected     a preference pair; all three are lists of messages
    prompt, completion, label    a judged answer (true or false), both lists of messages
    prompt, completion, score    a scored answer (a number)
    text                         plain text, for language modelling

and, where the source has them, `reference` (the answer that a verifier compares with) and `meta` (a dict of
all the source's other keys).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from conversations.badrow import BadRow
from conversations.conversions import (
    VERDICTS,
    Row,
    alpaca,
    conversation,
    esft_test,
    gsm8k_question,
    judged,
    mt_bench,
    pair,
    plain_text,
    prompt_only,
    question,
    ranked,
    reference_text,
    self_instruct,
    whole_pair,
)

# Keys that every format may have beside its own.
_COMMON_KEYS = ("system", "tools", "reference", "meta")

# Our key -> words that columns for it often end in.
_LIKELY = {
    "prompt": {"prompt", "question", "query", "instruction", "request", "problem", "body", "input", "user"},
    "response": {"response", "answer", "reply", "completion", "output", "solution", "assistant", "target"},
}


class UnknownFormat(BadRow):
    """A row whose keys fit no known format."""


@dataclass(frozen=True)
class Format:
    """A format is recognised by its keys: a row has the first entry of FORMATS whose keys it has.

    name: as it is told to the user. keys: all are there, and not null. convert: source row -> canonical row.
    optional: further keys that `convert` reads; what else a row has goes to `meta`. plain: `columns` that make such a
    row, which holds a verdict, a conversation without one.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row], Row]
    optional: tuple[str, ...] = ()
    plain: Mapping[str, str] = field(default_factory=dict)


# --- The table

_ALPACA = ("input", "history")

# (the two outputs, who says which is better, the number of the first): LLMBar and AlpacaFarm; PKU-SafeRLHF.
_RANKINGS = (
    (("output_1", "output_2"), ("label", "preference"), 1),
    (("response_0", "response_1"), ("better_response_id", "safer_response_id"), 0),
)

_RANKED = tuple(
    Format(
        f"ranked pairs ({verdict})",
        (prompt_key, *outputs, verdict),
        partial(ranked, prompt_key=prompt_key, outputs=outputs, verdict=verdict, base=base),
        _ALPACA if prompt_key == "instruction" else (),
    )
    for outputs, verdicts, base in _RANKINGS
    for verdict in verdicts
    for prompt_key in ("instruction", "prompt", "input", "question")
)

_PAIRS = (
    *(
        Format(
            f"preference pairs with {key}",
            (key, "chosen", "rejected"),
            partial(pair, prompt_key=key),
            plain={"prompt": key, "completion": "chosen"},
        )
        for key in ("prompt", "conversations", "messages", "question")
    ),
    Format("preference pairs", ("chosen", "rejected"), whole_pair, plain={"messages": "chosen"}),
)

_ANSWERED = (
    Format("messages", ("messages",), partial(conversation, key="messages")),
    Format("ShareGPT", ("conversations",), partial(conversation, key="conversations")),
    *(
        Format(f"instruction/{key}", ("instruction", key), partial(alpaca, answer_key=key), _ALPACA)
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
        {"verdict": verdict},
    )
    for source in _ANSWERED
    for verdict in VERDICTS
)

# Longer sets of keys stand before the shorter ones that they contain.
FORMATS: tuple[Format, ...] = (
    *_PAIRS,
    *_RANKED,
    *_JUDGED,
    Format("Self-Instruct tasks", ("instruction", "instances"), self_instruct),
    *_ANSWERED,
    Format("ESFT test prompts", ("prompt", "answers"), esft_test),
    Format("prompts", ("prompt",), partial(prompt_only, key="prompt")),
    Format("MT-Bench questions (the first turn)", ("question_id", "turns"), mt_bench, ("reference",)),
    Format("plain text", ("text",), plain_text),
)


# --- What the reader calls


def recognise(row: Mapping[str, Any]) -> Format | None:
    """The format of a source row, by its keys; a key whose value is null counts as absent."""
    return _with_keys(frozenset(key for key, value in row.items() if value is not None))


@lru_cache(maxsize=1024)
def _with_keys(present: frozenset[str]) -> Format | None:
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
    if row.get("reference") not in (None, "") and "reference" not in known.optional:
        converted["reference"] = reference_text(row["reference"])
    used = {*known.keys, *known.optional, *_COMMON_KEYS}
    meta = converted.pop("meta", {})
    meta |= {key: value for key, value in row.items() if key not in used and value is not None}
    given = row.get("meta")
    meta = given | meta if isinstance(given, dict) else meta | ({} if given is None else {"meta": given})
    return known, converted | ({"meta": meta} if meta else {})


def plain_columns(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    """The `columns` under which a row with a verdict is a conversation without one; empty for any other row.

    columns: those under which it has the verdict.
    """
    known = recognise(_renamed(row, columns))
    if known is None or not known.plain:
        return {}
    kept = {key: name for key, name in columns.items() if key not in known.plain.values()}
    return kept | {key: columns.get(name, name) for key, name in known.plain.items() if columns.get(name, name) != key}


def known_formats() -> str:
    """The keys of the formats on one line, for messages."""
    told = [known for known in FORMATS if known not in (*_JUDGED, *_RANKED[1:])]
    return "; ".join(" + ".join(known.keys) for known in told)


def likely_columns(row: Row) -> dict[str, str]:
    """A guess at `columns` for a row of no known format, from the names of its strings; may be empty."""
    found: dict[str, str] = {}
    for key, words in _LIKELY.items():
        names = [name for name, value in row.items() if isinstance(value, str) and name not in found.values()]
        names = [name for name in names if "system" not in _words(name)]
        near = [name for name in names if _words(name)[-1] in words]
        near += [name for name in names if key == "prompt" and not words.isdisjoint(_words(name))]
        found |= {key: near[0]} if near else {}
    return found if "prompt" in found else {}


def _words(name: str) -> list[str]:
    """user_question, userQuestion, "User question" -> user, question."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) or [""]


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    for source in columns.values():
        if source not in row:
            raise BadRow(f"has no column {source!r}; its columns are {', '.join(map(str, row))}")
    renamed = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    return renamed | {key: row[source] for key, source in columns.items()}
