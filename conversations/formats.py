"""The known formats of rows, as a table, and what turns a row into its canonical form.

Canonical rows (`Row`) have one of these sets of keys:

    messages                     a conversation; a prompt where it ends in a user turn
    prompt, chosen, rejected     a preference pair; all three are lists of messages
    prompt, completion, label    a judged answer (true or false), both lists of messages
    prompt, completion, score    a scored answer (a number)

and, where the source has them, `reference` (the answer that a verifier compares with) and `meta` (a dict of
all the source's other keys).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from conversations.turns import (
    BadRow,
    Message,
    check_turns,
    read_text,
    read_turn,
    read_turns,
    transcript_turns,
)

Row = dict[str, Any]

# Keys that every format may have beside its own.
_COMMON_KEYS = ("system", "reference", "meta")

# GSM8K writes the result behind the reasoning, on a last line of its own.
_GSM8K_RESULT = re.compile(r"^####\s*(.+?)\s*\Z", re.MULTILINE)


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


# --- Parts of a row


def _prompt(row: Row, key: str) -> list[Message]:
    """The turns before the answer: one string (of the user, or a transcript) or a list of turns."""
    value = row[key]
    if not isinstance(value, str):
        turns = read_turns(value, key)
    else:
        turns = _transcript_prompt(read_text(value, key)) or [{"role": "user", "content": value}]
    return _with_system(row, turns)


def _transcript_prompt(text: str) -> list[Message] | None:
    """The turns of a transcript that ends in "Assistant:", for an answer to follow; None for other text."""
    turns = transcript_turns(text)
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else None


def _with_system(row: Row, turns: list[Message]) -> list[Message]:
    system = read_text(row.get("system") or "", "system")
    return [{"role": "system", "content": system}, *turns] if system.strip() else turns


def _answer(row: Row, key: str) -> list[Message]:
    """An answer: a string, one turn, or a list of turns (which may begin with the prompt's)."""
    value = row[key]
    if isinstance(value, str):
        return [{"role": "assistant", "content": read_text(value, key)}]
    return [read_turn(value, key)] if isinstance(value, dict) else read_turns(value, key)


def _answered(row: Row, prompt_key: str, key: str, *, may_be_empty: bool = False) -> list[Message]:
    """Prompt and answer as one conversation that ends in the answer."""
    prompt, answer = _prompt(row, prompt_key), _answer(row, key)
    if isinstance(row[prompt_key], str) and _transcript_prompt(row[prompt_key]):
        answer = [turn | {"content": turn["content"].strip()} for turn in answer]  # as in the transcript
    if answer and answer[0]["role"] != "assistant":
        answer = _with_system(row, answer)
        if answer[: len(prompt)] != prompt:
            raise BadRow(f"{key} does not begin with the turns of {prompt_key}")
        turns = answer
    else:
        turns = prompt + answer
    return _ending_in_answer(turns, key, may_be_empty=may_be_empty)


def _ending_in_answer(turns: list[Message], key: str, *, may_be_empty: bool = False) -> list[Message]:
    check_turns(turns, empty_last=may_be_empty)
    if turns[-1]["role"] != "assistant":
        raise BadRow(f"{key} does not end in an answer of the assistant")
    return turns


# --- Rows, by kind


def _conversation(row: Row, key: str) -> Row:
    turns = _with_system(row, read_turns(row[key], key))
    check_turns(turns)
    return {"messages": turns}


def _prompt_only(row: Row, key: str) -> Row:
    turns = _prompt(row, key)
    check_turns(turns)
    if turns[-1]["role"] != "user":
        raise BadRow(f"{key} ends in an answer where the user's turn should be the last")
    return {"messages": turns}


def _question(row: Row, prompt_key: str, answer_key: str) -> Row:
    return {"messages": _answered(row, prompt_key, answer_key)}


def _gsm8k_question(row: Row, prompt_key: str, answer_key: str) -> Row:
    converted = _question(row, prompt_key, answer_key)
    result = _GSM8K_RESULT.search(converted["messages"][-1]["content"])
    return converted | ({"reference": result[1]} if result else {})


def _alpaca(row: Row, answer_key: str) -> Row:
    instruction, more = (
        read_text(row["instruction"], "instruction"),
        read_text(row.get("input") or "", "input"),
    )
    prompt = f"{instruction}\n{more}" if more.strip() else instruction
    return _question(row | {"instruction": prompt}, "instruction", answer_key)


def _self_instruct(row: Row) -> Row:
    instances = row["instances"]
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
        raise BadRow("instances must be a list of one {input, output}; write one row for each instance")
    instance = {key: instances[0].get(key) for key in ("input", "output")}
    return _alpaca(row | instance, "output")


def _esft_test(row: Row) -> Row:
    answers = row["answers"]
    if not isinstance(answers, list) or not answers:
        raise BadRow("answers must be a list with at least one string")
    reference = read_text(answers[0], "answers[0]")
    return _question(row | {"answers": reference}, "prompt", "answers") | {"reference": reference}


def _pair(row: Row, prompt_key: str) -> Row:
    return _paired(*(_answered(row, prompt_key, key, may_be_empty=True) for key in ("chosen", "rejected")))


def _whole_pair(row: Row) -> Row:
    """chosen and rejected hold the whole conversation each, as a transcript or as turns."""
    return _paired(*(_whole(row, key) for key in ("chosen", "rejected")))


def _whole(row: Row, key: str) -> list[Message]:
    turns = transcript_turns(read_text(row[key], key)) if isinstance(row[key], str) else _answer(row, key)
    if turns is None:
        raise BadRow(f'{key} is a string without a prompt, and no "\\n\\nHuman: ... \\n\\nAssistant: ..." transcript')
    return _ending_in_answer(_with_system(row, turns), key, may_be_empty=True)


def _paired(chosen: list[Message], rejected: list[Message]) -> Row:
    """One side may be an empty answer, since the judges saw the model say nothing."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected do not answer the same prompt")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _judged(row: Row, convert: Callable[[Row], Row], verdict: str) -> Row:
    messages = _ending_in_answer(convert(row)["messages"], "the conversation")
    return {"prompt": messages[:-1], "completion": messages[-1:], verdict: _VERDICTS[verdict](row[verdict])}


def _label(value: Any) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise BadRow(f"label must be true or false, not {value!r}")
    return bool(value)


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRow(f"score must be a finite number, not {value!r}")
    return float(value)


def _reference(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else read_text(value, "reference")


_VERDICTS = {"label": _label, "score": _score}


# --- The table

_PAIRS = (
    *(
        Format(f"preference pairs with {key}", (key, "chosen", "rejected"), partial(_pair, prompt_key=key))
        for key in ("prompt", "conversations", "messages", "question")
    ),
    Format("preference pairs", ("chosen", "rejected"), _whole_pair),
)

_ANSWERED = (
    Format("messages", ("messages",), partial(_conversation, key="messages")),
    Format("ShareGPT", ("conversations",), partial(_conversation, key="conversations")),
    *(
        Format(f"instruction/{key}", ("instruction", key), partial(_alpaca, answer_key=key), ("input",))
        for key in ("output", "response")
    ),
    Format(
        "question/answer",
        ("question", "answer"),
        partial(_gsm8k_question, prompt_key="question", answer_key="answer"),
    ),
    *(
        Format(f"prompt/{key}", ("prompt", key), partial(_question, prompt_key="prompt", answer_key=key))
        for key in ("completion", "response", "answer", "canonical_solution")
    ),
)

_JUDGED = tuple(
    Format(
        f"{source.name} with {verdict}",
        (*source.keys, verdict),
        partial(_judged, convert=source.convert, verdict=verdict),
        source.optional,
    )
    for source in _ANSWERED
    for verdict in _VERDICTS
)

# Longer sets of keys stand before the shorter ones that they contain.
FORMATS: tuple[Format, ...] = (
    *_PAIRS,
    *_JUDGED,
    Format("Self-Instruct tasks", ("instruction", "instances"), _self_instruct),
    *_ANSWERED,
    Format("ESFT test prompts", ("prompt", "answers"), _esft_test),
    Format("prompts", ("prompt",), partial(_prompt_only, key="prompt")),
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
        converted["reference"] = _reference(row["reference"])
    used = {*known.keys, *known.optional, *_COMMON_KEYS}
    meta = {key: value for key, value in row.items() if key not in used and value is not None}
    given = row.get("meta")
    meta = given | meta if isinstance(given, dict) else meta | ({} if given is None else {"meta": given})
    return known, converted | ({"meta": meta} if meta else {})


def known_formats() -> str:
    """The keys of all formats on one line, for messages."""
    return "; ".join(" + ".join(known.keys) for known in FORMATS if known not in _JUDGED)


def prompt_of(row: Row) -> list[Message]:
    """The prompt of any canonical row: what stands before the (last) answer."""
    if "prompt" in row:
        return row["prompt"]
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    for source in columns.values():
        if source not in row:
            raise BadRow(f"has no column {source!r}; its columns are {', '.join(map(str, row))}")
    renamed = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    return renamed | {key: row[source] for key, source in columns.items()}
