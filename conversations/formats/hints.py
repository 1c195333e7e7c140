"""Hints for the owner of a file whose rows fit no known format: which columns to map, as a guess that was tried."""

import re
from collections.abc import Mapping
from typing import Any

from conversations.formats.bad_row import BadRow
from conversations.formats.conversions import MORE
from conversations.formats.table import COMMON_KEYS, FORMATS, JUDGED_FORMATS, OTHER_NAMES, recognise, renamed
from conversations.formats.turn_reading import ROLE_KEYS
from conversations.row import Row

# Our key -> words that the names of such columns often end in.
_LIKELY = {
    "prompt": {"prompt", "question", "query", "instruction", "request", "problem", "body", "input", "user"},
    "response": {"response", "answer", "reply", "completion", "output", "solution", "assistant", "target"},
}
# Further text columns, tried once a question has been guessed.
_LIKELY_MORE = {
    "system": {"system", "persona", "sys"},
    "context": {"context", "passage", "document", "article", "background", "paragraph"},
}


def mapping_hint(columns: Mapping[str, str], row: Row) -> str:
    """For a row of no known format. columns: the mapping that would give it one; empty if no guess is likely."""
    unread_names = ", ".join(str(name) for name in row if name not in columns.values())
    unread = f" (not reading: {unread_names})" if unread_names else ""
    how = f"for example columns: {{{_listed(columns)}}}{unread}" if columns else "columns: {known key: your key}"
    return f"Map the columns in the recipe: {how}. Known keys: {_known_formats()}"


def plain_hint(columns: Mapping[str, str]) -> str:
    """For rows with a verdict. columns: the result of `plain_columns`."""
    purpose = "To train on such rows as plain conversations (for a pair: on its chosen answer)"
    return f"{purpose}, map the columns in the recipe: columns: {{{_listed(columns)}}}"


def _listed(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{key}: {name}" for key, name in columns.items())


def plain_columns(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    """The `columns` that make a row with a verdict a conversation without one; empty for any other row.

    columns: the mapping under which it has the verdict.
    """
    try:
        format = recognise(renamed(row, columns))
    except BadRow:  # without one of these columns
        return {}
    if format is None or not format.plain:
        return {}
    other_columns = {key: name for key, name in columns.items() if key not in format.plain.values()}
    return other_columns | {
        key: columns.get(name, name) for key, name in format.plain.items() if columns.get(name, name) != key
    }


def _known_formats() -> str:
    """The keys of the formats on one line."""
    lasts: dict[tuple[str, ...], list[str]] = {}  # the first keys -> the last ones
    for format in FORMATS:
        if format not in JUDGED_FORMATS:
            lasts.setdefault(format.keys[:-1], []).append(format.keys[-1])
    return "; ".join(" + ".join(filter(None, (*first, " or ".join(last)))) for first, last in lasts.items())


def likely_columns(row: Row) -> dict[str, str]:
    """A guess at `columns` for a row of no known format, from the names of its columns; may be empty."""
    turns = [str(name) for name, value in row.items() if isinstance(value, list) and _has_roles(value)]
    if turns:
        return {"messages": turns[0]} if len(turns) == 1 else {}
    columns: dict[str, str] = {}
    for key, words in _LIKELY.items():
        names = [name for name in _columns_of_text(row) if name not in columns.values()]
        names = [name for name in names if "system" not in _words(name)]
        near = [name for name in names if _words(name)[-1] in words]
        near += [name for name in names if key == "prompt" and not words.isdisjoint(_words(name))]
        columns |= {key: near[0]} if near else {}
    if "prompt" not in columns:
        return {}
    for key, words in _LIKELY_MORE.items():
        names = [
            name for name in _columns_of_text(row) if name not in (*columns.values(), *COMMON_KEYS, *MORE, *OTHER_NAMES)
        ]
        near = [name for name in names if not words.isdisjoint(_words(name))]
        columns |= {key: near[0]} if near and key not in row else {}
    return columns


def _columns_of_text(row: Row) -> list[str]:
    return [
        str(name) for name, value in row.items() if isinstance(value, (str, int, float)) and not isinstance(value, bool)
    ]


def _has_roles(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(turn, dict) and any(key in turn for key in ROLE_KEYS) for turn in value)


def _words(name: str) -> list[str]:
    """user_question, userQuestion, "User question" -> user, question."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) or [""]
