import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations.errors import ToolkitError
from conversations.verifiers import (
    language_matches,
    language_of,
    last_integer,
    math_matches,
    number_matches,
    refusal_check,
    sentences,
    well_formed,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 12.", 12),
        ("10-3", 3),
        ("10 - 3 = 7, so 7!", 7),
        ("= -5", -5),
        ("(-5)", -5),
        ("x=-7", -7),
        ("1,234,567 apples", 1234567),
        ("3.0", 3),
        ("72.50", None),
        ("first 5, then 2.5", None),
        ("答案是42。", 42),
        ("none", None),
        ("", None),
    ],
)
def test_last_integer(text, number):
    assert last_integer(text) == number


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "it is {}.", "so {:,}!", "a 5 and then {}", "是{}。"]))
def test_last_integer_finds_what_was_written(number, form):
    assert last_integer(form.format(number)) == number


def test_number_matches_reads_worked_solutions():
    assert number_matches("so 72 clips", "48 / 2 = 24, 48 + 24 = 72\n#### 72")
    assert not number_matches("72 or 73", "#### 72")
    assert not number_matches("no idea", "72")
    with pytest.raises(ToolkitError, match="whole number"):
        number_matches("72", "many")


def test_math_matches_equal_expressions():
    assert math_matches("The answer is $\\frac{1}{2}$.", "0.5")
    assert math_matches("72", "48 + 24 = 72\n#### 72")
    assert not math_matches("$\\frac{1}{3}$", "0.5")
    assert not math_matches("no idea", "0.5")
    with pytest.raises(ToolkitError, match="expression"):
        math_matches("72", "")


def test_math_matches_in_a_thread():
    """math-verify's own limit of time needs the main thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(math_matches("72", "72")))
    thread.start()
    thread.join()
    assert found == [True]


def test_languages():
    assert language_of("What is 3?") == "en"
    assert language_of("3 加 4 等于几？") == "zh"
    assert language_of("iPhone 多少钱") == "zh"
    assert language_of("12 + 3 =") is None
    assert language_matches("What is 3 + 4?", "It is 7.")
    assert not language_matches("What is 3 + 4?", "是 7。")
    assert not language_matches("3 加 4 等于几？", "It is 7.")
    assert language_matches("3 加 4 等于几？", "7")
    assert language_matches("3 + 4 =", "seven")


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("It is 12.", True),
        ("1000000 is a million", True),
        ("  ", False),
        ("ha ha ha ha ha", False),
        ("是是是是是", False),
        ("It is 12.\nUser: and 5?", False),
        ("It is 12.<｜end▁of▁sentence｜>", False),
        ("no no no no", True),
    ],
)
def test_well_formed(text, good):
    assert well_formed(text) is good


def test_sentences_of_both_languages():
    assert sentences("Sorry, no. It is 3.5 m!抱歉，不能。好") == ["Sorry, no.", "It is 3.5 m!抱歉，不能。", "好"]
    assert sentences(" \n ") == []


def test_refusals_by_the_usual_patterns():
    refuses = refusal_check()
    assert refuses("I am sorry, that could harm someone, so I cannot help.")
    assert refuses("Hello. I can't do that.")
    assert refuses("对不起，这会伤人，我不能帮忙。")
    assert not refuses("Sure, then take your time.")
    assert not refuses("Sorry! I was late. It is 7.")
    assert not refuses("")


def test_refusals_look_at_one_sentence_at_a_time():
    refuses = refusal_check([r"sorry.*no"])
    assert refuses("SORRY, no.")
    assert not refuses("Sorry to be late. It is no trouble.")


def test_bad_refusal_pattern_is_named():
    with pytest.raises(ToolkitError, match=r"\(\["):
        refusal_check(["(["])


@settings(max_examples=50)
@given(st.text())
def test_checks_take_any_text(text):
    last_integer(text)
    well_formed(text)
    language_of(text)
    refusal_check()(text)
    assert math.isfinite(last_integer(text) or 0)
