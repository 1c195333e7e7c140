"""What turns a row of a known format into its canonical form (conversations/formats.py), one function a kind.

Each takes the source row and names of its keys, and raises BadRow with the reason where the row cannot be used.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from conversations.turns import BadRow, Message, check_turns, read_text, read_turn, read_turns, transcript_turns

Row = dict[str, Any]

# GSM8K writes the result behind the reasoning, on a last line of its own.
_GSM8K_RESULT = re.compile(r"^####\s*(.+?)\s*\Z", re.MULTILINE)


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


def conversation(row: Row, key: str) -> Row:
    turns = _with_system(row, read_turns(row[key], key))
    check_turns(turns)
    return {"messages": turns}


def prompt_only(row: Row, key: str) -> Row:
    turns = _prompt(row, key)
    check_turns(turns)
    if turns[-1]["role"] != "user":
        raise BadRow(f"{key} ends in an answer where the user's turn should be the last")
    return {"messages": turns}


def question(row: Row, prompt_key: str, answer_key: str) -> Row:
    return {"messages": _answered(row, prompt_key, answer_key)}


def gsm8k_question(row: Row, prompt_key: str, answer_key: str) -> Row:
    converted = question(row, prompt_key, answer_key)
    result = _GSM8K_RESULT.search(converted["messages"][-1]["content"])
    return converted | ({"reference": result[1]} if result else {})


def alpaca(row: Row, answer_key: str) -> Row:
    instruction, more = (
        read_text(row["instruction"], "instruction"),
        read_text(row.get("input") or "", "input"),
    )
    prompt = f"{instruction}\n{more}" if more.strip() else instruction
    return question(row | {"instruction": prompt}, "instruction", answer_key)


def self_instruct(row: Row) -> Row:
    instances = row["instances"]
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
        raise BadRow("instances must be a list of one {input, output}; write one row for each instance")
    instance = {key: instances[0].get(key) for key in ("input", "output")}
    return alpaca(row | instance, "output")


def esft_test(row: Row) -> Row:
    answers = row["answers"]
    if not isinstance(answers, list) or not answers:
        raise BadRow("answers must be a list with at least one string")
    reference = read_text(answers[0], "answers[0]")
    return question(row | {"answers": reference}, "prompt", "answers") | {"reference": reference}


def pair(row: Row, prompt_key: str) -> Row:
    return _paired(*(_answered(row, prompt_key, key, may_be_empty=True) for key in ("chosen", "rejected")))


def whole_pair(row: Row) -> Row:
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


def judged(row: Row, convert: Callable[[Row], Row], verdict: str) -> Row:
    messages = _ending_in_answer(convert(row)["messages"], "the conversation")
    return {"prompt": messages[:-1], "completion": messages[-1:], verdict: VERDICTS[verdict](row[verdict])}


def _label(value: Any) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise BadRow(f"label must be true or false, not {value!r}")
    return bool(value)


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRow(f"score must be a finite number, not {value!r}")
    return float(value)


def reference_text(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else read_text(value, "reference")


VERDICTS = {"label": _label, "score": _score}
