"""Each known format to its canonical row, and each kind of bad row to its reason."""

import pytest

from conversations.answers.prompts import prompt_of
from conversations.formats.bad_row import BadRow
from conversations.formats.hints import likely_columns, plain_columns
from conversations.formats.table import FORMATS, UnknownFormat, convert_row


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def sharegpt_turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


QA = {"messages": [user("Q"), assistant("A")]}
PAIR = {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
JUDGED = {"prompt": [user("Q")], "completion": [assistant("A")]}
TRANSCRIPT = "\n\nHuman: Q\n\nAssistant: A \n\nHuman: R\n\nAssistant:"

# (source row, name of its format, canonical row)
KNOWN = [
    ({"messages": [user("Q"), assistant("A")]}, "messages", QA),
    ({"messages": [user("Q")]}, "messages", {"messages": [user("Q")]}),
    ({"messages": [system(" "), user("Q"), assistant("A")]}, "messages", QA),
    (
        {"messages": [user("Q"), assistant("A")], "system": "S"},
        "messages",
        {"messages": [system("S"), *QA["messages"]]},
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, assistant("A")]}, "messages", QA),
    (
        {"conversations": [sharegpt_turn("system", "S"), sharegpt_turn("human", "Q"), sharegpt_turn("gpt", "A")]},
        "ShareGPT",
        {"messages": [system("S"), user("Q"), assistant("A")]},
    ),
    ({"instruction": "Q", "input": "", "output": "A"}, "instruction/output", QA),
    ({"instruction": "Q", "output": "A", "response": None}, "instruction/output", QA),
    (
        {"instruction": "Q", "input": "more", "response": "A"},
        "instruction/response",
        {"messages": [user("Q\nmore"), assistant("A")]},
    ),
    ({"instruction": "Q", "instances": [{"input": "", "output": "A"}]}, "Self-Instruct tasks", QA),
    ({"question": "Q", "answer": "A"}, "question/answer", QA),
    (
        {"question": "Q", "answer": "40+2\n#### 42 "},
        "question/answer",
        {"messages": [user("Q"), assistant("40+2\n#### 42 ")], "reference": "42"},
    ),
    ({"question": "Q", "answer": "A", "reference": 42}, "question/answer", QA | {"reference": "42"}),
    ({"prompt": "Q", "completion": "A"}, "prompt/completion", QA),
    ({"prompt": [user("Q")], "completion": [assistant("A")]}, "prompt/completion", QA),
    ({"prompt": "Q", "response": "A"}, "prompt/response", QA),
    (
        {"prompt": "Q", "canonical_solution": "A", "test": "t"},
        "prompt/canonical_solution",
        QA | {"meta": {"test": "t"}},
    ),
    ({"prompt": "User: Q\n\nAssistant:", "answers": ["A"]}, "ESFT test prompts", QA | {"reference": "A"}),
    ({"prompt": "Q"}, "prompts", {"messages": [user("Q")]}),
    ({"prompt": TRANSCRIPT}, "prompts", {"messages": [user("Q"), assistant("A"), user("R")]}),
    # Text that only looks a little like a transcript stays as it is.
    ({"prompt": "User: Q"}, "prompts", {"messages": [user("User: Q")]}),
    ({"prompt": "\n\nHuman: Q"}, "prompts", {"messages": [user("\n\nHuman: Q")]}),
    ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, "preference pairs with prompt", PAIR),
    (PAIR, "preference pairs with prompt", PAIR),
    (
        {"prompt": "Q", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        "preference pairs with prompt",
        PAIR,
    ),
    ({"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]}, "preference pairs", PAIR),
    (
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        "preference pairs",
        PAIR,
    ),
    (
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
        "preference pairs with prompt",
        PAIR,
    ),
    (
        {
            "conversations": [sharegpt_turn("human", "Q")],
            "chosen": sharegpt_turn("gpt", "good"),
            "rejected": sharegpt_turn("gpt", "bad"),
        },
        "preference pairs with conversations",
        PAIR,
    ),
    ({"messages": [user("Q"), assistant("A")], "label": False}, "messages with label", JUDGED | {"label": False}),
    ({"prompt": "Q", "completion": "A", "label": 1}, "prompt/completion with label", JUDGED | {"label": True}),
    ({"prompt": "Q", "completion": "A", "score": 3}, "prompt/completion with score", JUDGED | {"score": 3.0}),
    # As in a CSV file, where all values are strings.
    ({"prompt": "Q", "completion": "A", "score": "-3.5"}, "prompt/completion with score", JUDGED | {"score": -3.5}),
    ({"prompt": "Q", "completion": "A", "label": "False"}, "prompt/completion with label", JUDGED | {"label": False}),
    ({"question": "Q", "answer": "A", "system": "", "tools": "", "reference": ""}, "question/answer", QA),
    ({"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'}, "messages", QA),
    # LLMBar, AlpacaFarm, PKU-SafeRLHF.
    ({"input": "Q", "output_1": "good", "output_2": "bad", "label": 1}, "ranked pairs (label)", PAIR),
    (
        {"instruction": "Q", "input": "", "output_1": "bad", "output_2": "good", "preference": 2},
        "ranked pairs (preference)",
        PAIR,
    ),
    (
        {"prompt": "Q", "response_0": "bad", "response_1": "good", "better_response_id": 1},
        "ranked pairs (better_response_id)",
        PAIR,
    ),
    (
        {"instruction": "Q", "input": "more", "output": "A", "history": [["P", "B"]]},
        "instruction/output",
        {"messages": [user("P"), assistant("B"), user("Q\nmore"), assistant("A")]},
    ),
    ({"text": "def f(): pass\n"}, "plain text", {"text": "def f(): pass\n"}),
    (
        {"question_id": 81, "turns": ["Q", "R"], "reference": ["42", "43"]},
        "MT-Bench questions (the first turn)",
        {
            "messages": [user("Q")],
            "reference": "42",
            "meta": {"turns": ["Q", "R"], "references": ["42", "43"], "question_id": 81},
        },
    ),
]


@pytest.mark.parametrize(("source", "name", "canonical"), KNOWN)
def test_known_format(source, name, canonical):
    known, row = convert_row(source)
    assert (known.name, row) == (name, canonical)


@pytest.mark.parametrize("canonical", [canonical for _, _, canonical in KNOWN])
def test_canonical_rows_stay_as_they_are(canonical):
    assert convert_row(canonical)[1] == canonical


def test_every_format_comes_before_the_formats_that_its_keys_contain():
    for index, earlier in enumerate(FORMATS):
        for later in FORMATS[index + 1 :]:
            assert not set(earlier.keys) <= set(later.keys), f"{later.name} is never recognised"


def test_transcript_in_which_one_speaker_goes_on_is_one_turn():
    start = "\n\nHuman: Q\n\nAssistant: A\n\nAssistant: B\n\nHuman: R\n\nAssistant: "
    _, row = convert_row({"chosen": start + "good", "rejected": start + "bad"})
    assert row["prompt"] == [user("Q"), assistant("A\n\nB"), user("R")]


def test_a_transcript_may_be_the_conversation():
    _, row = convert_row({"messages": "\n\nHuman: Q\n\nAssistant: A"})
    assert row == QA


@pytest.mark.parametrize(
    ("source", "columns", "plain"),
    [
        ({"messages": QA["messages"], "score": 3}, {}, {"verdict": "score"}),
        ({"instruction": "Q", "output": "A", "label": "law"}, {}, {"verdict": "label"}),  # the label is no verdict
        (
            {"Ask": "Q", "response": "A", "Stars": 1},
            {"prompt": "Ask", "score": "Stars"},
            {"prompt": "Ask", "verdict": "Stars"},
        ),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, {}, {"completion": "chosen"}),
        (
            {"Ask": "Q", "chosen": "A", "Bad": "B"},
            {"prompt": "Ask", "rejected": "Bad"},
            {"prompt": "Ask", "rejected": "Bad", "completion": "chosen"},
        ),
        (
            {
                "conversations": [sharegpt_turn("human", "Q")],
                "chosen": sharegpt_turn("gpt", "A"),
                "rejected": sharegpt_turn("gpt", "B"),
            },
            {},
            {"prompt": "conversations", "completion": "chosen"},
        ),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
            {},
            {"messages": "chosen"},
        ),
        ({"Good": QA["messages"], "rejected": []}, {"chosen": "Good"}, {"messages": "Good"}),
        ({"messages": QA["messages"]}, {}, {}),
        ({"body": "Q"}, {}, {}),
    ],
)
def test_columns_that_make_a_row_with_a_verdict_a_conversation(source, columns, plain):
    assert plain_columns(source, columns) == plain
    if plain:
        assert convert_row(source, plain)[1]["messages"] == QA["messages"]


def test_one_side_of_a_pair_may_be_an_empty_answer():
    start = "\n\nHuman: Q\n\nAssistant: "
    _, row = convert_row({"chosen": start, "rejected": start + "bad"})
    assert row == PAIR | {"chosen": [assistant("")]}


@pytest.mark.parametrize(
    "source",
    [
        {"prompt": "Q", "completion": "", "score": 0.5},
        {"prompt": [user("Q")], "completion": [assistant("")], "score": 0.5},
        {"messages": [user("Q"), assistant("")], "score": 0.5},
        {"question": "Q", "answer": "", "score": 0.5},
    ],
)
def test_an_answer_with_a_verdict_may_be_empty(source):
    """As those that `dsv2 pairs` writes may be."""
    assert convert_row(source)[1] == {"prompt": [user("Q")], "completion": [assistant("")], "score": 0.5}


def test_other_keys_go_to_meta_and_meta_is_kept():
    source = {"prompt": "Q", "kind": "safe", "none": None, "meta": {"language": "en"}, "reference": "4"}
    _, row = convert_row(source)
    assert row == {"messages": [user("Q")], "reference": "4", "meta": {"language": "en", "kind": "safe"}}


def test_columns_are_mapped_before_the_format_is_recognised():
    known, row = convert_row({"Body": "Q", "Answer": "A", "Id": 7}, {"prompt": "Body", "response": "Answer"})
    assert known.name == "prompt/response"
    assert row == QA | {"meta": {"Id": 7}}


@pytest.mark.parametrize(
    ("canonical", "prompt"),
    [(QA, [user("Q")]), ({"messages": [user("Q")]}, [user("Q")]), (PAIR, [user("Q")]), (JUDGED, [user("Q")])],
)
def test_prompt_of(canonical, prompt):
    assert prompt_of(canonical, 1) == prompt


# (source row, what its reason says)
BAD = [
    ({"messages": []}, "the conversation has no turns"),
    ({"messages": "Q"}, "messages must be a list of turns, not 'Q'"),
    ({"messages": ["Q"]}, r"messages\[0\] must be an object with role and content, not 'Q'"),
    ({"messages": [{"content": "Q"}]}, r"messages\[0\] has no role: its keys are content"),
    ({"messages": [{"role": "bot", "content": "3"}]}, r"messages\[0\]: unknown role 'bot'"),
    ({"messages": [user("Q"), {"role": "assistant", "content": None}]}, r"messages\[1\] \(assistant\) content must be"),
    ({"messages": [user("Q"), assistant("A") | {"refusal": "no"}]}, r"messages\[1\] has refusal, which is not"),
    ({"instruction": "Q", "output": "A", "history": ["P"]}, "history must be a list of"),
    ({"instruction": "Q", "output_1": "a", "output_2": "b", "label": 0}, "label must be 1 or 2, the number of the"),
    ({"prompt": "Q", "response_0": "a", "response_1": "b", "safer_response_id": 2}, "safer_response_id must be 0 or 1"),
    ({"prompt": "Q", "completion": "A", "score": "high"}, "score must be a finite number, not 'high'"),
    ({"text": " "}, "text is empty"),
    ({"question_id": 1, "turns": []}, "turns must be a list of questions"),
    ({"messages": [user([{"type": "image_url"}])]}, r"messages\[0\] \(user\) has a part that is not text"),  # type: ignore
    ({"messages": [system("S")]}, "only a system turn"),
    ({"messages": [assistant("A")]}, "turn 1 has role assistant, but user is expected"),
    ({"messages": [user("Q"), user("R")]}, "turn 2 has role user, but assistant is expected"),
    ({"messages": [user("Q"), system("S")]}, "turn 2 has role system, but assistant is expected"),
    ({"messages": [user("Q"), assistant(" \n")]}, r"turn 2 \(assistant\) is empty"),
    ({"messages": [user("Q\0")]}, "contains a NUL character"),
    ({"messages": [user("Q\ud800")]}, "half of a surrogate pair"),
    ({"instruction": "", "output": "A"}, r"turn 1 \(user\) is empty"),
    ({"instruction": "Q", "instances": []}, "write one row for each instance"),
    ({"question": "Q", "answer": True}, "answer must be a string, not True"),
    ({"instruction": "Q", "input": "", "output": None}, "^output is null"),
    ({"prompt": None, "response": None}, "^prompt and response are null"),
    ({"prompt": "Q", "completion": "A", "label": "yes"}, "label must be true or false, not 'yes'"),
    ({"prompt": "Q", "completion": "A", "score": float("nan")}, "score must be a finite number, not nan"),
    ({"prompt": "Q", "answers": []}, "answers must be a list with at least one string"),
    ({"prompt": [user("Q"), assistant("A")]}, "prompt ends with an assistant turn"),
    ({"messages": [user("Q")], "label": True}, "does not end with an assistant turn"),
    ({"prompt": "Q", "reference": ["A"]}, "reference must be a string"),
    ({"chosen": "good", "rejected": "bad"}, "chosen is a string without a prompt"),
    ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen and rejected are identical"),
    ({"prompt": "Q", "chosen": "A", "rejected": [user("Q")]}, "rejected does not end with an assistant turn"),
    (
        {"prompt": "Q", "chosen": [user("P"), assistant("A")], "rejected": "B"},
        "chosen does not begin with the turns of prompt",
    ),
    (
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: R\n\nAssistant: A"},
        "do not answer the same prompt",
    ),
]


@pytest.mark.parametrize(("source", "reason"), BAD)
def test_bad_row_has_its_reason(source, reason):
    with pytest.raises(BadRow, match=reason):
        convert_row(source)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"Body": "Q", "Answer": "A", "Id": 7}, {"prompt": "Body", "response": "Answer"}),
        ({"userQuestion": "Q", "model_reply": "A"}, {"prompt": "userQuestion", "response": "model_reply"}),
        ({"system_prompt": "S", "prompt_template": "Q", "output_format": "x"}, {"prompt": "prompt_template"}),
        ({"choices": [1], "model_id": "m"}, {}),
    ],
)
def test_unknown_columns_bring_a_guess(row, columns):
    assert likely_columns(row) == columns


def test_unknown_keys_are_named():
    with pytest.raises(UnknownFormat, match="no known format has the keys id, turns"):
        convert_row({"id": 1, "turns": ["Q"]})


def test_missing_mapped_column_is_named():
    with pytest.raises(BadRow, match="has no column 'Body'; its columns are body"):
        convert_row({"body": "Q"}, {"prompt": "Body"})
