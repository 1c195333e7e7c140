"""What turns a row of a known format into its canonical form (conversations/formats.py), one function a kind.

Each takes the source row and names of its keys, and raises BadRow with the reason where the row cannot be used.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from conversations.badrow import BadRow, named, read_text
from conversations.tools import tools_text
from conversations.turns import Message, check_turns, read_turn, read_turns, transcript_turns

Row = dict[str, Any]

# GSM8K writes the result behind the reasoning, on a last line of its own.
_GSM8K_RESULT = re.compile(r"^####\s*(.+?)\s*\Z", re.MULTILINE)


_LABELS = {"true": True, "1": True, "false": False, "0": False}


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
    """The turns behind the row's own system text and tools."""
    system = read_text(row.get("system") or "", "system")
    tools = tools_text(row["tools"]) if row.get("tools") not in (None, "", [], "[]") else ""
    if tools and not system.strip() and turns and turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    words = "\n\n".join(part for part in (system, tools) if part.strip())
    return [{"role": "system", "content": words}, *turns] if words else turns


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
    transcript = transcript_turns(row[key]) if isinstance(row[key], str) else None
    turns = _with_system(row, transcript or read_turns(row[key], key))
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
    return question(_instruction(row), "instruction", answer_key)


def _instruction(row: Row) -> Row:
    """`instruction` with its `input` on a line of its own, as turns behind those of `history`."""
    parts = read_text(row["instruction"], "instruction"), read_text(row.get("input") or "", "input")
    prompt = "\n".join(parts) if parts[1].strip() else parts[0]
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow(f"history must be a list of [question, answer], not {named(history)}")
    turns = [turn for asked, said in history for turn in (_said("user", asked), _said("assistant", said))]
    return row | {"instruction": [*turns, _said("user", prompt)] if turns else prompt}


def _said(role: str, words: Any) -> Message:
    return {"role": role, "content": read_text(words, f"history ({role})")}


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


def plain_text(row: Row) -> Row:
    text = read_text(row["text"], "text")
    if not text.strip():
        raise BadRow("text is empty")
    return {"text": text}


def mt_bench(row: Row) -> Row:
    """The first of MT-Bench's turns and its reference answer; all turns stay in meta."""
    turns, references = row["turns"], row.get("reference") or []
    if not isinstance(turns, list) or not turns or not isinstance(references, list):
        raise BadRow("turns must be a list of questions, and reference a list of answers")
    first = {"reference": read_text(references[0], "reference[0]")} if references else {}
    meta = {"question_id": row["question_id"], "turns": turns} | ({"references": references} if references else {})
    return prompt_only({"prompt": turns[0]}, "prompt") | first | {"meta": meta}


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


def ranked(row: Row, prompt_key: str, outputs: tuple[str, str], verdict: str, base: int) -> Row:
    """A pair whose better side is told by a number: `base` for the first output, base + 1 for the second."""
    value = str(row[verdict])
    if value not in (str(base), str(base + 1)):
        raise BadRow(f"{verdict} must be {base} or {base + 1}, the number of the better answer, not {row[verdict]!r}")
    chosen, rejected = outputs if value == str(base) else outputs[::-1]
    row = _instruction(row) if prompt_key == "instruction" else row
    return pair(row | {"chosen": row[chosen], "rejected": row[rejected]}, prompt_key)


def judged(row: Row, convert: Callable[[Row], Row], verdict: str) -> Row:
    converted = convert(row)
    messages = _ending_in_answer(converted.pop("messages"), "the conversation")
    judgement = {"prompt": messages[:-1], "completion": messages[-1:], verdict: VERDICTS[verdict](row[verdict])}
    return converted | judgement  # a reference, if there is one


def _label(value: Any) -> bool:
    label = _LABELS.get(str(value).lower()) if isinstance(value, (bool, int, str)) else None
    if label is None:
        raise BadRow(f"label must be true or false, not {value!r}")
    return label


def _score(value: Any) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)  # a CSV file's numbers are strings
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise BadRow(f"score must be a finite number, not {value!r}")
    return score


def reference_text(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else read_text(value, "reference")


VERDICTS = {"label": _label, "score": _score}
