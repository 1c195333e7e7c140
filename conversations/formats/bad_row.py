"""The error for a row that cannot be used, and readers of single values."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from conversations.row import is_utf8


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, addressed to the owner of the file."""


def quoted(value: Any) -> str:
    """The repr of a bad value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_text(value: Any, label: str) -> str:
    """A string that can be encoded as UTF-8 and contains no NUL; a number is converted to text. label: for messages."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{label} must be a string, not {quoted(value)}")
    if "\0" in value:
        raise BadRow(f"{label} contains a NUL character")
    if not value.isascii() and not is_utf8(value):
        raise BadRow(f"{label} contains half of a surrogate pair")
    return value


def by_spelling(names: Iterable[str]) -> dict[str, str]:
    """{key that all spellings of a name share: name}, for `known_name`."""
    return {_letters(name): name for name in names}


def known_name(key: Any, names: Mapping[str, str]) -> str:
    """The known name that the key spells differently (lossMask, Loss-Mask for loss_mask); otherwise the key itself.

    names: the result of `by_spelling`.
    """
    return names.get(_letters(key), key)


@lru_cache(maxsize=4096)
def _letters(name: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def from_json(text: str, otherwise: Any = None) -> Any:
    """The value of JSON text (such as a list in a CSV file); `otherwise` if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # RecursionError and ValueError also for thousands of brackets or digits
        return otherwise
