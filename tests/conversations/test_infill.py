"""Plain text and fill-in-the-middle: undoing the transformation gives the text back."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations.errors import ToolkitError
from conversations.rendering.fill_in_the_middle import TOKENS, fim_ids, render_text, with_hole
from recipes.runs.preset_tokenizer import build_tokenizer

from ..helpers.stages import byte_tokenizer

TOKENIZER = build_tokenizer("tiny")
PIECES = [*TOKENS.values(), "<｜end▁of▁sentence｜>", "<｜fim▁", "def f(x):\n", "    return x", "你好", "🙂", " ", "42"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)).map("".join)


def undone(ids: list[int], mode: str) -> str:
    """The text of a rendered fill-in-the-middle row, read from its control tokens."""
    begin, hole, end = fim_ids(TOKENIZER).values()
    assert ids[0] == TOKENIZER.bos_token_id and ids[-1] == TOKENIZER.eos_token_id and ids[1] == begin
    inner = ids[2:-1]
    first, rest = inner[: inner.index(hole)], inner[inner.index(hole) + 1 :]
    second, third = rest[: rest.index(end)], rest[rest.index(end) + 1 :]
    parts = [TOKENIZER.decode(part, clean_up_tokenization_spaces=False) for part in (first, second, third)]
    if mode == "psm":
        prefix, suffix, middle = parts
        return prefix + middle + suffix
    assert parts[0] == ""
    return parts[2] + parts[1]  # prefix and middle are one stretch


@given(text=TEXTS, mode=st.sampled_from(["psm", "spm"]), seed=st.integers(0, 999))
def test_undoing_it_gives_the_text_back(text, mode, seed):
    row = with_hole({"text": text}, 1.0, mode, random.Random(seed))
    rendered = render_text(row, TOKENIZER)
    ids = rendered["input_ids"]
    assert undone(ids, mode) == text
    assert [ids.count(token) for token in fim_ids(TOKENIZER).values()] == [1, 1, 1]  # the text forges none
    assert rendered["assistant_mask"] == [0] + [1] * (len(ids) - 1)


@given(TEXTS)
def test_plain_text_is_begin_text_end(text):
    ids = render_text({"text": text}, TOKENIZER)["input_ids"]
    assert (ids[0], ids[-1]) == (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert TOKENIZER.decode(ids[1:-1], clean_up_tokenization_spaces=False) == text
    assert not set(ids[1:-1]) & set(TOKENIZER.all_special_ids)


def test_holes_are_cut_everywhere_and_as_often_as_asked():
    rng = random.Random(0)
    rows = [with_hole({"text": "abc"}, 0.25, "psm", rng) for _ in range(4000)]
    holes = [(row["fim"]["start"], row["fim"]["end"]) for row in rows if "fim" in row]
    assert len(holes) == pytest.approx(1000, abs=100)
    assert set(holes) == {(start, end) for start in range(4) for end in range(start, 4)}


def test_the_released_order():
    row = {"text": "pmsuffix", "fim": {"mode": "psm", "start": 1, "end": 2}}
    ids = render_text(row, TOKENIZER)["input_ids"]
    order = "<｜fim▁begin｜>p<｜fim▁hole｜>suffix<｜fim▁end｜>m<｜end▁of▁sentence｜>"
    assert TOKENIZER.decode(ids[1:], clean_up_tokenization_spaces=False) == order


def test_a_tokenizer_without_the_tokens_is_refused():
    row = {"text": "text", "fim": {"mode": "psm", "start": 1, "end": 2}}
    with pytest.raises(
        ToolkitError, match="no <｜fim▁begin｜>, <｜fim▁hole｜>, <｜fim▁end｜>; fill-in-the-middle needs"
    ):
        render_text(row, byte_tokenizer())
