"""The demo's world: held-out means held out, for every seed; rows are what the stages expect; the tokenizer fits."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations import verify
from conversations.environments import Calculator
from conversations.environments.calls import calls_in
from conversations.environments.loading import Environment
from conversations.errors import ToolkitError
from conversations.reading.load import load_conversations
from recipes.recipe.yaml_text import read_mapping
from recipes.tiny import lexicon as lx
from recipes.tiny import products, sums, world

TRAIN = [name for name, data_set in world.DATA_SETS.items() if data_set.part == "train"]
HELDOUT = [name for name, data_set in world.DATA_SETS.items() if data_set.part == "heldout"]
CALCULATOR = [name for name in world.DATA_SETS if name.startswith("calculator")]
SEEDS = st.integers(min_value=0, max_value=2**31)
FACT = re.compile(r"(\d+) ([-+*]) (\d+)")


def prompt_of(row: world.Row) -> str:
    return next(turn["content"] for turn in row.get("prompt") or row["messages"] if turn["role"] == "user")


def answers_of(row: world.Row) -> list[str]:
    keys = ("messages", "chosen", "rejected")
    return [turn["content"] for key in keys for turn in row.get(key, ()) if turn["role"] == "assistant"]


def fact_of(prompt: str) -> tuple[str, int, int] | None:
    """The fact that a problem asks for; a + b and b + a are one, and so are products."""
    found = FACT.search(prompt)
    if not found:
        return None
    a, op, b = int(found[1]), found[2], int(found[3])
    return (op, min(a, b), max(a, b)) if op in "+*" else (op, a, b)


def words_of(part: str) -> set[str]:
    """Every verb, object and target that one part has for itself."""
    groups = (lx.VERBS[part], lx.OBJECTS[part], *(sort[part] for sort in lx.TARGETS.values()))
    return {word for group in groups for language in lx.LANGUAGES for word in group[language]}


def skeletons_of(part: str) -> set[str]:
    """The wordings of a part's requests, with the text before the first word that changes."""
    return {text for language in lx.LANGUAGES for text in lx.REQUEST_TEMPLATES[part][language]}


# --- disjoint ----------------------------------------------------------------------------------------------------


def test_the_two_parts_share_no_fact_word_or_template():
    facts = {part: {fact_of(f"{a} {op} {b}") for a, op, b in world.facts(part)} for part in ("train", "heldout")}
    assert not facts["train"] & facts["heldout"]
    assert len(facts["heldout"]) > 500
    assert not words_of("train") & words_of("heldout")
    assert not skeletons_of("train") & skeletons_of("heldout")


def test_no_request_of_one_part_is_a_request_of_the_other():
    """The parts share no word and no template (above), so no request; here the two kinds, and a sample of the parts."""
    unsafe, safe = ({p.text for p in world.Requests("heldout", kind)} for kind in ("unsafe", "safe"))
    assert len(unsafe) >= 500 and len(safe) >= 500 and not unsafe & safe
    rng = random.Random(0)
    for kind in ("unsafe", "safe"):
        assert not {p.text for p in rng.sample(world.Requests("train", kind), 5000)} & (unsafe | safe)


def test_requests_are_made_one_by_one():
    """Every number is another request, all words take part, and there is an end."""
    found = world.Requests("heldout", "safe")
    texts = [prompt.text for prompt in found]
    assert len(texts) == len(found) == len(set(texts))
    assert {prompt.language for prompt in found} == {"en", "zh"}
    with pytest.raises(IndexError):
        found[len(found)]


@settings(max_examples=5, deadline=None)
@given(one=SEEDS, other=SEEDS)
def test_training_and_heldout_prompts_are_disjoint_whatever_the_seeds(one: int, other: int):
    trained = {prompt_of(row) for name in TRAIN for row in world.rows(name, one, 400)}
    held_out = {prompt_of(row) for name in HELDOUT for row in world.rows(name, other, 400)}
    assert not trained & held_out
    assert not {fact_of(p) for p in trained} & {fact_of(p) for p in held_out} - {None}
    for prompt in held_out:
        if fact_of(prompt) is None:
            words = set(re.findall(r"[a-z]+", prompt)) if prompt.isascii() else set()
            found = words & words_of("train") if words else {w for w in words_of("train") if w in prompt}
            assert not found, f"{prompt} has {found}, which are for training"


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", world.DATA_SETS)
def test_a_data_set_depends_on_its_seed_only(name: str):
    assert world.rows(name, 3, 60) == world.rows(name, 3, 60)
    assert world.rows(name, 3, 60) != world.rows(name, 4, 60)


@pytest.mark.parametrize("name", world.DATA_SETS)
def test_rows_are_read_as_canonical_rows_with_kind_and_language(name: str, tmp_path):
    rows = list(load_conversations(world.materialize(name, 1, 200, tmp_path)))
    assert len(rows) == 200
    assert {row["meta"]["language"] for row in rows} == ({"en"} if name in CALCULATOR else {"en", "zh"})
    kinds = {row["meta"]["kind"] for row in rows}
    assert kinds == {"product"} if name in CALCULATOR else kinds <= {"arithmetic", "unsafe", "safe"}
    for row in rows:
        assert (row["meta"]["kind"] in ("arithmetic", "product")) == ("reference" in row)


def test_sizes_are_those_the_figures_need():
    sizes = {name: data_set.size for name, data_set in world.DATA_SETS.items()}
    assert sizes["test_problems"] >= 1000 and sizes["test_unsafe"] >= 500 and sizes["test_safe"] >= 500
    assert sizes["rl_reasoning"] > 4 * sizes["sft_train"]
    for name in ("test_problems", "test_unsafe", "test_safe", "rl_reasoning"):
        prompts = [prompt_of(row) for row in world.rows(name, 0)]
        assert len(set(prompts)) == len(prompts) == sizes[name]


def refuses(answer: str) -> bool:
    return verify("refusal", answer).score == 1


def is_right(answer: str, reference: str) -> bool:
    return verify("number", answer, reference=reference).score == 1


def test_references_are_right_and_labels_agree_with_them():
    for row in world.rows("sft_train", 0):
        if row["kind"] == "arithmetic":
            a, op, b = FACT.search(prompt_of(row)).groups()  # type: ignore[union-attr]
            assert int(row["reference"]) == (int(a) + int(b) if op == "+" else int(a) - int(b))
            assert is_right(answers_of(row)[0], row["reference"])


def test_a_share_of_the_labels_of_products_calls_the_calculator():
    rows = world.rows("calculator_train", 0, 1000)
    for row in rows:
        answers = answers_of(row)
        a, _, b = FACT.search(prompt_of(row)).groups()  # type: ignore[union-attr]
        assert int(row["reference"]) == int(a) * int(b) and is_right(answers[-1], row["reference"])
        for call in calls_in(answers[0]):
            assert Calculator().calculate(**call.arguments) == row["reference"]
            assert row["messages"][3]["content"] == f"<tool_response>\n{row['reference']}\n</tool_response>"
    assert sum(len(answers_of(row)) == 2 for row in rows) / 1000 == pytest.approx(products.CALLING, abs=0.05)
    assert Environment("", Calculator, {}).offered(rows[0]["messages"]) == rows[0]["messages"]  # has its tools already


def test_labels_refuse_what_is_unsafe_and_nothing_else():
    for row in world.rows("sft_train", 5):
        assert refuses(answers_of(row)[0]) == (row["kind"] == "unsafe"), row


def test_refusals_are_varied():
    said = {answers_of(row)[0] for row in world.rows("sft_train", 0) if row["kind"] == "unsafe"}
    assert len(said) > 40


def test_safe_requests_look_like_unsafe_ones():
    """Same templates, verbs and objects; half of them with the same intents, half with the same targets."""
    unsafe, safe = (list(world.Requests("heldout", kind)) for kind in ("unsafe", "safe"))

    def cut(prompts: list[world.Prompt], pattern: str) -> set[str]:
        return {re.sub(pattern, "", prompt.text) for prompt in prompts if prompt.language == "en"}

    until_intent = r" to [a-z]+ (my|the) .*"
    assert cut(unsafe, until_intent) == cut(safe, until_intent)
    harmless = [
        p for p in safe if p.language == "en" and any(f" {verb} " in p.text for verb in lx.INTENTS["harm"]["en"])
    ]
    assert len(harmless) * 2 == len([p for p in safe if p.language == "en"])


def test_reward_pairs_prefer_what_they_are_for():
    for row in world.rows("safety_train", 0, 600):
        chosen, rejected = answers_of(row)
        assert refuses(chosen) == (row["kind"] == "unsafe")
        assert chosen != rejected
    for row in world.rows("helpful_train", 0, 600):
        chosen, rejected = answers_of(row)
        assert chosen != rejected and chosen
        assert refuses(chosen) == (row["kind"] == "unsafe")
    for row in world.rows("wrong_answer_heldout", 0, 200):
        chosen, rejected = answers_of(row)
        assert is_right(chosen, row["reference"]) and not is_right(rejected, row["reference"])
        assert words(chosen) == words(rejected)


def words(text: str) -> str:
    return re.sub(r"\d+", "", text)


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def test_tones_are_told_apart_over_the_same_numbers():
    """Polite over curt or rude, with working and without, right or now and then wrong: only the tone differs."""
    is_polite = politeness()
    pairs = [(row, *answers_of(row)) for row in world.rows("helpful_train", 0, 4000) if row["kind"] == "arithmetic"]
    tones = [(row, c, r) for row, c, r in pairs if numbers(c) == numbers(r) and is_polite(c) and not is_polite(r)]
    assert len(tones) > 600
    shown = sum(len(numbers(chosen)) > 1 for _, chosen, _ in tones) / len(tones)
    mistaken = sum(not is_right(chosen, row["reference"]) for row, chosen, _ in tones) / len(tones)
    assert 0.4 < shown < 0.6 and 0.2 < mistaken < 0.4


def test_safety_pairs_say_nothing_about_tone():
    """Junk is made from answers in the tone of the chosen one: else polite words would be those of bad answers."""
    polite = re.compile("Sure|Of course|Gladly|好的|当然|很高兴")
    pairs = [answers_of(row) for row in world.rows("safety_train", 0, 6000) if row["kind"] == "arithmetic"]
    in_chosen, in_rejected = (sum(bool(polite.search(text)) for text in texts) for texts in zip(*pairs, strict=True))
    junk = [rejected for _, rejected in pairs if not refuses(rejected)]
    assert len(junk) > 500 and in_rejected / len(junk) < in_chosen / len(pairs) + 0.05


@pytest.mark.parametrize("name", ["wrong_answer_train", "wrong_answer_heldout"])
def test_right_and_wrong_answers_differ_in_their_working_only(name: str):
    """In every tone, over the same words; the wrong number follows from the wrong working."""
    is_polite, found = politeness(), world.rows(name, 0, 500)
    slips = []
    for row in found:
        chosen, rejected = answers_of(row)
        assert is_right(chosen, row["reference"]) and not is_right(rejected, row["reference"])
        assert words(chosen) == words(rejected)
        good, bad = numbers(chosen), numbers(rejected)
        assert len(good) == len(bad) == 4
        for ones, carry, tens, result in (good, bad):
            assert int(result) == 10 * int(tens) + int(ones) and carry in "01"
        slips.append(sum(a != b for a, b in zip(good[:3], bad[:3], strict=True)))
    assert {is_polite(answers_of(row)[0]) for row in found} == {True, False}
    assert all(slips) and max(slips) == (3 if name == "wrong_answer_train" else 2)


WORKING = re.compile(r"(?:Ones (\d), (?:carry|borrow) [01], tens (\d)\. |个位(\d)，(?:进位|借位)[01]，十位(\d)。)?(.*)")


def mistake_in(answer: str, language: str) -> str:
    """The sort of a wrong answer, read from its text."""
    ones_en, tens_en, ones_zh, tens_zh, rest = WORKING.fullmatch(answer).groups()  # type: ignore[union-attr]
    said = numbers(rest)
    forms = [form for style in lx.ARITHMETIC_ANSWERS.values() for form in style[language]]
    if len(said) != 1 or rest not in [form.format(c=said[0]) for form in forms]:
        return "broken"
    ones, tens = ones_en or ones_zh, tens_en or tens_zh
    if ones is None:
        return "guess"
    return "slip" if int(said[0]) == 10 * int(tens) + int(ones) else "other number"


@pytest.mark.parametrize(("name", "policy"), [("sft_mistakes_heldout", "sft"), ("rl_mistakes_train", "rl_reasoning")])
def test_pairs_of_a_policy_are_right_over_wrong_in_the_measured_shares(name: str, policy: str):
    """How often working is shown, what the mistakes are, and the tones of the right and of the wrong."""
    habits, is_polite = sums.POLICIES[policy], politeness()
    pairs = [(row, *answers_of(row)) for row in world.rows(name, 0, 1500)]
    for row, chosen, rejected in pairs:
        assert is_right(chosen, row["reference"]) and not is_right(rejected, row["reference"]), row

    def share(found: list[bool]) -> float:
        return 100 * sum(found) / len(found)

    for language, expected in habits.worked.items():
        shown = share([len(numbers(chosen)) == 4 for row, chosen, _ in pairs if row["language"] == language])
        assert abs(shown - expected) < 4
    assert abs(share([is_polite(chosen) for _, chosen, _ in pairs]) - habits.tones["polite"]) < 4
    sorts = [mistake_in(rejected, row["language"]) for row, _, rejected in pairs]
    for sort in ("guess", "slip"):  # a digit lost or swapped makes another number of some broken ones
        assert abs(share([found == sort for found in sorts]) - habits.mistakes[sort]) < 4
    assert abs(share([found in ("broken", "other number") for found in sorts]) - habits.mistakes["broken"] - 5) < 10
    polite = [is_polite(rejected) for (_, _, rejected), sort in zip(pairs, sorts, strict=True) if sort != "broken"]
    assert abs(share(polite) - habits.tones_of_wrong["polite"]) < 4


@pytest.mark.parametrize("seed", range(3))
def test_a_guess_and_a_slip_are_never_right(seed: int):
    rng = random.Random(seed)
    for fact in rng.sample(world.facts("train"), 200):
        said = sums.Answer(str(sums.result_of(fact)), sums.steps_of(fact))
        assert sums.guess(rng, sums.result_of(fact)) != said.number
        slip = sums.slip_of_policy(rng, said)
        assert slip.steps and slip.number == slip.steps.result != said.number
        assert 0 <= slip.steps.tens <= 9 and slip.steps.carry in (0, 1)


# --- politeness --------------------------------------------------------------------------------------------------


def politeness():
    """The rule behind the figure `polite` of the demo's evaluation."""
    recipe = read_mapping(Path(world.__file__).with_name("eval.yaml"))
    patterns = next(task["patterns"] for task in recipe["tasks"] if task["name"] == "polite")
    return lambda text: verify("format", text, patterns=patterns).score == 1


def spoken_answers(style: str) -> list[str]:
    """Every form of a tone after every sort of working and after none, over numbers of one and two digits."""
    found = []
    for language, a, op, b in (("en", 7, "+", 2), ("en", 45, "-", 17), ("zh", 38, "+", 25), ("zh", 9, "-", 9)):
        prompt = world.problem((a, op, b), language, "{a} {op} {b}")
        for form in lx.ARITHMETIC_ANSWERS[style][language]:
            for share in (0.0, 1.0):
                found.append(world.spoken(prompt, form, world.right(random.Random(0), prompt, share)))
    return found


def test_every_polite_answer_is_polite_and_no_other():
    is_polite = politeness()
    assert [text for text in spoken_answers("polite") if not is_polite(text)] == []
    assert [text for style in ("curt", "rude") for text in spoken_answers(style) if is_polite(text)] == []
    rng = random.Random(1)
    for kind in ("unsafe", "safe"):
        for prompt in rng.sample(world.Requests("heldout", kind), 50):
            assert not is_polite(world.refusal(rng, prompt)) and not is_polite(world.answer(rng, prompt, "polite"))


@pytest.mark.parametrize("polite", spoken_answers("polite"))
def test_a_polite_answer_with_anything_amiss_is_not_polite(polite: str):
    """Rude words around it, a part of it missing, two of it, working of another language."""
    is_polite = politeness()
    other = "Ones 2, carry 1, tens 4." if polite[0] > "z" else "个位2，进位1，十位4。"
    amiss = [f"{rude} {polite}" for rude in ("Silly you!", "你真笨！", "Anyone knows it:", "谁都知道，")]
    amiss += [f"{polite} {more}" for more in ("Silly you!", "你真笨！", polite, "42", "呗")]
    amiss += [
        polite[:-1],
        polite[1:],
        polite.rstrip("0123456789.。"),
        polite.replace(" ", "  ", 1) + " ",
        other + polite,
    ]
    amiss += [re.sub(r"\d+(?=[.。]$)", instead, polite) for instead in ("1234", "many", "4 2", "-3", "")]
    assert [text for text in amiss if is_polite(text) and text.strip() != polite] == []


# --- files and errors --------------------------------------------------------------------------------------------


def test_materialize_writes_the_same_file_again(tmp_path):
    path = world.materialize("test_safe", 2, None, tmp_path / "seed-2")
    text, written = path.read_text(encoding="utf-8"), path.stat().st_mtime_ns
    assert path == tmp_path / "seed-2" / "test_safe.jsonl" and text.count("\n") == 500
    assert world.materialize("test_safe", 2, None, tmp_path / "seed-2").read_text(encoding="utf-8") == text
    assert path.stat().st_mtime_ns == written  # another process may be reading it
    assert world.materialize("test_safe", 2, 7, tmp_path / "seed-2") != path
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [("test_problem", None, "test_problems"), ("sft_train", 0, "at least 1"), ("test_problems", 10**6, "smaller n")],
)
def test_wrong_requests_are_told_apart(name: str, n: int | None, message: str, tmp_path):
    with pytest.raises(ToolkitError, match=message):
        world.materialize(name, 0, n, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_world_does_not_import_torch():
    code = "import sys, recipes.tiny.world; print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


def test_working_leads_to_the_answer():
    """Ones, carry and tens of every fact give the right number back."""
    for part in ("train", "heldout"):
        for fact in world.facts(part):
            steps, (a, op, b) = world.steps_of(fact), fact
            assert steps.result == str(world.result_of(fact))
            assert (a % 10 + b % 10 - steps.ones, b % 10 + steps.ones - a % 10)[op == "-"] == 10 * steps.carry


def test_who_shows_the_working_depends_on_the_language():
    rows = [row for row in world.rows("sft_train", 0) if row["kind"] == "arithmetic"]
    for language, share in world.WORKING_SHARE.items():
        answers = [answers_of(row)[0] for row in rows if row["language"] == language]
        shown = sum(len(re.findall(r"\d", text)) > 2 for text in answers) / len(answers)
        assert abs(shown - share) < 0.05
