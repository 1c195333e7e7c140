"""Tools in conversations: their words, who says them, and what is refused."""

import json

import pytest

from conversations import render_conversation
from conversations.formats.bad_row import BadRow
from conversations.formats.table import convert_row

from ..helpers.stages import byte_tokenizer

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
RESULT = "<tool_response>\n21 °C\n</tool_response>"


def openai_call(city: str, call_id: str | None = None) -> dict:
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
    return call | ({"id": call_id} if call_id else {})


OPENAI = {
    "tools": [{"type": "function", "function": WEATHER}],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": None, "tool_calls": [openai_call("北京", "c1")]},
        {"role": "tool", "tool_call_id": "c1", "content": "21 °C"},
        {"role": "assistant", "content": "It is warm."},
    ],
}
SHAREGPT = {
    "system": "Be brief.",
    "tools": json.dumps([WEATHER]),
    "conversations": [
        {"from": "human", "value": "How warm is it?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "北京"}}'},
        {"from": "observation", "value": "21 °C"},
        {"from": "gpt", "value": "It is warm."},
    ],
}
LEGACY = {
    **OPENAI,
    "messages": [
        *OPENAI["messages"][:2],
        {"role": "assistant", "content": "", "function_call": {"name": "weather", "arguments": '{"city": "北京"}'}},
        {"role": "function", "name": "weather", "content": "21 °C"},
        OPENAI["messages"][4],
    ],
}


@pytest.mark.parametrize("row", [OPENAI, SHAREGPT, LEGACY])
def test_tools_become_words_of_the_three_roles(row):
    messages = convert_row(row)[1]["messages"]
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"].startswith("Be brief.\n\nYou can call these tools:\n<tools>\n")
    defined = messages[0]["content"].split("<tools>\n")[1].split("\n</tools>")[0]
    assert json.loads(defined) == {"type": "function", "function": WEATHER}
    assert [turn["content"] for turn in messages[2:]] == [CALL, RESULT, "It is warm."]


def test_calls_are_trained_and_results_are_not():
    tokenizer = byte_tokenizer()
    rendered = render_conversation(convert_row(OPENAI)[1]["messages"], tokenizer)
    trained = [i for i, on in zip(rendered["input_ids"], rendered["assistant_mask"], strict=True) if on]
    assert tokenizer.decode(trained) == f" {CALL}<eos> It is warm.<eos>"


def test_results_stand_in_the_order_of_the_calls():
    calls = [openai_call("Rome", "a"), openai_call("Oslo", "b")]
    messages = [
        {"role": "user", "content": "Compare."},
        {"role": "assistant", "content": "I look. ", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "cold"},
        {"role": "tool", "tool_call_id": "a", "content": "warm"},
    ]
    said = [turn["content"] for turn in convert_row({"messages": messages})[1]["messages"]]
    assert said[1].startswith("I look.\n<tool_call>") and said[1].index("Rome") < said[1].index("Oslo")
    assert said[2].index("warm") < said[2].index("cold")


def test_preferences_may_be_calls():
    chosen = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "北京"}}'}
    rejected = {"from": "gpt", "value": "I do not know."}
    source = SHAREGPT | {"conversations": SHAREGPT["conversations"][:1], "chosen": chosen, "rejected": rejected}
    _, row = convert_row(source)
    assert row["chosen"] == [{"role": "assistant", "content": CALL}] and row["prompt"][0]["role"] == "system"


USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}


def one_call(**call) -> dict:
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
def test_arguments_under_other_names(key):
    for arguments in ({"city": "北京"}, '{"city": "北京"}'):
        assert convert_row(one_call(name="weather", **{key: arguments}))[1]["messages"][1]["content"] == CALL


def test_a_call_without_arguments_and_a_null_argument():
    assert '"arguments": {}' in convert_row(one_call(name="now"))[1]["messages"][1]["content"]
    assert '{"city": null}' in convert_row(one_call(name="f", arguments={"city": None}))[1]["messages"][1]["content"]


@pytest.mark.parametrize(
    "row",
    [
        {"functions": [WEATHER], "messages": [USER, {"role": "assistant", "content": "A"}]},
        {"messages": [{"role": "system", "content": None, "tools": [WEATHER]}, USER, ANSWER]},
        {"tools": json.dumps(WEATHER), "messages": [USER, {"role": "assistant", "content": "A"}]},
        {"tools": [WEATHER | {"parameters": json.dumps(WEATHER["parameters"])}], "prompt": "Q", "response": "A"},
        {"tools": [WEATHER | {"strict": None, "parameters": WEATHER["parameters"] | {
            "properties": {"city": {"type": "string", "enum": None}, "padding": None}}}], "messages": [USER, ANSWER]},
        {"query": "Q", "tools": [WEATHER], "answers": json.dumps([{"name": "weather", "arguments": {}}])},
    ],
)  # fmt: skip
def test_definitions_in_other_places(row):
    system = convert_row(row)[1]["messages"][0]
    assert system["role"] == "system"
    assert json.loads(system["content"].split("<tools>\n")[1].split("\n</tools>")[0])["function"] == WEATHER


def test_calls_in_turns_of_their_own_are_one_turn():
    call = {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "北京"}}'}
    result = {"role": "tool_response", "content": "21 °C"}
    messages = [USER, {"role": "assistant", "content": "I look."}, call, call, result, result]
    said = convert_row({"messages": messages})[1]["messages"]
    assert [turn["content"] for turn in said[1:]] == [f"I look.\n{CALL}\n{CALL}", f"{RESULT}\n{RESULT}"]


def test_calls_without_a_result_are_counted():
    events = []
    calls = [openai_call("Rome", "a"), openai_call("Oslo", "b")]
    result = {"role": "tool", "tool_call_id": "b", "content": "cold"}
    asks = {"role": "assistant", "tool_calls": calls}
    convert_row({"messages": [USER, asks, result, asks, USER, asks]}, None, None, events)
    assert events == [("no result", "call")] * 5


def test_a_system_message_that_lists_tools_gets_no_second_list():
    hermes = {"role": "system", "content": "<tools> [] </tools>"}
    assert convert_row({"tools": [WEATHER], "messages": [hermes, USER]})[1]["messages"][0] == hermes


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [USER, {"role": "tool", "content": "3"}]},
            r"messages\[1\] is a tool result, but no earlier call",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, r"messages\[1\] has a call without a name"),
        (
            {"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}]},
            r"messages\[1\]: arguments of f must be JSON, not '{'",
        ),
        ({"messages": [USER | {"tool_calls": [openai_call("x")]}]}, "a user turn makes tool calls"),
        (
            {**OPENAI, "messages": [*OPENAI["messages"][:3], {"role": "tool", "tool_call_id": "c2", "content": ""}]},
            "no earlier call",
        ),
        ({**OPENAI, "messages": [*OPENAI["messages"][:4], OPENAI["messages"][3]]}, r"messages\[4\] is a tool result"),
        (
            {
                **OPENAI,
                "messages": [*OPENAI["messages"][:3], {"role": "tool", "tool_call_id": "call_9", "content": ""}],
            },
            r"result for call 'call_9', but no earlier call .* \(awaiting: 'c1'\)",
        ),
        (one_call(name="f", params={"a": 1}), "arguments of f must be under the key arguments; the call has params"),
        (one_call(name="f", arguments={"a": 1}, input={"b": 2}), "the call has arguments, input"),
        ({"messages": [USER | {"tools": [WEATHER]}]}, r"messages\[0\] has tools: tool definitions belong to"),
        ({**OPENAI, "tools": "weather"}, "tools must be JSON, not 'weather'"),
        ({**OPENAI, "tools": [{"type": "function"}]}, r"tools\[0\] must be a definition with a name"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "call it"}]}, "JSON"),
    ],
)
def test_what_is_wrong_with_tools_is_named(row, reason):
    with pytest.raises(BadRow, match=reason):
        convert_row(row)


def _answered_calls(calls: list[dict], *results: dict) -> list[dict]:
    told = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    return [*told, *({"role": "tool", **result} for result in results), {"role": "assistant", "content": "done"}]


def test_arguments_beside_the_function_are_read_and_two_that_differ_refused() -> None:
    call = {"type": "function", "function": {"name": "f"}, "arguments": {"city": "Rome"}}
    messages = convert_row({"messages": _answered_calls([call], {"content": "sunny"})})[1]["messages"]
    assert '"arguments": {"city": "Rome"}' in messages[1]["content"]
    call["function"] = {"name": "f", "arguments": {"city": "Oslo"}}
    with pytest.raises(BadRow, match="arguments of f"):
        convert_row({"messages": _answered_calls([call], {"content": "sunny"})})


def test_results_find_their_calls_by_name() -> None:
    calls = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]
    rows = {"messages": _answered_calls(calls, {"name": "g", "content": "of g"}, {"name": "f", "content": "of f"})}
    said = convert_row(rows)[1]["messages"][2]["content"]
    assert said.index("of f") < said.index("of g")
    with pytest.raises(BadRow, match=r"'h'.*awaiting: 'f', 'g'"):
        convert_row({"messages": _answered_calls(calls, {"name": "h", "content": "x"})})


def test_two_lists_of_calls_that_differ_are_refused() -> None:
    messages = _answered_calls([{"name": "f", "arguments": {}}], {"content": "x"})
    messages[1]["function_call"] = {"name": "g", "arguments": "{}"}
    with pytest.raises(BadRow, match="tool_calls and function_call"):
        convert_row({"messages": messages})
