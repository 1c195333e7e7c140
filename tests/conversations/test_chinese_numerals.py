"""Chinese numerals in answers: read as numbers where they are the answer, left alone where they are part of a word."""

from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conversations import verify
from conversations.answers.chinese_numerals import read_chinese, with_digits

DIGITS = "零一二三四五六七八九"


def spoken(number: int) -> str:
    """A transcription of how numbers are said: sections of four digits, and one 零 for zeros between others."""
    if number == 0:
        return "零"
    said, sections = "", [number // 10**power % 10**4 for power in (12, 8, 4, 0)]
    for section, unit in zip(sections, ("万", "亿", "万", ""), strict=True):
        for power, small in ((3, "千"), (2, "百"), (1, "十"), (0, "")):
            digit = section // 10**power % 10
            if digit:
                said += DIGITS[digit] + small
            elif said and not said.endswith("零"):
                said += "零"
        if section or (unit == "亿" and sections[0]):
            said = said.rstrip("零") + unit
    said = said.rstrip("零")
    return said.removeprefix("一") if said.startswith("一十") else said


def score(rule: str, answer: str, reference: object) -> float | None:
    return verify(rule, answer, reference=reference).score


@given(st.one_of(st.integers(0, 10**5), st.integers(0, 10**16 - 1)))
@example(10**12)
@example(3 * 10**8 + 5)
def test_numerals_are_what_was_said(number):
    assert read_chinese(spoken(number)) == number
    assert read_chinese(spoken(number).replace("二千", "两千").replace("二百", "两百")) == number


@pytest.mark.parametrize("rule", ["number", "math"])
@pytest.mark.parametrize(
    "form", ["{}", "答案是{}。", "3加4得7，再算一步，等于{}。", "\\boxed{{{}}}", "一共有{}个。", "**答案：{}**"]
)
@given(number=st.one_of(st.integers(2, 120), st.integers(2, 10**9)))
def test_a_numeral_is_the_answer(rule, form, number):
    assert score(rule, form.format(spoken(number)), number) == 1
    assert score(rule, form.format(spoken(number)), number + 1) == 0
    assert score(rule, form.format(number), spoken(number)) == 1  # as the reference


@pytest.mark.parametrize(
    ("written", "digits"),
    [
        ("两百", "200"),
        ("三千五", "3500"),
        ("十万零八", "100008"),
        ("負三十五", "-35"),
        ("贰佰肆拾", "240"),
        ("二〇二六年", "2026年"),
        ("三点一四", "3.14"),
        ("1万", "10000"),
        ("3.5亿", "350000000"),
        ("1,200万元", "12000000元"),
        ("2万5千", "25000"),
        ("3万5000", "35000"),
        ("1 万亿", "1000000000000"),
        ("百分之三十五", "35%"),
        ("百分之3.5", "3.5%"),
        ("负三分之二", "-2/3"),
        ("二又三分之一", "2 1/3"),
        ("千分之五", "5/1000"),
        ("五个苹果", "5个苹果"),
        ("三十千米", "30千米"),
    ],
)
def test_numbers(written, digits):
    assert with_digits(written) == digits
    assert with_digits(f"答案是{written}。") == f"答案是{digits}。"
    assert with_digits(f"Is it {written}?") == f"Is it {digits if written[0] != '五' else written}?"


@pytest.mark.parametrize(
    "text",
    [
        "给你一个苹果。", "我们一起看看。", "第一步", "第三十五页", "万一下雨", "十分好",
        "千万不要", "一五一十地说", "三角形", "星期三", "二三十人", "三四百",
        "三点五十分", "三点五分", "三点半", "合二为一。", "这里有两个关键点。", "这是一个好问题。",
        "5千克", "3 千米", "步骤：一、先算", "100万分之一", "正负二", "十几个",
        "几十个", "3.5万5.2", "五分之", "一点儿", "其中之一。", "有一天。",
    ],
)  # fmt: skip
def test_words_are_no_numbers(text):
    assert with_digits(text) == text
    assert score("number", f"答案是42。{text}", 42) == (0 if any(map(str.isdecimal, text)) else 1)


def test_the_kilogram_is_no_thousand():
    assert score("math", "答案是五千克。", "5 千克") == 1
    assert score("number", "一共两千克。", 2) == 1
    assert score("number", "一共两千。", 2000) == 1


@given(st.text("零一两十百千万亿点负又分之第是个0123456789., 。\n", max_size=60))
def test_any_text_is_read(text):
    """No text raises, and what is read once stays as it is."""
    assert with_digits(with_digits(text)) is not None
    assert verify("number", text, reference=5).score in (0, 1)


def test_long_texts_take_no_time():
    for text in ("一" * 20_000, "十" * 20_000, "1万" * 10_000, "一分之" * 7_000, "三点" * 10_000):
        with_digits(text)
    assert read_chinese("九" * 41) is None
    assert read_chinese("三点一") == Decimal("3.1")
