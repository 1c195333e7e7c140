"""The error of a row that cannot be used, and the reading of its values."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from conversations.row import is_utf8


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, for the person who owns the file."""


def named(value: Any) -> str:
    """A bad value, shortened for a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def read_text(value: Any, what: str) -> str:
    """A string that can be written as UTF-8 and holds no NUL; a number is read as its text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{what} must be a string, not {named(value)}")
    if "\0" in value:
        raise BadRow(f"{what} contains a NUL character")
    if not value.isascii() and not is_utf8(value):
        raise BadRow(f"{what} contains half of a surrogate pair")
    return value


def by_spelling(names: Iterable[str]) -> dict[str, str]:
    """Names by a key that all their spellings share, for `known_name`."""
    return {_letters(name): name for name in names}


def known_name(key: Any, names: Mapping[str, str]) -> str:
    """The known name of which the key is another spelling (lossMask, Loss-Mask for loss_mask); otherwise the key.

    names: of `by_spelling`.
    """
    return names.get(_letters(key), key)


@lru_cache(maxsize=4096)
def _letters(name: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def from_json(text: str, otherwise: Any = None) -> Any:
    """The value that JSON text holds (a list in a CSV file, say); `otherwise` where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also thousands of digits or brackets
        return otherwise
