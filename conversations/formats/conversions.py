"""Converts rows of known formats to canonical rows (conversations/row.py), one function per kind.

Each takes the source row, whose columns of turns have already been read into lists of Turn, and the names of its keys.
It raises BadRow with the reason if the row cannot be used.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from conversations.formats.bad_row import BadRow, from_json, quoted, read_text
from conversations.formats.tools import calls_text, tools_text
from conversations.formats.turns import Turn, as_messages, check_turns, transcript_turns
from conversations.row import RANKED, Row, without_nulls

# GSM8K writes the result on its own last line, after the reasoning.
_GSM8K_RESULT = re.compile(r"^####\s*(.+?)\s*\Z", re.MULTILINE)

# Columns that continue a question: Alpaca's and Dolly's.
MORE = ("input", "context")

_LARGEST = 3.4e38  # of float32

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


# --- Parts of a row


def _prompt(row: Row, key: str) -> list[Turn]:
    """The turns before the answer: the history, then one text (the user's, or a transcript) or a list of turns."""
    value = row[key]
    more = [name for name in MORE if name != key and row.get(name) not in (None, "", [])]
    turns = value if isinstance(value, list) else _transcript_prompt(read_text(value, key))
    if turns is None:
        text = "\n".join([read_text(value, key), *(read_text(row[name], name) for name in more)])
        turns = [Turn("user", text, where=key)]
    elif more:
        raise BadRow(f"{more[0]} cannot be appended to {key}, which has several turns: put its text into one of them")
    return _with_system(row, [*_history(row), *turns])


def _transcript_prompt(text: str) -> list[Turn] | None:
    """The turns of a transcript that ends in "Assistant:", for an answer to follow; None for other text."""
    turns = transcript_turns(text)
    return turns[:-1] if turns and turns[-1] == Turn("assistant", "") else None


def _history(row: Row) -> list[Turn]:
    """Earlier exchanges: a list of [question, answer] (ms-swift, LLaMA-Factory; also as JSON text), or of turns."""
    value = row.get("history") or []
    if isinstance(value, str):
        value = from_json(value, otherwise=value)
    if isinstance(value, list) and value and isinstance(value[0], Turn):
        return value
    if not isinstance(value, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise BadRow(f"history must be a list of [question, answer], not {quoted(value)}")
    return [
        Turn(role, read_text(words, f"history ({role})"), where=f"history[{number}]")
        for number, pair in enumerate(value)
        for role, words in zip(("user", "assistant"), pair, strict=True)
    ]


def _with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns, with the row's system text and tools as the first one."""
    first = turns[0] if turns and turns[0].role == "system" else None
    system = read_text(row["system"], "system") if row.get("system") else ""
    turn_tools = tools_text(turns[0].tools) if turns and turns[0].tools else ""
    row_tools = tools_text(row["tools"]) if row.get("tools") not in (None, "", [], "[]") else ""
    if turn_tools and row_tools and turn_tools != row_tools:
        raise BadRow("the row and its system turn both define tools, and the definitions differ")
    if first and system.strip() and first.content.strip() != system.strip():
        raise BadRow("the row has a system column and a system turn that differ; keep one of them")
    words = first.content if first else system
    # Hermes: the system message lists the tools already.
    tools = "" if "<tools>" in words else turn_tools or row_tools
    text = "\n\n".join(part for part in (words, tools) if part.strip())
    rest = turns[1:] if first else turns
    if not text:
        return rest
    return [replace(first, content=text, tools=None) if first else Turn("system", text, where="system"), *rest]


def _answer(row: Row, key: str) -> list[Turn]:
    """An answer: one text, or turns (which may start with the prompt's)."""
    value = row[key]
    return value if isinstance(value, list) else [Turn("assistant", read_text(value, key), where=key)]


def _exchange(row: Row, prompt_key: str, key: str, *, may_be_empty: bool = False) -> list[Turn]:
    """The turns of a prompt and its answer."""
    prompt, answer = _prompt(row, prompt_key), _answer(row, key)
    if isinstance(row[prompt_key], str) and _transcript_prompt(row[prompt_key]):
        answer = [replace(turn, content=turn.content.strip()) for turn in answer]  # as in the transcript
    if answer and answer[0].role != "assistant":
        answer = _with_system(row, answer)
        if answer[: len(prompt)] != prompt:
            raise BadRow(f"{key} does not begin with the turns of {prompt_key}")
        turns = answer
    else:
        turns = prompt + answer
    return _ending_in_answer(turns, key, may_be_empty=may_be_empty)


def _ending_in_answer(turns: list[Turn], key: str, *, may_be_empty: bool = False) -> list[Turn]:
    check_turns(turns, empty_last=may_be_empty)
    if turns[-1].role != "assistant":
        raise BadRow(f"{key} does not end with an assistant turn")
    return turns


def _conversation(row: Row, key: str) -> list[Turn]:
    value = row[key]
    turns = transcript_turns(value) if isinstance(value, str) else value
    if not isinstance(turns, list) or (turns and not isinstance(turns[0], Turn)):
        raise BadRow(f"{key} must be a list of turns, not {quoted(value)}")
    return _with_system(row, [*_history(row), *turns])


# --- Rows, by kind


def conversation(row: Row, key: str, *, may_be_empty: bool = False) -> Row:
    turns = _conversation(row, key)
    check_turns(turns, empty_last=may_be_empty)
    return {"messages": as_messages(turns)}


def prompt_only(row: Row, key: str) -> Row:
    turns = _prompt(row, key)
    check_turns(turns)
    if turns[-1].role != "user":
        raise BadRow(f"{key} ends with an assistant turn; the last turn must be the user's")
    return {"messages": as_messages(turns)}


def question(row: Row, prompt_key: str, answer_key: str, *, may_be_empty: bool = False) -> Row:
    return {"messages": as_messages(_exchange(row, prompt_key, answer_key, may_be_empty=may_be_empty))}


def gsm8k_question(row: Row, prompt_key: str, answer_key: str, *, may_be_empty: bool = False) -> Row:
    converted = question(row, prompt_key, answer_key, may_be_empty=may_be_empty)
    result = _GSM8K_RESULT.search(converted["messages"][-1]["content"])
    return converted | ({"reference": result[1]} if result else {})


def self_instruct(row: Row) -> Row:
    instances = row["instances"]
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
        raise BadRow("instances must contain exactly one {input, output}; write one row for each instance")
    instance = {key: instances[0].get(key) for key in ("input", "output")}
    return question(row | instance, "instruction", "output")


def tool_calls(row: Row, prompt_key: str, key: str) -> Row:
    """A question answered with tool calls (xLAM)."""
    words, _ = calls_text(row[key], key)
    return question(row | {key: words}, prompt_key, key)


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
    return prompt_only({"prompt": read_text(turns[0], "turns[0]")}, "prompt") | first | {"meta": meta}


def pair(row: Row, prompt_key: str) -> Row:
    return _paired(*(_exchange(row, prompt_key, key, may_be_empty=True) for key in ("chosen", "rejected")))


def whole_pair(row: Row) -> Row:
    """chosen and rejected each hold a full conversation, as a transcript or as turns."""
    return _paired(*(_full_conversation(row, key) for key in ("chosen", "rejected")))


def right_and_wrong(row: Row) -> Row:
    """A question with lists of right and wrong answers (RewardBench 2)."""
    question_turns, read = _prompt(row, RANKED[0]), {}
    for key in RANKED[1:]:
        if not isinstance(row[key], list) or not row[key]:
            raise BadRow(f"{key} must be a list with at least one answer, not {quoted(row[key])}")
        read[key] = []
        for number, text in enumerate(row[key]):
            turns = [*question_turns, Turn("assistant", read_text(text, f"{key}[{number}]"), where=key)]
            read[key].append(as_messages(_ending_in_answer(turns, key, may_be_empty=True)[-1:]))
    if any(answer in read[RANKED[2]] for answer in read[RANKED[1]]):
        raise BadRow("the same answer is among the right and the wrong ones")
    return {"prompt": as_messages(question_turns), **read}


def swift_pair(row: Row, key: str) -> Row:
    """A conversation, and an alternative to its last answer (ms-swift)."""
    chosen = _ending_in_answer(_conversation(row, key), key, may_be_empty=True)
    return _paired(chosen, [*chosen[:-1], *_answer(row, "rejected_response")])


def swift_answers(row: Row, prompt_key: str, answer_key: str) -> Row:
    """A question with a better and a worse answer (ms-swift)."""
    return pair(row | {"chosen": row[answer_key], "rejected": row["rejected_response"]}, prompt_key)


def _full_conversation(row: Row, key: str) -> list[Turn]:
    value = row[key]
    turns = value if isinstance(value, list) else transcript_turns(read_text(value, key))
    if turns is None:
        raise BadRow(f'{key} is a string without a prompt, not a "\\n\\nHuman: ... \\n\\nAssistant: ..." transcript')
    return _ending_in_answer(_with_system(row, turns), key, may_be_empty=True)


def _paired(chosen: list[Turn], rejected: list[Turn]) -> Row:
    """A preference pair. Either answer may be empty: the model may have said nothing."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected do not answer the same prompt")
    if chosen == rejected:
        raise BadRow("chosen and rejected are identical")
    return {
        "prompt": as_messages(chosen[:-1]),
        "chosen": as_messages(chosen[-1:]),
        "rejected": as_messages(rejected[-1:]),
    }


def ranked(row: Row, prompt_key: str, outputs: tuple[str, str], verdict: str, base: int) -> Row:
    """A pair whose better answer is given by number: `base` for the first output, base + 1 for the second."""
    value = str(row[verdict])
    if value not in (str(base), str(base + 1)):
        raise BadRow(f"{verdict} must be {base} or {base + 1}, the number of the better answer, not {row[verdict]!r}")
    chosen, rejected = outputs if value == str(base) else outputs[::-1]
    return pair(row | {"chosen": row[chosen], "rejected": row[rejected]}, prompt_key)


def judged(row: Row, convert: Callable[..., Row], verdict: str) -> Row:
    """An answer with a verdict. It may be empty, as in a pair."""
    converted = convert(row, may_be_empty=True)
    messages = converted.pop("messages")
    if messages[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with an assistant turn")
    judgement = {"prompt": messages[:-1], "completion": messages[-1:], verdict: READ_VERDICT[verdict](row[verdict])}
    return converted | judgement  # which may hold a reference


def _label(value: Any) -> bool:
    label = _LABELS.get(str(value).lower()) if isinstance(value, (bool, int, float, str)) else None
    if label is None:
        raise BadRow(f"label must be true or false, not {value!r}")
    return label


def read_number(value: Any, label: str) -> float:
    """A number used in training, which must be finite in float32. label: for messages."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # a CSV file's numbers are strings
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise BadRow(f"{label} must be a finite number, not {quoted(value)}")
    return number


def reference_text(value: Any) -> str:
    """A reference as text; an object or a list of objects (tests, for the rule `code`) becomes JSON."""
    if isinstance(value, dict) or (isinstance(value, list) and value and all(isinstance(v, dict) for v in value)):
        return json.dumps(without_nulls(value), ensure_ascii=False)
    return read_text(value, "reference")


def with_checks(row: Row, convert: Callable[[Row], Row], checks: Sequence[str]) -> Row:
    """A problem whose reference holds the columns `checks`, by which a rule (`code`, `ifeval`) judges an answer."""
    return convert(row) | {"reference": reference_text({key: row.get(key) for key in checks})}


def mbpp_task(row: Row, task_key: str, answer_key: str | None) -> Row:
    """MBPP's text followed by its tests: only they say what the function is called."""
    tests = row["test_list"]
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise BadRow("test_list must be a list of strings")
    task = f"{read_text(row[task_key], task_key)}\n\nYour code should pass these tests:\n\n" + "\n".join(tests)
    if answer_key is None:
        return prompt_only(row | {task_key: task}, task_key)
    return question(row | {task_key: task}, task_key, answer_key)


READ_VERDICT: dict[str, Callable[[Any], Any]] = {"label": _label, "score": partial(read_number, label="score")}
