"""The rules `choice` and `repetition`."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations import verify
from conversations.answers.choice import options_in
from conversations.answers.rules import check_reference
from conversations.errors import ToolkitError
from recipes.cli import main as dsv2

LETTERS = "ABCDEFGHIJ"
CITIES = "Which city is the capital of France?\nA. Rome\nB. Paris\nC. Berlin\nD. Bern"
SENTENCES = [
    "{}", "({})", "{}.", "**{}**", "\\boxed{{{}}}", "\\boxed{{\\text{{{}}}}}", "The answer is {}.",
    "The answer is ({}).", "So the correct option is {}.", "I think it is option {}.", "Answer: {}",
    "<answer>{}</answer>", "答案是{}。", "答案：{}", "选{}。", "故选{}",
    "Let us see. Rome is in Italy.\n\nTherefore, the answer is ({}).", "<think>Maybe A. Or B?</think>{}",
    "We compare them.\n#### {}", "$\\boxed{{{}}}$",
]  # fmt: skip


def score(answer: str, reference: str, prompt: str | None = None) -> float | None:
    return verify("choice", answer, reference=reference, prompt=prompt).score


@pytest.mark.parametrize("sentence", SENTENCES)
def test_each_letter_is_itself_and_no_other(sentence: str) -> None:
    for letter in LETTERS:
        for right in LETTERS:
            assert score(sentence.format(letter), right) == (letter == right), (sentence, letter, right)


@pytest.mark.parametrize(
    "sentence", ["{}", "({})", "The answers are {}.", "\\boxed{{{}}}", "答案是{}。", "So {} are right."]
)
@pytest.mark.parametrize("written", ["A, C", "A and C", "A、C", "A,C", "A & C", "(A) and (C)"])
def test_several_are_right_together(sentence: str, written: str) -> None:
    answer = sentence.format(written)
    for reference, right in (
        ("A, C", True),
        ("AC", True),
        ("A and C", True),
        ("A", False),
        ("C", False),
        ("ACD", False),
    ):
        assert score(answer, reference) == right, (answer, reference)


@pytest.mark.parametrize(
    "answer", ["b", "(b)", "b.", "**b**", "\\boxed{b}", "<answer>b</answer>", "Ｂ", "选Ｂ。", "（Ｂ）"]
)
def test_a_small_letter_alone_and_a_wide_one(answer: str) -> None:
    assert score(answer, "B") == 1 and score(answer, "A") == 0
    assert score("a", "B", "Which letter follows a?\nA. b\nB. a") == 1  # an option's text goes before
    assert score("b is what I take", "B") == 0


def test_letters_without_marks_are_in_order() -> None:
    assert score("ACD", "A, C, D") == 1
    assert score("BAD", "ABD") == 0  # a word
    assert score("A", "A, C") == 0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", 1), ("Paris", 1), ("B. Paris", 1), ("(B) Paris", 1), ("It is Paris.", 1), ("The answer is Paris.", 1),
        ("The capital is \\boxed{Paris}.", 1), ("Rome", 0), ("A", 0), ("It is Rome, not Paris: A", 0), ("Bern", 0),
        ("I do not know.", 0), ("", 0), ("Paris or Rome", 0),
    ],
)  # fmt: skip
def test_the_options_of_the_prompt_say_which_letter_is_right(answer: str, right: float) -> None:
    assert score(answer, "B", CITIES) == right
    assert score(answer, "Paris", CITIES) == right
    shuffled = "Which city is the capital of France?\nA. Paris\nB. Rome\nC. Berlin\nD. Bern"
    assert score("A", "Paris", shuffled) == 1 and score("B", "Paris", shuffled) == 0


@pytest.mark.parametrize(
    "prompt",
    [
        CITIES,
        "Capital?\n(A) Rome\n(B) Paris\n(C) Berlin\n(D) Bern",
        "Capital? A. Rome B. Paris C. Berlin D. Bern",
        "哪个是首都？\nA、Rome\nB、Paris\nC、Berlin\nD、Bern",
        "A. No question.\nB. None\n\nCapital?\nA) Rome\nB) Paris\nC) Berlin\nD) Bern",
    ],
)
def test_options_are_found_in_a_prompt(prompt: str) -> None:
    assert options_in(prompt) == {"A": "Rome", "B": "Paris", "C": "Berlin", "D": "Bern"}


def test_a_reference_that_is_not_an_option_gives_no_score() -> None:
    verdict = verify("choice", "A", reference="London", prompt=CITIES)
    assert verdict.score is None and "not one of the prompt's options" in verdict.reason
    with pytest.raises(ToolkitError, match="must be letters"):
        check_reference("choice", " ")


def test_check_refuses_a_row_whose_reference_is_not_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": CITIES, "reference": city} for city in ("Paris", "B", "London")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"model": {"path": "base", "preset": "tiny"}, "data": [{"path": "rows.jsonl"}], "output_dir": "run"}
    stages = [
        {"stage": "eval", "tasks": [{"name": "a", "metric": "exact_match", "rule": "choice"}]},
        {"stage": "rl", "rewards": [{"rule": "choice"}]},
    ]
    for stage in stages:
        Path("recipe.yaml").write_text(json.dumps(recipe | stage))
        assert dsv2(["check", "recipe.yaml"]) == 2
        assert "rows.jsonl:3: cannot be judged by the rule choice: 'London' is not one" in capsys.readouterr().err


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_text_gets_a_verdict(answer: str, prompt: str) -> None:
    assert score(answer, "B", prompt) in (0, 1)


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("", 1, 1),
        ("A short answer.", 1, 1),
        ("The ones are two, and the tens are four, so the result is forty-two.", 1, 1),
        ("go on and on " * 30, 0, 0.1),
        ("我们再来看一下。" * 20, 0, 0.1),
        ("First we add the ones, then we add the tens. Again: first we add the ones, then we add the tens.", 0.5, 0.8),
        ("```\n" + "x = x + 1\n" * 50 + "```", 1, 1),
    ],
)
def test_repetition_is_the_share_of_what_is_new(text: str, least: float, most: float) -> None:
    verdict = verify("repetition", text)
    assert verdict.score is not None and least <= verdict.score <= most, verdict
    assert verify("repetition", text, n=1000).score == 1
