"""Rows that are longer than a run allows: cut, left out or split at turns, and all of it counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations.rendering.answer_fitting import Fit
from conversations.rendering.conversation import render_conversation
from conversations.rendering.fill_in_the_middle import render_text
from conversations.rendering.fitting import CUT_AWAY, NOTHING_TRAINED, Fitter
from conversations.rendering.lengths import LengthReport
from recipes.runs.preset_tokenizer import build_tokenizer

from ..helpers.stages import assistant, byte_tokenizer, user

TOKENIZER = byte_tokenizer()


def conversation(sizes: list[int], system: bool) -> list[dict[str, str]]:
    """Turns of so many letters, no letter in two turns (as far as letters reach)."""
    turns = [{"role": "system", "content": "S"}] if system else []
    for number, size in enumerate(sizes):
        turns += (user, assistant)[number % 2](chr(ord("a") + number) * size)
    return turns


def exchanges(messages):
    first = int(messages[0]["role"] == "system")
    return [[*messages[:first], *messages[i : i + 2]] for i in range(first, len(messages), 2)]


def length(messages) -> int:
    return len(render_conversation(messages, TOKENIZER)["input_ids"])


def fitted(row, **settings):
    report = LengthReport()
    return list(Fitter(TOKENIZER, **settings).pieces(row, report)), report


def trained(pieces) -> str:
    ids = [i for piece_ids, mask in pieces for i, on in zip(piece_ids, mask, strict=True) if on]
    return TOKENIZER.decode(ids)


CONVERSATIONS = st.builds(conversation, st.lists(st.integers(1, 30), min_size=1, max_size=7), st.booleans())


@given(
    messages=CONVERSATIONS,
    limit=st.integers(5, 120) | st.none(),
    too_long=st.sampled_from(["truncate", "drop", "split"]),
    train_on=st.sampled_from(["all_assistant", "last_assistant"]),
)
def test_nothing_is_lost_uncounted_and_nothing_empty_is_trained(messages, limit, too_long, train_on):
    pieces, report = fitted({"messages": messages}, max_length=limit, too_long=too_long, train_on=train_on)
    whole = render_conversation(messages, TOKENIZER, train_on=train_on)
    is_long = limit is not None and len(whole["input_ids"]) > limit
    assert report.rows == 1 and list(report.lengths) == [len(whole["input_ids"])]
    assert all(any(mask) and (limit is None or len(ids) <= limit) for ids, mask in pieces)
    assert len(report.rejected) == (not pieces)
    everything = trained([(whole["input_ids"], whole["assistant_mask"])])
    if not any(whole["assistant_mask"]):
        assert report.rejected[0]["reason"] == NOTHING_TRAINED
    elif not is_long:
        assert trained(pieces) == everything and not report.truncated and not report.split
    elif too_long == "drop":
        assert not pieces and report.rejected[0]["reason"] == f"longer than {limit} tokens"
    else:
        lost = trained(pieces) != everything
        assert everything.startswith(trained(pieces)) or too_long == "split"
        # A row that is dropped is not truncated; one that is may lose nothing but a question that stands last.
        assert report.truncated >= (lost and bool(pieces))
        assert report.truncated == bool(pieces) or too_long == "split"
        assert pieces or report.rejected[0]["reason"] == CUT_AWAY


@given(messages=CONVERSATIONS, limit=st.integers(20, 100))
def test_split_keeps_exchanges_whole_with_the_system_message(messages, limit):
    pieces, report = fitted({"messages": messages}, max_length=limit, too_long="split")
    if length(messages) <= limit or messages[-1]["role"] != "assistant":
        return
    alone = exchanges(messages)
    texts = [TOKENIZER.decode(ids) for ids, _ in pieces]
    start = "<bos>S\n\nUser: " if messages[0]["role"] == "system" else "<bos>User: "
    assert all(text.startswith(start) and text.count("<bos>") == 1 for text in texts)
    for exchange in alone:
        if length(exchange) <= limit and exchange[-1]["role"] == "assistant":
            question, answer = exchange[-2:]
            words = f"User: {question['content']}\n\nAssistant: {answer['content']}<eos>"
            assert sum(words in text for text in texts) == 1
    prompts = [render_conversation(part[:-1], TOKENIZER, add_generation_prompt=True)["input_ids"] for part in alone]
    cut = sum(len(ids) >= limit for ids in prompts)
    assert report.cut_exchanges == cut * bool(pieces) and bool(pieces) == (cut < len(alone))
    assert report.truncated == (any(length(exchange) > limit for exchange in alone) and bool(pieces))
    assert report.split == (len(alone) > 1 and bool(pieces))


def test_split_trains_the_last_answer_once():
    messages = conversation([5, 5] * 4, system=True)
    pieces, report = fitted({"messages": messages}, max_length=60, too_long="split", train_on="last_assistant")
    assert trained(pieces) == " hhhhh<eos>" and len(pieces) == 1 and report.split == 1


def test_a_row_left_out_says_where_it_stood():
    _, report = fitted({"messages": user("x" * 90) + assistant("A"), "origin": "a.jsonl:7"}, max_length=50)
    assert report.rejected == [{"row": 1, "origin": "a.jsonl:7", "reason": CUT_AWAY}]
    assert report.summary(50) == "1 row; 1 dropped (answer cut off entirely)"
    assert report.as_metrics() == {"rows": 1, "truncated": 0, "split": 0, "dropped": 1, "answer_cut_away": 1}


def test_an_exchange_of_a_split_row_whose_answer_is_lost_is_counted():
    messages = [*conversation([3, 3], system=False), *conversation([60, 3], system=False)]
    pieces, report = fitted({"messages": messages}, max_length=50, too_long="split")
    assert trained(pieces) == " bbb<eos>" and not report.rejected
    assert report.summary(50) == (
        "1 row; 1 truncated to 50 tokens; 1 split at turns into parts of up to 50 tokens; "
        "1 exchange of split rows dropped (answer cut off entirely)"
    )


@pytest.mark.parametrize(("too_long", "kept"), [("truncate", [16]), ("split", [16, 16, 10]), ("drop", [])])
def test_plain_text_trains_on_all_but_the_begin_token(too_long, kept):
    pieces, report = fitted({"text": "x" * 40}, max_length=16, too_long=too_long)
    assert [len(ids) for ids, _ in pieces] == kept
    assert all(mask == [int(i != TOKENIZER.bos_token_id) for i in ids] for ids, mask in pieces)
    assert (report.truncated, report.split, len(report.rejected)) == tuple(
        int(too_long == name) for name in ("truncate", "split", "drop")
    )


def test_a_text_too_long_for_fill_in_the_middle_stays_a_text():
    tokenizer = build_tokenizer("tiny")
    text = "x + 1 = y"
    row = {"text": text, "fim": {"mode": "psm", "start": 2, "end": 5}}
    plain, filled = (render_text(each, tokenizer)["input_ids"] for each in ({"text": text}, row))
    assert len(filled) > len(plain)
    report = LengthReport()
    for limit, wanted in ((len(filled), filled), (len(plain), plain), (len(plain) - 2, plain[:-2])):
        ((ids, _),) = Fitter(tokenizer, limit, "truncate").pieces(row, report)
        assert ids == wanted
    assert (report.unfilled, report.truncated) == (2, 1)
    assert "2 too long for fill-in-the-middle, kept as plain text" in report.summary(9)


def test_one_trained_token_behind_the_first_is_enough():
    pieces, report = fitted({"text": "xyz"}, max_length=2, too_long="truncate")
    assert [len(ids) for ids, _ in pieces] == [2] and report.truncated == 1
    pieces, report = fitted({"text": "xyz"}, max_length=1, too_long="truncate")
    assert not pieces and report.rejected[0]["reason"] == CUT_AWAY


def test_data_of_which_nothing_is_left_says_what_would_help():
    _, report = fitted({"messages": user("x" * 90) + assistant("A")}, max_length=50)
    lost = "no row is left to train on: 1 row; 1 dropped (answer cut off entirely)"
    assert report.nothing_left(50) == f"{lost}; the shortest row has 112 tokens: raise training.max_length"
    assert report.nothing_left(112) == report.nothing_left(None) == lost
    _, report = fitted({"messages": user("x" * 90) + assistant("A")}, max_length=50, too_long="drop")
    assert "longer than 50 tokens" in report.nothing_left(50)
    assert LengthReport().nothing_left(50) == "no row is left to train on: 0 rows"


def test_an_answer_by_itself_is_cut_as_in_training():
    """Whatever becomes of long rows there."""
    row = {"prompt": user("x" * 40), "completion": assistant("A" * 9)}
    for limit in (None, 40, 8):
        report = LengthReport()
        [piece] = Fit(TOKENIZER, limit).answers(row, ["completion"], {}, report)
        assert report.truncated == (limit is not None)
        assert Fit(TOKENIZER, limit, "drop").one(row["prompt"], row["completion"]) == piece


def test_pairs_without_a_margin_are_counted_where_others_have_one():
    said = [LengthReport(rows=3, margins=margins).summary(None) for margins in range(4)]
    without = "without a margin, which counts as 0"
    assert said == ["3 rows", f"3 rows; 2 {without}", f"3 rows; 1 {without}", "3 rows"]


def test_a_last_window_of_one_token_is_not_trained():
    """Nothing predicts it: a batch of it alone has no loss."""
    pieces, _ = fitted({"text": "x" * 40}, max_length=41, too_long="split")
    assert [len(ids) for ids, _ in pieces] == [41]  # of 42 with begin and end
