"""Forms of other frameworks, reasoning, roles, media and hints: used, or refused by name."""

import json
import re

import pytest
import yaml

from conversations import load_conversations
from conversations.answers.usable_rows import no_answer
from conversations.errors import ToolkitError
from conversations.formats.bad_row import BadRow
from conversations.formats.table import convert_row
from conversations.formats.turn_reading import Rules

U, A = "user", "assistant"


def turns_of(row: dict, rules: Rules | None = None) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in convert_row(row, None, rules)[1]["messages"]]


QA = [{"role": U, "content": "Q"}, {"role": A, "content": "R"}]
ROWS = [
    # Dolly, OpenOrca, ms-swift, Alpaca with everything.
    ({"instruction": "Q", "context": "C", "response": "R", "category": "c"}, [(U, "Q\nC"), (A, "R")]),
    ({"system_prompt": "S", "question": "Q", "response": "R"}, [("system", "S"), (U, "Q"), (A, "R")]),
    ({"query": "Q", "response": "R", "history": [["p", "b"]]}, [(U, "p"), (A, "b"), (U, "Q"), (A, "R")]),
    ({"query": "Q", "response": "R", "history": '[["p", "b"]]'}, [(U, "p"), (A, "b"), (U, "Q"), (A, "R")]),
    ({"query": "Q", "response": "R", "history": [{"user": "p", "assistant": "b"}]},
     [(U, "p"), (A, "b"), (U, "Q"), (A, "R")]),
    ({"system": "S", "instruction": "Q", "input": "I", "output": "R", "history": []},
     [("system", "S"), (U, "Q\nI"), (A, "R")]),
    ({"system": "", "system_message": "S", "prompt": "Q", "completion": "R"}, [("system", "S"), (U, "Q"), (A, "R")]),
    ({"question": "Q", "context": "C", "answer": "R"}, [(U, "Q\nC"), (A, "R")]),
    ({"input": "Q", "output": "R"}, [(U, "Q"), (A, "R")]),
    # Numbers are read as text.
    ({"question": "Q", "answer": 4}, [(U, "Q"), (A, "4")]),
    ({"messages": [QA[0], {"role": A, "content": 4.5}]}, [(U, "Q"), (A, "4.5")]),
    # Lists of turns under other names, roles and words under other keys, exchanges as objects.
    *(({key: QA}, [(U, "Q"), (A, "R")]) for key in ("conversation", "dialogue", "dialog", "chat")),
    ({"messages": [{"from": "human", "content": "Q"}, {"from": "gpt", "content": "R"}]}, [(U, "Q"), (A, "R")]),
    ({"conversations": [{"role": "User", "value": "Q"}, {"role": "Assistant", "value": "R"}]}, [(U, "Q"), (A, "R")]),
    ({"conversation": [{"system": "S", "input": "Q", "output": "R"}, {"input": "P", "output": "B"}]},
     [("system", "S"), (U, "Q"), (A, "R"), (U, "P"), (A, "B")]),
    ({"messages": [{"user": "Q", "assistant": "R"}]}, [(U, "Q"), (A, "R")]),
    ({"messages": [{"human": "Q"}, {"gpt": "R"}]}, [(U, "Q"), (A, "R")]),
    ({"conversations": {"from": ["human", "gpt"], "value": ["Q", "R"]}}, [(U, "Q"), (A, "R")]),
    ({"messages": [{"role": U, "content": [{"type": "input_text", "text": "Q"}, "!"]}, QA[1]]}, [(U, "Q!"), (A, "R")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "turns"), ROWS)
def test_forms_of_other_frameworks(row, turns):
    assert turns_of(row) == turns


PAIR = {"prompt": [QA[0]], "chosen": [{"role": A, "content": "good"}], "rejected": [{"role": A, "content": "bad"}]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QA[0], *PAIR["chosen"]], "rejected_response": "bad"},
        {"query": "Q", "response": "good", "rejected_response": "bad"},
        {"instruction": "Q", "input": "", "chosen": "good", "rejected": "bad"},
        {"prompt": "Q", "chosen_response": "good", "rejected_response": "bad"},
        {
            "input": {"messages": [QA[0]], "tools": [], "parallel_tool_calls": True},
            "preferred_output": PAIR["chosen"],
            "non_preferred_output": PAIR["rejected"],
        },
    ],
)
def test_preferences_of_other_frameworks(row):
    assert convert_row(row)[1] == PAIR


def test_a_judgement_of_llama_factory():
    assert convert_row({"messages": QA, "kto_tag": True})[1]["label"] is True


# --- reasoning


def thought(**keys) -> dict:
    return {"messages": [QA[0], QA[1] | keys]}


REASONED = [
    *(thought(**{key: "T"}) for key in ("thinking", "reasoning", "thought", "reasoning_content")),
    thought(reasoning_details=[{"type": "reasoning.text", "text": "T"}]),
    thought(reasoning="T", reasoning_details=[{"type": "reasoning.text", "text": "T"}]),
    thought(content=[{"type": "thinking", "thinking": "T"}, {"type": "text", "text": "R"}]),
    {"question": "Q", "answer": "R", "reasoning": "T"},
    {"messages": QA, "thinking": "T"},
    {"messages": QA, "reasoningContent": "T"},
    thought(**{"Reasoning-Content": "T"}),
]


@pytest.mark.parametrize("row", REASONED)
def test_reasoning_is_refused_dropped_or_put_before_the_answer(row):
    with pytest.raises(
        BadRow, match=r"has (thinking|reasoning|thought|reasoning_\w+): set format.reasoning to think_tags"
    ):
        convert_row(row)
    assert turns_of(row, Rules(reasoning="drop")) == [(U, "Q"), (A, "R")]
    assert turns_of(row, Rules(reasoning="think_tags")) == [(U, "Q"), (A, "<think>\nT\n</think>\n\nR")]
    events = []
    convert_row(row, None, Rules(reasoning="drop"), events)
    assert [kind for kind, _ in events] == ["dropped reasoning"]


def test_reasoning_before_a_call():
    call = {"function": {"name": "f", "arguments": "{}"}}
    row = {"messages": [QA[0], {"role": A, "content": None, "reasoning": "T", "tool_calls": [call]}]}
    assert turns_of(row, Rules(reasoning="think_tags"))[1][1].startswith("<think>\nT\n</think>\n\n<tool_call>\n")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (thought(reasoning="T", thinking="other"), "reasoning and thinking, which differ"),
        ({"messages": [QA[0] | {"reasoning": "T"}, QA[1]]}, r"messages\[0\] has reasoning, but is a user turn"),
        (thought(content="", reasoning="T"), r"messages\[1\] has reasoning and no answer"),
        (thought(content="<think>T</think>R", reasoning="T"), "its content already contains <think>"),
        (PAIR | {"reasoning": "T"}, "no answer to attach it to"),
        (thought(reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]), "that is not text"),
    ],
)
def test_reasoning_that_belongs_nowhere(row, reason):
    with pytest.raises(BadRow, match=reason):
        convert_row(row, None, Rules(reasoning="think_tags"))


@pytest.mark.parametrize("row", [thought(reasoning=""), thought(reasoning=None), {"messages": QA, "reasoning": "on"}])
def test_no_reasoning(row):
    assert turns_of(row) == [(U, "Q"), (A, "R")]


# --- media, roles, places


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": QA, "images": ["a.png"]}, "the row has images: images, audio and video cannot be trained"),
        ({"messages": QA, "video": "a.mp4"}, "the row has video"),
        ({"messages": QA, "picture": {"bytes": b"x", "path": "a.png"}}, "the row has picture"),
        ({"messages": QA, "sound": {"array": [0.1], "sampling_rate": 8}}, "the row has sound"),
        ({"messages": [QA[0] | {"audio": {"id": "x"}}, QA[1]]}, r"messages\[0\] has audio"),
        (
            {"messages": [{"role": U, "content": [{"type": "input_audio"}]}, QA[1]]},
            "a part that is not text: input_audio",
        ),
        ({"conversations": [{"from": "bot", "value": "Q"}]}, r"unknown role 'bot' .*roles: \{bot: assistant\}"),
        ({"system": "S", "messages": [QA[0], {"role": A, "content": " "}]}, r"turn 2 \(assistant\) is empty"),
        ({"messages": [{"role": "system", "content": ""}, QA[0], QA[0]]}, "turn 3 has role user"),
        ({"instruction": "Q", "output": " "}, r"turn 2 \(assistant\) is empty: output"),
        (
            {"system": "S", "messages": [{"role": "system", "content": "other"}, *QA]},
            "a system column and a system",
        ),
        ({"prompt": [QA[0]], "context": "C", "response": "R"}, "context cannot be appended to prompt"),
        ({"question": "Q", "context": {"title": []}, "answer": "R"}, "context must be a string"),
        ({"prompt": ["Q"]}, r"prompt\[0\] must be an object with role and content"),
        ({"query": "Q", "response": [["R"]]}, r"response\[0\] must be an object with role and content"),
    ],
)
def test_refused_by_name(row, reason):
    with pytest.raises(BadRow, match=reason):
        convert_row(row)


@pytest.mark.parametrize(
    "row", [{"messages": QA, "images": [], "audio": None}, {"messages": QA, "files": {"path": "a.py"}}]
)
def test_columns_without_media(row):
    assert turns_of(row) == [(U, "Q"), (A, "R")]


def test_roles_of_the_files_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": "customer", "value": "Q"}, {"from": "bot", "value": "R"}]}))
    (row,) = load_conversations(path, roles={"bot": "assistant", "customer": "user"})
    assert row == {"messages": QA}


# --- hints work, and drop no column


HINTED = [
    {"Frage": 1, "user_question": "Q", "model_answer": "R"},
    {"Body": "Q", "Solution": "R"},
    {"turns": QA},
    {"persona": "S", "request": "Q", "reply": "R"},
    {"passage": "C", "problem": "Q", "solution": 4},
    {"messages": QA, "score": 3},
    {"prompt": "Q", "chosen": "R", "rejected": "no"},
    {"messages": QA, "rejected_response": "no"},
    {"query": "Q", "response": "R", "rejected_response": "no"},
]


@pytest.mark.parametrize("row", HINTED)
def test_a_hint_that_is_followed_loads_the_file(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ToolkitError) as caught:
        list(load_conversations(path, refuse=no_answer))
    hints = re.findall(r"columns: (\{.*?\})", str(caught.value))
    columns = yaml.safe_load(hints[-1])
    (loaded,) = load_conversations(path, refuse=no_answer, columns=columns)
    text = " ".join(turn["content"] for turn in loaded["messages"])
    for value in row.values():
        if isinstance(value, str) and value != "no":
            assert value in text


def test_without_a_column_that_works_there_is_no_hint(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question_of_all": "", "b": 1}')
    with pytest.raises(ToolkitError, match=r"columns: \{known key: your key\}"):
        list(load_conversations(path))


def test_what_is_null_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"Ask": "Q", "Tell": null}')
    with pytest.raises(ToolkitError, match=r"has no answer to train on.* \(Tell is null\)"):
        list(load_conversations(path, refuse=no_answer, columns={"prompt": "Ask", "response": "Tell"}))


@pytest.mark.parametrize("text", ["[]", '["a", "b"]', '[{"a": 1}]', "[1, 2] are numbers", '[{"role": "user"}]'])
def test_a_question_that_is_json_is_a_question(text: str) -> None:
    assert turns_of({"prompt": text, "completion": "Yes."}) == [(U, text), (A, "Yes.")]
