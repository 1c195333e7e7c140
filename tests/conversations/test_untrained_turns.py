"""What a file says about the training of its turns is honoured, or refused by name; never passed over."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations import load_conversations, render_conversation
from conversations.errors import ToolkitError
from conversations.formats.bad_row import BadRow
from conversations.formats.table import convert_row
from conversations.formats.training_flags import FLAGS
from conversations.formats.turn_reading import Rules
from conversations.rendering.fitting import NOTHING_TRAINED, Fitter
from conversations.rendering.lengths import LengthReport

from ..helpers.stages import byte_tokenizer

TOKENIZER = byte_tokenizer()
OFF = [0, 0.0, False, "0", "false", "False"]
ON = [1, 1.0, True, "1", "true"]


def turns(*flags: dict) -> list[dict]:
    """User and assistant by turns, the assistant's words being A, B, C: each with the given keys."""
    told = []
    for word, keys in zip("ABC", flags, strict=False):
        told += [{"role": "user", "content": f"ask {word}"}, {"role": "assistant", "content": word, **keys}]
    return told


def trained(messages, **settings) -> str:
    rendered = render_conversation(messages, TOKENIZER, **settings)
    ids = [i for i, on in zip(rendered["input_ids"], rendered["assistant_mask"], strict=True) if on]
    return TOKENIZER.decode(ids).replace("<eos>", "").strip()


def of_row(row: dict, **settings) -> str:
    return trained(convert_row(row)[1]["messages"], **settings)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(("off", "on"), [*((off, True) for off in OFF), *((False, on) for on in ON)])
def test_every_name_and_value_of_a_mask(name, off, on):
    assert of_row({"messages": turns({name: off}, {name: on}, {name: None})}) == "B C"


@pytest.mark.parametrize("name", ["lossMask", "LossMask", "loss-mask", "Loss Mask", "LOSS_MASK"])
def test_every_spelling_of_a_mask(name):
    """Of a turn, of a row, and of a list of a row; none of them is reported as unused."""
    events: list = []
    assert of_row({"messages": turns({name: 0}, {name: 1})}) == "B"
    assert of_row({"messages": turns({}, {}), name: [0, 1, 0, 0]}) == "A"
    assert of_row({"messages": turns({}, {}), name: 0}) == ""
    convert_row({"messages": turns({}, {}), name: [0, 1, 0, 0]}, None, Rules(), events)
    assert [kind for kind, _ in events] == ["untrained"]
    with pytest.raises(BadRow, match=f"the row has {name} 0.5.*columns: {{other: {name}}}"):
        of_row({"messages": turns({}, {}), name: 0.5})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": turns({}, {}), "loss_mask": [0, 0, 0, 1]}, "B"),
        ({"messages": turns({}, {}), "loss_mask": [0, 1, 0, 0]}, "A"),
        ({"conversations": turns({}, {}), "train": False}, ""),
        ({"messages": turns({}, {}), "weight": 1}, "A B"),
        ({"messages": turns({}, {}), "mask": "User"}, "A B"),
        ({"prompt": "Q", "response": "A", "weight": 0.0}, ""),
        ({"prompt": "Q", "response": "A", "train": "true"}, "A"),
        ({"system": "S", "messages": turns({}, {"train": 0})}, "A"),
        ({"messages": [{"role": "system", "content": ""}, *turns({}, {})], "loss_mask": [0, 0, 1, 0, 0]}, "A"),
        (
            {"conversation": [{"input": "Q", "output": "A", "output_with_loss": False}, {"input": "R", "output": "B"}]},
            "B",
        ),
    ],
)
def test_masks_of_a_row(row, words):
    assert of_row(row) == words


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": turns({"weight": 0.5})}, r"messages\[1\] has weight 0.5, which cannot be honoured"),
        ({"messages": turns({"loss_scale": 2})}, r"messages\[1\] has loss_scale 2"),
        ({"messages": turns({"mask": [1, 0]})}, r"messages\[1\] has mask \[1, 0\]"),
        ({"messages": turns({"train": True, "weight": 0})}, r"train True and weight 0, which contradict each other"),
        ({"messages": turns({"train_detail": [{"begin_offset": 0}]})}, r"messages\[1\] has train_detail: spans"),
        (
            {"messages": [{"role": "user", "content": "Q", "train": True}]},
            r"messages\[0\] has train, but is a user turn",
        ),
        ({"messages": turns({}), "loss_mask": [1]}, "loss_mask has 1 entries for 2 turns"),
        ({"messages": turns({}), "loss_mask": [1, 1]}, r"messages\[0\] has loss_mask, but is a user turn"),
        ({"messages": turns({}), "loss_mask": [0, 0.5]}, r"the row has loss_mask\[1\] 0.5"),
        (
            {"messages": turns({}), "sample_weight": 0.3},
            r"the row has sample_weight 0.3.*columns: \{other: sample_weight",
        ),
        ({"messages": turns({"train": True}), "loss_mask": [0, 0]}, "but the row's loss_mask says False"),
        ({"prompt": "Q", "response": "A", "loss_mask": [0, 1]}, "the row has no list of turns"),
        ({"text": "words", "train": False}, "train false, which cannot be honoured here"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "weight": 0}, "weight false, which cannot be honoured here"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(row, reason):
    with pytest.raises(BadRow, match=reason):
        convert_row(row)


def test_a_column_that_is_no_mask_is_read_under_another_name():
    known, row = convert_row({"prompt": "Q", "response": "A", "weight": 71.5}, {"kilos": "weight"})
    assert row["meta"] == {"kilos": 71.5} and known.name == "prompt/response"


@given(
    flags=st.lists(st.sampled_from([None, True, False]), min_size=1, max_size=3),
    train_on=st.sampled_from(["all_assistant", "last_assistant"]),
    too_long=st.sampled_from(["truncate", "split"]),
    limit=st.none() | st.integers(12, 60),
)
def test_a_turn_that_is_not_trained_stays_so_however_rows_are_cut(flags, train_on, too_long, limit):
    row = convert_row({"messages": turns(*({"train": flag} for flag in flags))})[1]
    report = LengthReport()
    pieces = list(Fitter(TOKENIZER, limit, too_long, train_on).pieces(row, report))
    said = TOKENIZER.decode([i for ids, mask in pieces for i, on in zip(ids, mask, strict=True) if on])
    allowed = {word for word, flag in zip("ABC", flags, strict=False) if flag is not False}
    if train_on == "last_assistant":
        allowed &= {"ABC"[len(flags) - 1]}
    assert {letter for letter in said if letter in "ABC"} <= allowed
    if limit is None:
        assert {letter for letter in said if letter in "ABC"} == allowed
    if not allowed:
        assert report.rejected == [{"row": 1, "reason": NOTHING_TRAINED}]
    elif report.cut_exchanges:
        assert report.cut_exchanges <= len(allowed)


def test_a_split_row_does_not_count_untrained_exchanges_as_cut():
    row = convert_row({"messages": turns({"train": False}, {"train": True}, {"train": True})})[1]
    report = LengthReport()
    pieces = list(Fitter(TOKENIZER, 40, "split").pieces(row, report))
    assert len(pieces) == 2 and report.split == 1 and report.cut_exchanges == 0


def test_rows_with_and_without_flags_go_through_a_table_and_back():
    from datasets import Dataset

    rows = [convert_row({"messages": turns({}, keys)})[1] for keys in ({}, {"train": 0})]
    stored = Dataset.from_list(rows)
    assert [of_row(row) for row in stored] == [trained(row["messages"]) for row in stored] == ["A B", "A"]


def test_the_key_of_a_canonical_turn_is_checked():
    for wrong in ("no", 2):
        with pytest.raises(ToolkitError, match="message 2: train must be true or false"):
            render_conversation(turns({"train": wrong}), TOKENIZER)
    with pytest.raises(ToolkitError, match="message 1: train is true, but only the assistant's"):
        render_conversation([{"role": "user", "content": "Q", "train": True}], TOKENIZER)


def test_what_is_not_used_is_counted_once_for_each_name(tmp_path):
    rows = [
        {
            "messages": turns({"train": 0, "mood": "glad", "tone": "", "tags": []}, {"name": None}),
            "source": "s",
            "id": number,
            "none": None,
        }
        for number in range(3)
    ]
    rows.append({"instruction": "Q", "context": "C", "output": "A", "category": "c", "kind": "safe", "weight": 0})
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": [], "lost": 1}]))
    reader = load_conversations(path, on_bad_row="skip", columns=None)
    list(reader)
    assert reader.notes() == [
        "columns not used: source (3 rows), id (3 rows), category (1 row)",
        "keys of turns not used: mood (3 turns)",
        "turns left untrained by their own flags: train (3 turns), weight (1 turn)",
    ]


@pytest.mark.parametrize("name", ["masked", "no_loss", "ignore_loss"])
def test_flags_that_say_the_reverse_are_honoured(name: str) -> None:
    assert of_row({"messages": turns({name: True}, {name: 0}, {})}) == "B C"


@pytest.mark.parametrize(
    "key", ["train_on_this", "untrained", "Loss_Value", "assistant_mask", "skipLoss", "no-training"]
)
def test_a_turns_key_that_speaks_of_training_is_honoured_or_refused(key: str) -> None:
    with pytest.raises(BadRow, match=key):
        convert_row({"messages": turns({key: 0.5})})


def test_a_flag_in_capitals_is_read() -> None:
    assert of_row({"messages": turns({"Loss": False}, {"TRAIN": 1})}) == "B"


def test_a_flag_on_a_part_or_on_a_call_is_refused() -> None:
    part = {"type": "text", "text": "A", "train": False}
    with pytest.raises(BadRow, match="train"):
        convert_row({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [part]}]})
    call = {"function": {"name": "f", "arguments": {}}, "loss": 0}
    with pytest.raises(BadRow, match="loss"):
        convert_row({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]})


def test_a_row_that_is_not_trained_trains_nothing_of_its_history() -> None:
    row = {"query": "ask B", "response": "B", "history": [["ask A", "A"]], "train": 0}
    assert of_row(row) == ""


def test_a_mask_as_text_is_a_mask() -> None:
    assert of_row({"messages": turns({}, {}), "loss_mask": "[0, 0, 0, 1]"}) == "B"
