"""The rule `ifeval`: each of the 25 instructions followed and not, in English and in Chinese; strict and loose."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations import load_conversations, verify
from conversations.answers.instructions import INSTRUCTIONS, sentence_count
from conversations.answers.rules import check_reference
from conversations.errors import ToolkitError
from recipes.cli import main as dsv2

AT_LEAST, LESS = "at least", "less than"
ENGLISH = "this is an answer in plain words that says nothing of interest to anybody."
# instruction: (arguments, answers that follow it, answers that do not)
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, ["A Cat and DOGS."], ["A cat.", "c a t dog"]),
    ("keywords:existence", {"keywords": ["猫"]}, ["我有一只猫。"], ["我有一只狗。"]),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": AT_LEAST},
        ["War and war", "war, warm"],
        ["War."],
    ),
    ("keywords:frequency", {"keyword": "和", "frequency": 2, "relation": LESS}, ["我和你"], ["你和我和他"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, ["A rocket."], ["A ROCK.", "rock"]),
    ("keywords:forbidden_words", {"forbidden_words": ["石头"]}, ["一座山"], ["一块大石头在这里"]),
    ("keywords:forbidden_words", {"forbidden_words": ["c++", "a.b"]}, ["c and axb"], ["I like C++."]),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 3, "let_relation": AT_LEAST},
        ["E see"],
        ["see", "abc"],
    ),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": LESS}, ["a!", "a"], ["a!!"]),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist ein ganz gewöhnlicher Satz.", "42"],
        [ENGLISH, "这是一句话。", "Это обычное предложение."],
    ),
    (
        "language:response_language",
        {"language": "mr"},
        ["मी घरी जात आहे आणि पुस्तक वाचतो."],
        ["मैं घर जा रहा हूँ और किताब पढ़ता हूँ।"],
    ),
    ("language:response_language", {"language": "zh-cn"}, ["这是一个普通的句子。"], [ENGLISH, "これは普通の文です。"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n\n***\nb\n***", "一\n***\n二"],
        ["a\n\nb", "a\n***\n***\nb", "a\n***\nb\n***\nc"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": AT_LEAST},
        ["one two three four", "我们是人", "it's so-so"],
        ["one two, three", "我们人"],
    ),
    ("length_constraints:number_words", {"num_words": 4, "relation": LESS}, ["a b c"], ["a b c d"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": LESS},
        ["Mr. Smith left at 5 p.m. by car. Why?", "你好。很好！"],
        ["One. Two. Three", "一。二！三？"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": AT_LEAST},
        ["Hello! how are you?", "是。“好。”"],
        ["Only one, e.g. this.", "只有一句，对。"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Spring"},
        ["Now.\n\nspring, at last.", 'Now.\n\n"Spring" it is.'],
        ["Spring.\n\nNow.", "Now.\n\nSpringtime.", "Now.\n\nSpring.\n\nLast.", "Spring"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "春天"},
        ["春天来了。"],
        ["今年春天来了。"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Yours\nP.S. more", "p. s. x"],
        ["Yours", "PS x"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a\nP.P.S more"], ["a\nP.S. more"]),
    ("detectable_content:postscript", {"postscript_marker": "附言"}, ["好。\n附言：再见"], ["好。\n再见"]),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[a] to [b c]", "[姓名][地址]"],
        ["[a]", "(a)(b)"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "So:\n- 一\n  - 二"],
        ["* a", "* a\n* b\n- c", "**a**\n**b**"],
    ),
    ("detectable_format:title", {}, ["<<Ode>>\nText", "<<颂歌>>"], ["<Ode>", "<<>>", "<<\nOde>>", "<< >>"]),
    ("detectable_format:constrained_response", {}, ["My answer is no."], ["No.", "my answer is no"]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**一** *二*"],
        ["*a*", "** * **", "*\f* *\u00a0*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na", "Section one, Section two", "SECTION 1 SECTION 2"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "第", "num_sections": 2},
        ["第1节 第 2 节"],
        ["第一节 第二节"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"好": [1]}\n```', "```\n[]\n```"],
        ["{a: 1}", 'Sure: {"a": 1}', "[" * 5000],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, ["say it. Now: it"], ["Now: say it.", "Say"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "说吧"}, ["说吧 好的"], ["好的 说吧"]),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******\n一\n******\n二"],
        ["a\n******\na", "a", "a******b******c", "a\n***\nb"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["AI and U.S. law", "I'm an AI"],
        ["An AI", "Ai aI"],
    ),
    (
        "change_case:english_capital",
        {},
        [ENGLISH.upper(), "HELLO WORLD"],
        [ENGLISH, "DAS IST EIN GANZ NORMALER DEUTSCHER SATZ", "你好"],
    ),
    (
        "change_case:english_lowercase",
        {},
        [ENGLISH],
        [ENGLISH.title(), "das ist ein ganz normaler deutscher satz", "你好"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Any questions?"},
        ['Bye. "Any Questions?"', "any questions? "],
        ["Any questions? No.", "Bye."],
    ),
    ("startend:end_checker", {"end_phrase": "还有问题吗？"}, ["好。还有问题吗？"], ["还有问题吗？没有"]),
    ("startend:quotation", {}, ['"All of it."', "“都是。”"], ['"', 'He said "so"', "'single'", "“"]),
    ("punctuation:no_comma", {}, ["No pause at all", "没有。"], ["Well, no", "嗯，有", "一、二"]),
]


def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"instruction_id_list": [name], "kwargs": [arguments]}


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), CASES)
def test_an_instruction_is_followed_or_not(
    name: str, arguments: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    for answer, score in [*((text, 1.0) for text in right), *((text, 0.0) for text in wrong)]:
        verdict = verify("ifeval", answer, reference=row(name, arguments))
        assert verdict.score == score, answer
        assert (name in verdict.reason) == (score == 0)
    assert verify("ifeval", " \n", reference=row(name, arguments)).score == 0


def test_all_instructions_are_there_and_tried() -> None:
    assert len(INSTRUCTIONS) == 25 and {case[0] for case in CASES} == set(INSTRUCTIONS)


SEVERAL = {
    "key": 1,
    "prompt": "?",
    "instruction_id_list": ["punctuation:no_comma", "startend:quotation", "detectable_format:title"],
    "kwargs": [{"num_words": None, "relation": None}, None, {}],
}


def test_all_or_the_share() -> None:
    verdict = verify("ifeval", '"no pause"', reference=SEVERAL)
    assert verdict.score == 0 and verdict.reason == "follows 2 of 3 instructions, not detectable_format:title"
    assert verify("ifeval", '"no pause"', reference=SEVERAL, partial=True).score == pytest.approx(2 / 3)
    assert verify("ifeval", '"<<T>> no pause"', reference=json.dumps(SEVERAL)).score == 1
    floats = row("length_constraints:number_words", {"num_words": 2.0, "relation": "less than"})
    assert verify("ifeval", "one", reference=floats).score == 1


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ('Sure, here:\n"so"', "startend:quotation"),
        ('"so"\nAnything else?', "startend:quotation"),
        ('Sure:\n"so"\nBye.', "startend:quotation"),
        ('**"so"**', "startend:quotation"),
        ("好，给你：\n“都是”", "startend:quotation"),
        ("Well, sure.\nnone here", "punctuation:no_comma"),
    ],
)
def test_loose_leaves_out_what_stands_around_an_answer(answer: str, name: str) -> None:
    assert verify("ifeval", answer, reference=row(name, {})).score == 0
    assert verify("ifeval", answer, reference=row(name, {}), loose=True).score == 1
    assert verify("ifeval", "", reference=row(name, {}), loose=True).score == 0


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("7", "must be {instruction_id_list, kwargs}"),
        (
            [1],
            r"^a reference for the rule ifeval must be \{instruction_id_list, kwargs\}, .* IFEval, not '\[1\]'$",
        ),
        (
            ["\ud800", {1, 2}],
            "rule ifeval must be {instruction_id_list, kwargs}, as in a row of IFEval: Object of type set",
        ),
        ({"instruction_id_list": []}, "must be {instruction_id_list"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "for each of 1 instructions"),
        (row("punctuation:no_coma", {}), "did you mean 'punctuation:no_comma'"),
        (row("paragraphs", {}), "IFEval has no instruction 'paragraphs'"),
        ({"instruction_id_list": [3]}, "IFEval has no instruction"),
        (row("startend:end_checker", {}), r"must be \{end_phrase\}, not \{\}"),
        (row("punctuation:no_comma", {"n": 1}), r"must be \{\}, not \{n\}"),
        (
            row("startend:end_checker", {"end_phrase": " "}),
            "end_phrase of startend:end_checker must be a non-empty string",
        ),
        (row("keywords:existence", {"keywords": "cat"}), "keywords of keywords:existence must be a list of strings"),
        (
            row("detectable_format:number_bullet_lists", {"num_bullets": "3"}),
            "must be a non-negative whole number, not '3'",
        ),
        (
            row("detectable_format:number_bullet_lists", {"num_bullets": 1.5}),
            "must be a non-negative whole number, not 1.5",
        ),
        (row("length_constraints:number_words", {"num_words": 3, "relation": "over"}), "one of less than, at least"),
        (
            row("language:response_language", {"language": "xx"}),
            "language of language:response_language must be one of",
        ),
        (row("language:response_language", {"language": ["en"]}), "must be one of"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [3]}, "must be an object"),
    ],
)
def test_references_that_cannot_be_checked(reference: Any, why: str) -> None:
    with pytest.raises(ToolkitError, match=why):
        check_reference("ifeval", reference)
    with pytest.raises(ToolkitError, match=why):
        verify("ifeval", "an answer", reference=reference)


@given(st.text(max_size=80))
def test_any_answer_gets_a_verdict(text: str) -> None:
    for name, arguments, _, _ in CASES:
        assert verify("ifeval", text, reference=row(name, arguments), loose=True).score in (0, 1)


@pytest.mark.parametrize("part", ["<<", "[", "*", "\n", "Mr. ", "a.\n", " -\n", "***", '"', "P.", "1. ", "a", "\\u"])
def test_answers_made_to_hang(part: str) -> None:
    for name, arguments, _, _ in CASES:
        verify("ifeval", part * (60_000 // len(part)), reference=row(name, arguments))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("He said “Go!” and left. So?", 2),
        ("1. First do it.\n2. Then this.", 2),
        ("I live in the U.S. It is big.", 2),
        ("J. R. Smith paid 3.50 etc. in cash. So did I. Ok", 3),
        ("他说：“走吧！”然后走了。", 2),
        ("...", 0),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert sentence_count(text) == count


def test_rows_of_ifeval_are_read_as_prompts(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{**SEVERAL, "key": n, "prompt": f"Say {n}."} for n in range(32)]
    Path("ifeval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    first = next(iter(load_conversations("ifeval.jsonl")))
    assert first["messages"] == [{"role": "user", "content": "Say 0."}] and first["meta"] == {"key": 0}
    assert verify("ifeval", '"<<T>>"', reference=first["reference"]).score == 1

    words = ["model.path=base", "model.preset=tiny", "output_dir=run", 'data=[{"path": "ifeval.jsonl"}]']
    rewards = 'rewards=[{"rule": "ifeval", "settings": {"loose": true, "partial": true}}]'
    assert dsv2(["check", "tiny/rl_reasoning", *words, rewards]) == 0
    rows[2]["kwargs"] = [{}]
    Path("ifeval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    capsys.readouterr()
    assert dsv2(["check", "tiny/rl_reasoning", *words, rewards]) == 2
    said = capsys.readouterr().err
    assert "ifeval.jsonl:3" in said and "for each of 3 instructions" in said and "Traceback" not in said
