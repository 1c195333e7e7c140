"""The rule `ifeval`: whether an answer follows its prompt's verifiable instructions (Zhou et al. 2023)."""

import inspect
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from conversations.answers.instructions import ARGUMENTS, INSTRUCTIONS
from conversations.answers.verdict import Verdict
from conversations.errors import ToolkitError

FORM = "{instruction_id_list, kwargs}, as in a row of IFEval"


class Instruction(NamedTuple):
    """One instruction with its arguments."""

    name: str
    arguments: Mapping[str, Any]


def ifeval(completion: str, reference: Any, *, loose: bool = False, partial: bool = False) -> Verdict:
    """Whether the answer follows all instructions of the reference.

    Args:
        reference: an unmodified row of IFEval (FORM), or its JSON.
        loose: an instruction also counts as followed if it is after removing the answer's first line, last line or
            both ("Sure, here it is:"), or its asterisks (Markdown).
        partial: the score is the share of instructions followed (the paper's instruction-level accuracy), not 0 or 1
            (prompt-level).

    Raises:
        ToolkitError: the reference does not have this form.
    """
    instructions = ifeval_reference(reference)
    texts = list(_loose_variants(completion)) if loose else [completion]
    missed = [
        instruction.name for instruction in instructions if not any(_follows(text, instruction) for text in texts)
    ]
    followed = len(instructions) - len(missed)
    reason = f"follows {followed} of {len(instructions)} instructions"
    if not missed:
        return Verdict(1.0, reason)
    return Verdict(followed / len(instructions) if partial else 0.0, f"{reason}, not {', '.join(missed)}")


def _follows(text: str, instruction: Instruction) -> bool:
    """Whether the text follows an instruction; an empty one follows none."""
    return bool(text.strip()) and INSTRUCTIONS[instruction.name](text, **instruction.arguments)


def _loose_variants(text: str) -> Iterator[str]:
    lines = text.split("\n")
    for kept_lines in (lines, lines[1:], lines[:-1], lines[1:-1]):
        stripped = "\n".join(kept_lines).strip()
        yield from (stripped, stripped.replace("*", ""))


def ifeval_reference(reference: Any) -> tuple[Instruction, ...]:
    """The instructions of a row. Raises ToolkitError if it has none that can be checked."""
    if isinstance(reference, str):
        return _instructions(reference)
    try:
        text = json.dumps(reference, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ToolkitError(f"a reference for the rule ifeval must be {FORM}: {error}") from error
    return _instructions(text)


@lru_cache(maxsize=4096)
def _instructions(text: str) -> tuple[Instruction, ...]:
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
    return tuple(map(_instruction, names, arguments))


def _instruction(name: Any, arguments: Any) -> Instruction:
    """One instruction. In tables each has a column for every argument of all of them, null where it does not apply."""
    if name not in list(INSTRUCTIONS):
        near = get_close_matches(str(name), list(INSTRUCTIONS), 1)
        hint = f" (did you mean {near[0]!r}?)" if near else f"; its instructions are {', '.join(INSTRUCTIONS)}"
        raise ToolkitError(f"IFEval has no instruction {name!r}{hint}")
    if not isinstance(arguments or {}, dict):
        raise ToolkitError(f"kwargs of {name} must be an object, not {arguments!r:.60}")
    present = {key: _integer_if_whole(value) for key, value in (arguments or {}).items() if value is not None}
    needed = dict(list(inspect.signature(INSTRUCTIONS[name]).parameters.items())[1:])
    if set(present) != set(needed):
        raise ToolkitError(f"kwargs of {name} must be {{{', '.join(needed)}}}, not {{{', '.join(present)}}}")
    for key, parameter in needed.items():
        requirement, fits = ARGUMENTS[parameter.annotation]
        if not fits(present[key]):
            raise ToolkitError(f"{key} of {name} must be {requirement}, not {present[key]!r:.60}")
    return Instruction(name, present)


def _integer_if_whole(value: Any) -> Any:
    """Undoes a table's conversion: a column of integers and nulls is stored as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
