"""Patterns of an adapter's config, which PEFT matches against the name of every module: none may take for ever.

Python's regular expressions backtrack: `(.*)+x` takes time that doubles with each letter of a name, each further `.*`
another factor of its length, and alternatives multiply. Real configs name layers and projections, which costs little.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ModelError

LONGEST = 1000  # characters of a pattern
MOST_STEPS = 1_000_000  # of matching it against one name: some hundredths of a second
MOST = 10_000  # patterns in a field
_NAME_LENGTH = 50  # characters of a module's name that one repeat may take

_DIGITS = re.compile(r"(?:\\d|\[0-9\])[*+]")  # a name has few
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP = re.compile(r"\([^()]*\)")
_REPEAT = re.compile(r"[*+{]|(?<![*+?}(])\?")
_FIELDS = (
    "target_modules", "exclude_modules", "layers_pattern", "target_parameters", "modules_to_save", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip


def check_patterns(config: Mapping[str, Any], where: str) -> None:
    """Refuse patterns of an adapter's config that could take for ever.

    Raises:
        ModelError: as `pattern_fault` says, or too many of them.
    """
    for field in _FIELDS:
        for pattern in _patterns(config.get(field), f"{where}: {field}"):
            if fault := pattern_fault(pattern):
                shown = pattern if len(pattern) <= 60 else f"{pattern[:57]}..."
                raise ModelError(f"{where}: {field}: {shown!r} {fault}")


def pattern_fault(pattern: str) -> str | None:
    """What is wrong with a pattern; None when matching it takes little time."""
    if len(pattern) > LONGEST:
        return f"has {len(pattern):,} characters; a pattern has at most {LONGEST:,}"
    bare = _ONE_CHARACTER.sub("c", _DIGITS.sub("d", pattern))
    if re.search(r"\)[*+{]", bare):
        return "repeats a group, which can take for ever; write the repeat without a group"
    if _steps(bare) > MOST_STEPS:
        return f"can take over {MOST_STEPS:,} steps a name, the most that is allowed; use fewer repeats such as .*"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({error})"
    return None


def _steps(bare: str) -> int:
    """About how often a match may start again: letters to the power of repeats, times the alternatives of groups."""
    steps = _NAME_LENGTH ** len(_REPEAT.findall(bare))
    while group := _GROUP.search(bare):
        steps *= group[0].count("|") + 1
        bare = f"{bare[: group.start()]}g{bare[group.end() :]}"
    return steps * (bare.count("|") + 1)


def _patterns(value: Any, name: str) -> Iterator[str]:
    found = [value] if isinstance(value, str) else list(value) if isinstance(value, list | Mapping) else []
    if len(found) > MOST:
        raise ModelError(f"{name} has {len(found):,} entries; at most {MOST:,} are read")
    yield from (pattern for pattern in found if isinstance(pattern, str))
