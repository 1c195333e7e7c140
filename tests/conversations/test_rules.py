"""The rules through their one entry, `conversations.verify`."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations import verify
from conversations.answers.rules import RULES, check_reference, check_rule
from conversations.answers.text import sentences
from conversations.answers.verdict import Verdict, shown
from conversations.errors import ToolkitError

DATA = Path(__file__).parents[1] / "data"


def score(name: str, answer: str, reference: object = None, **more: object) -> float | None:
    return verify(name, answer, reference=reference, **more).score  # type: ignore[arg-type]


# --- the entry


def test_verify_is_loaded_without_torch():
    use = "from conversations import verify; verify('number', '1', reference='1')"
    code = f"import sys; {use}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_unknown_rules_and_settings_name_the_nearest():
    with pytest.raises(ToolkitError, match=r"unknown rule 'nubmer' \(did you mean 'number'\?\).*refusal"):
        verify("nubmer", "7", reference="7")
    with pytest.raises(ToolkitError, match=r"no setting 'pattern' \(did you mean 'patterns'\?\)"):
        verify("refusal", "7", pattern=["a"])


def test_rules_without_what_they_need_say_nothing():
    assert verify("number", "7").score is None and "reference" in verify("math", "7").reason
    assert verify("language", "7").score is None and "prompt" in verify("language", "7").reason


def test_references_may_be_numbers():
    assert score("number", "It is 7.", 7) == score("math", "It is 3.5.", 3.5) == 1
    with pytest.raises(ToolkitError, match="text or a number"):
        check_reference("math", ["7"])


@pytest.mark.parametrize(
    ("rule", "reference"),
    [("number", "many"), ("number", "3.5"), ("number", "1/2"), ("number", ""), ("math", " "), ("math", r"\frac{1}{2")],
)
def test_references_that_cannot_be_read(rule, reference):
    with pytest.raises(ToolkitError, match="reference"):
        check_reference(rule, reference)
    with pytest.raises(ToolkitError, match="reference"):
        verify(rule, "7", reference=reference)
    check_reference("format", reference)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"completion": None}, "an answer must be a text, not None"),
        ({"prompt": [{"role": "user"}]}, "a prompt must be a text, or messages with a text"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "1?"}]}]}, "a prompt must be a text, or"),
    ],
)
def test_arguments_of_another_form_are_one_message(arguments, why):
    with pytest.raises(ToolkitError, match=why):
        verify("language", **{"completion": "7", "prompt": "3?", **arguments})


def test_a_long_text_without_an_answer_is_no_reference():
    with pytest.raises(ToolkitError, match="long text"):
        check_reference("math", "we begin with what is known and then go on to what follows from it " * 3)


# The rules `code` and `lean` run what they are given: test_code_rule.py, test_lean_rule.py.
TEXT_RULES = [name for name in RULES if not RULES[name].of_rows and RULES[name].need is None]
NEEDED = {"length": {"tokens": 7, "max_tokens": 8, "buffer": 4}}  # settings


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from("\\{}$^_()[]0123456789.,:%-+*/ #是"), max_size=60))
def test_any_answer_gets_a_verdict(text):
    for name in TEXT_RULES:
        reference = "B" if name == "choice" else "7"
        verdict = verify(name, text, prompt="What is 3?", reference=reference, **NEEDED.get(name, {}))
        assert verdict.score is not None and 0 <= verdict.score <= 1 and verdict.reason


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^9}}", "10^(10^10)", "1000000000!", "(((((", "\\frac{1}{0}", "{" * 5000, "\\boxed{" * 500, "a" * 50_000,
        "9" * 30_000, "\\Gamma(10^{9})", "1e999999999", "[" * 300, "$" * 999, "\\begin{pmatrix}", "0/0",
        "x" * 999 + "=1", "1," * 5000,
    ],
)  # fmt: skip
def test_answers_made_to_hang_or_crash(text):
    for name in TEXT_RULES:
        reference = "B" if name == "choice" else "7"
        score = verify(name, text, prompt="3?", reference=reference, **NEEDED.get(name, {})).score
        assert score is not None and 0 <= score <= 1
        assert verify("math", f"\\boxed{{{text}}}", reference=r"\frac{x}{2}").score == 0


@pytest.mark.parametrize("rule", ["math", "number", "choice"])
def test_boxes_that_never_close_are_looked_through_once(rule):
    """An answer of nothing else took a second and more for each."""
    reference, began = "B" if rule == "choice" else "7", time.process_time()
    assert verify(rule, "\\boxed{" * 2800, reference=reference).score == 0
    assert verify(rule, "\\boxed{" * 2800 + f"\\boxed{{{reference}}}", reference=reference).score == 1
    assert time.process_time() - began < 1


# --- number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 12.", 12),
        ("10-3", 3),
        ("10 - 3 = 7, so 7!", 7),
        ("= -5", -5),
        ("(-5)", -5),
        ("x=-7", -7),
        ("x = −5", -5),
        ("x = –5", -5),
        ("1,234,567 apples", 1234567),
        ("\\boxed{9{,}500}", 9500),
        ("-$50", -50),
        ("It costs $50.", 50),
        ("4/2", 2),
        ("$\\frac{12}{4}$", 3),
        ("10^6", 10**6),
        ("2^{10}", 1024),
        ("10²", 100),
        ("3.0", 3),
        ("1.5e3", 1500),
        ("an area of 5 m^2", 5),
        ("答案是42。", 42),
        ("So \\boxed{5}, which is the third of 7.", 5),
        ("#### Step 1\nThe sum is 7.", 7),
        ("3 of 7\n#### 10", 10),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_last_number(text, number):
    assert score("number", text, str(number)) == 1
    assert score("number", text, str(number)[:-1] + "6") == 0


@pytest.mark.parametrize(
    ("text", "other"),
    [("x = −5", 5), ("1/2", 2), (".5", 5), ("10^6", 6), ("72.50", 72), ("none", 0), ("", 0), ("first 5, then 2.5", 5)],
)
def test_no_part_of_a_number_counts(text, other):
    assert score("number", text, other) == 0


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "it is {}.", "so {:,}!", "a 5 and then {}", "是{}。"]))
def test_the_last_number_is_what_was_written(number, form):
    assert score("number", form.format(number), number) == 1
    assert score("number", form.format(number), number + 1) == 0


def test_worked_solutions_are_references():
    assert score("number", "so 72 clips", "48 / 2 = 24, 48 + 24 = 72\n#### 72") == 1
    assert score("number", "72 or 73", "#### 72") == 0


# --- refusal


def refusal_list(name: str = "refusals.tsv") -> list[tuple[float, str]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [(float(line.split("\t")[0]), line.split("\t")[1]) for line in lines]


@pytest.mark.parametrize(("name", "least"), [("refusals.tsv", 200), ("refusals_held_out.tsv", 200)])
def test_refusals_precision_and_recall(name: str, least: int):
    """Of the lists that docs/rules.md speaks of."""
    rows = refusal_list(name)
    assert len(rows) >= least and len({sentence for _, sentence in rows}) == len(rows)
    assert [sentence for is_refusal, sentence in rows if score("refusal", sentence) != is_refusal] == []


def test_refusals_look_at_one_sentence_at_a_time():
    assert score("refusal", "SORRY, no.", patterns=[r"sorry.*no"]) == 1
    assert score("refusal", "Sorry to be late. It is no trouble.", patterns=[r"sorry.*no"]) == 0
    assert score("refusal", "Hello. I can’t do that.") == 1
    assert score("refusal", "") == 0


def test_sentences_are_never_empty():
    assert sentences("  One.  \n\n  Two!  三。 \n ") == ["One.", "Two!", "三。"]


def test_what_is_shown_of_an_answer_is_short():
    assert shown("a" * 60) == repr("a" * 60) and shown("a" * 61) == repr("a" * 57 + "...")
    assert shown(" a \n b ") == "'a b'"


def test_bad_refusal_pattern_is_named():
    with pytest.raises(ToolkitError, match=r"\(\["):
        verify("refusal", "a", patterns=["(["])


# --- format and language


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("It is 12.", True),
        ("1000000 is a million", True),
        ("['a', 'ccccc']", True),
        ("Name: _____", True),
        ("哈哈哈哈哈，太好了！", True),
        ("no no no no", True),
        ("No. No.", True),
        ("```\n1 1 1 1 1 1 1\nx = 1\nx = 1\n```\nThat is it.", True),
        ("$1 + 1 + 1 + 1 + 1$", True),
        ("The rows are\n0 0 1\n0 1 0", True),
        ("  ", False),
        ("ha ha ha ha ha", False),
        ("是是是是是", False),
        ("42 42 42", False),
        ("It is 7. It is 7.", False),
        ("答案是七。答案是七。", False),
        ("It is so. Yes. It is so. Yes. It is so.", False),
        ("thethethethethe", False),
        ("It is 12.\nUser: and 5?", False),
        ("It is 12.<｜end▁of▁sentence｜>", False),
    ],
)
def test_well_formed(text, good):
    assert score("format", text) == good
    assert score("format", text, finished=False) == 0


@pytest.mark.parametrize(
    ("prompt", "answer", "wanted"),
    [
        ("What is 3 + 4?", "It is 7.", 1),
        ("What is 3 + 4?", "是 7。", 0),
        ("3 加 4 等于几？", "It is 7.", 0),
        ("3 加 4 等于几？", "7", 1),
        ("3 + 4 =", "seven", 1),
        ("iPhone 多少钱", "两千元。", 1),
        ("写一个函数", "```python\ndef add(a, b): return a + b  # adds two given numbers\n```\n好的", 1),
        ("求导数", "导数是 $\\text{derivative of the function } 2x$。", 1),
        ("这是什么？", "これはペンです。", 0),
        ("What is it?", "Это кошка.", 0),
        ("Translate into Chinese: hello", "你好", None),
    ],
)
def test_languages(prompt, answer, wanted):
    assert score("language", answer, prompt=prompt) == wanted
    turns = [{"role": "system", "content": "你是助手。"}, {"role": "user", "content": prompt}]
    assert score("language", answer, prompt=turns) == wanted


def test_math_in_a_thread():
    """math-verify's own limit of time needs the main thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(score("math", "$(x+1)^2$", "x^2 + 2x + 1")))
    thread.start()
    thread.join()
    assert found == [1]


# --- tags and schemas


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<think>2 + 2</think>\n<answer>4</answer>", 1),
        ("So:\n<think>2 + 2</think> and <answer>4</answer>.", 1),
        ("<answer>4</answer><think>2 + 2</think>", 0),
        ("<think>2 + 2</think>", 0),
        ("<think> </think><answer>4</answer>", 0),
        ("<think>2</think><think>3</think><answer>4</answer>", 0),
        ("<think>2<answer>4</answer></think>", 0),
        ("<think>2</think><answer>4", 0),
        ("4", 0),
    ],
)
def test_tags_stand_once_and_in_order(text, good):
    assert verify("format", text, tags=["think", "answer"]).score == good


SCHEMA = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"answer": 4}', 1),
        ('Here it is:\n```json\n{"answer": 4}\n```', 1),
        ('```\n{"answer": 4, "why": "2 + 2"}\n```', 1),
        ('{"answer": "4"}', 0),
        ("{}", 0),
        ("4", 0),
        ('{"answer": 4', 0),
        ("[" * 100_000, 0),
        ('It is {"answer": 4}', 0),
        ('{"answer": 4, "why": NaN}', 0),  # Python reads it, JSON has no such value
    ],
)
def test_json_conforms_to_the_schema(text, good):
    assert verify("format", text, schema=SCHEMA).score == good


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"schema": {"type": "number of apples"}}, "is not a JSON schema"),
        ({"schema": {"$ref": "http://127.0.0.1:9/x.json"}}, "which is not looked up"),
        ({"schema": {"properties": {"a": {"$ref": "other.json"}}}}, "which is not looked up"),
        ({"schema": {"enum": {1, 2}}}, "must be a JSON schema"),
        ({"schema": {"items": {"$ref": "#/$defs/node"}}}, "refers to '#/.defs/node', which it does not define"),
        ({"tags": ["a b"]}, "must be names"),
        ({"tags": [3]}, "must be names"),
        ({"tags": "think"}, "must be a list"),
        ({"patterns": "[a-z]+"}, "must be a list"),
        ({"schema": ["a"]}, "must be an object"),
        ({"finished": 1}, "must be true or false"),
        ({"patterns": ["("]}, "not a regular expression"),
        ({"patern": ["a"]}, "did you mean 'patterns'"),
    ],
)
def test_settings_that_cannot_be_read_are_one_message(settings, why):
    with pytest.raises(ToolkitError, match=why):
        check_rule("format", settings)


def test_a_schema_may_refer_to_itself():
    tree = {"$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "$ref": "#/$defs/node"}
    assert verify("format", "[[], [[]]]", schema=tree).score == 1
    assert verify("format", "[[], [1]]", schema=tree).score == 0


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("[" * 300 + "]" * 300, {"items": {"$ref": "#"}}),
        ("1" + "0" * 400, {"multipleOf": 0.1}),
    ],
)
def test_json_that_cannot_be_checked_scores_nothing(text, schema):
    verdict = verify("format", text, schema=schema)
    assert verdict.score == 0 and "the JSON cannot be checked: " in verdict.reason


SLOW = r"^(\w?\w?\w?\w?\s?)+(\w|\w\w|\s)+(\w|\w\w|\s)+!$"


@pytest.mark.parametrize("schema", [{"pattern": SLOW}, {"patternProperties": {SLOW: {}}}])
def test_a_pattern_of_a_schema_has_a_time_limit(schema, monkeypatch):
    monkeypatch.setattr("conversations.answers.text.MOST_SECONDS", 0.002)
    text = " ".join(f"w{i}x{i * 7}" for i in range(200)) + " ! a"
    with pytest.raises(ToolkitError, match=r"took more than 0\.002 s, .* without nested repeats"):
        verify("format", json.dumps(text if "pattern" in schema else {text: 1}), schema=schema)


@pytest.mark.parametrize(
    ("text", "score"), [('"aa"', 1), ('"ab"', 0), ("7", 1), ('{"aa": 1}', 1), ('{"aa": "1"}', 0), ('{"b": "1"}', 1)]
)
def test_patterns_of_a_schema(text, score):
    schema = {"pattern": "^a+$", "patternProperties": {"^a": {"type": "integer"}}}
    assert verify("format", text, schema=schema).score == score


# --- length


@pytest.mark.parametrize(
    ("tokens", "score"), [(0, 1), (1, 1), (60, 1), (61, 0.975), (80, 0.5), (99, 0.025), (100, 0), (101, 0), (9999, 0)]
)
def test_length_is_the_soft_overlong_penalty_plus_one(tokens, score):
    verdict = verify("length", "whatever", tokens=tokens, max_tokens=100, buffer=40)
    assert verdict.score == pytest.approx(score) and f"{tokens:,} tokens" in verdict.reason


@given(st.integers(1, 10**6), st.data())
def test_length_never_grows_with_the_tokens(max_tokens, data):
    buffer = data.draw(st.integers(1, max_tokens))
    tokens = sorted(data.draw(st.lists(st.integers(0, 2 * max_tokens), min_size=2)))
    scores = [verify("length", "", tokens=n, max_tokens=max_tokens, buffer=buffer).score for n in tokens]
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)


def test_length_says_nothing_without_a_number_of_tokens():
    assert verify("length", "a", max_tokens=9, buffer=3) == Verdict(None, "no tokens to compare with")
    with pytest.raises(ToolkitError, match="needs the settings buffer, max_tokens"):
        verify("length", "a", tokens=9)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "needs the settings buffer, max_tokens"),
        ({"max_tokens": 9}, "needs the setting buffer"),
        ({"max_tokens": 9, "buffer": 10}, "buffer 10 is more than max_tokens 9"),
        ({"max_tokens": 9, "buffer": 0}, "buffer of the rule length must be a whole number from 1"),
        ({"max_tokens": "9", "buffer": 1}, "max_tokens of the rule length must be a whole number from 1"),
        ({"max_tokens": 9, "buffer": 1, "tokens": -1}, "tokens of the rule length must be a non-negative whole number"),
        ({"max_tokens": 9, "bufer": 1}, "no setting 'bufer'.*buffer"),
    ],
)
def test_settings_of_length_are_checked(settings, why):
    with pytest.raises(ToolkitError, match=why):
        check_rule("length", settings)
