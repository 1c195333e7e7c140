"""The rule `ifeval`: does an answer follow its prompt's verifiable instructions (Zhou et al. 2023)?"""

import inspect
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from conversations.answers.instructions import ARGUMENTS, INSTRUCTIONS
from conversations.answers.verdict import Verdict
from conversations.errors import ToolkitError

FORM = "{instruction_id_list, kwargs}, as a row of IFEval has them"


class Asked(NamedTuple):
    """One instruction with its arguments."""

    name: str
    arguments: Mapping[str, Any]


def ifeval(completion: str, reference: Any, *, loose: bool = False, partial: bool = False) -> Verdict:
    """Whether the answer follows all instructions of the reference.

    Args:
        reference: a row of IFEval, as it is (FORM), or its JSON.
        loose: an instruction is followed as well if it is without the answer's first or last line or both ("Sure, here
            it is:"), or without its asterisks (Markdown's).
        partial: the score is the share of the instructions that are followed (the paper's accuracy by instruction), not
            0 or 1 (by prompt).

    Raises:
        ToolkitError: a reference of no such form.
    """
    asked = ifeval_reference(reference)
    texts = list(_loosely(completion)) if loose else [completion]
    missed = [one.name for one in asked if not any(_follows(text, one) for text in texts)]
    followed = len(asked) - len(missed)
    reason = f"follows {followed} of {len(asked)} instructions"
    if not missed:
        return Verdict(1.0, reason)
    return Verdict(followed / len(asked) if partial else 0.0, f"{reason}, not {', '.join(missed)}")


def _follows(text: str, asked: Asked) -> bool:
    """An answer without words follows nothing."""
    return bool(text.strip()) and INSTRUCTIONS[asked.name](text, **asked.arguments)


def _loosely(text: str) -> Iterator[str]:
    lines = text.split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        whole = "\n".join(part).strip()
        yield from (whole, whole.replace("*", ""))


def ifeval_reference(reference: Any) -> tuple[Asked, ...]:
    """The instructions of a row. Raises ToolkitError where it has none that can be checked."""
    if isinstance(reference, str):
        return _read(reference)
    try:
        return _read(json.dumps(reference, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ToolkitError(f"a reference for the rule ifeval must be {FORM}: {error}") from error


@lru_cache(maxsize=4096)
def _read(text: str) -> tuple[Asked, ...]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    names = row.get("instruction_id_list") if isinstance(row, dict) else None
    if not isinstance(names, list) or not names or not isinstance(row, dict):
        raise ToolkitError(f"a reference for the rule ifeval must be {FORM}, not {text[:60]!r}")
    arguments = row.get("kwargs") or [{}] * len(names)
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise ToolkitError(f"kwargs of a reference must be a list with an object for each of {len(names)} instructions")
    return tuple(map(_asked, names, arguments))


def _asked(name: Any, arguments: Any) -> Asked:
    """Tables give every instruction the arguments of all, null where it has none."""
    if name not in list(INSTRUCTIONS):
        near = get_close_matches(str(name), list(INSTRUCTIONS), 1)
        hint = f" (did you mean {near[0]!r}?)" if near else f"; they are {', '.join(INSTRUCTIONS)}"
        raise ToolkitError(f"no such instruction of IFEval: {name!r}{hint}")
    if not isinstance(arguments or {}, dict):
        raise ToolkitError(f"kwargs of {name} must be an object, not {arguments!r:.60}")
    given = {key: _whole(value) for key, value in (arguments or {}).items() if value is not None}
    needed = dict(list(inspect.signature(INSTRUCTIONS[name]).parameters.items())[1:])
    if set(given) != set(needed):
        raise ToolkitError(f"kwargs of {name} must be {{{', '.join(needed)}}}, not {{{', '.join(given)}}}")
    for key, parameter in needed.items():
        what, fits = ARGUMENTS[parameter.annotation]
        if not fits(given[key]):
            raise ToolkitError(f"{key} of {name} must be {what}, not {given[key]!r:.60}")
    return Asked(name, given)


def _whole(value: Any) -> Any:
    """A column of a table with numbers and nulls holds floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
