"""The demo's world: a seeded generator of problems, requests and preferences in English and Chinese.

Standard library only. Every data set is a function of its name, a seed and a size:

    rows("sft_train", seed=0)                      the rows, in the canonical forms
    materialize("sft_train", 0, None, directory)   the same in <directory>/sft_train.jsonl

Held-out means held out for EVERY seed. A problem belongs to a part ("train", "heldout") by a fixed hash of its fact
(the operation and the two numbers, a + b and b + a being one fact); a request by its words: templates, verbs,
objects and targets come from two separate lists. The seed only chooses from the part's pool, so prompts generated with
another seed measure the same thing.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cache, partial
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.row import Row
from recipes.files import jsonl_text, write_text
from recipes.tiny import lexicon as lx
from recipes.tiny.products import asked, labelled, products
from recipes.tiny.sums import (
    LARGEST_NUMBER,
    POLICIES,
    Answer,
    Fact,
    all_wrong,
    broken,
    choose,
    guess,
    result_of,
    slip_of_policy,
    steps_of,
    wrong,
)

HELDOUT_PERCENT = 12

# Share of each form among the labelled answers: not all annotators are polite.
STYLE_WEIGHTS = {"polite": 6, "curt": 2, "rude": 2}


# Share of labels that show their working. English annotators nearly always do, Chinese ones seldom: SFT learns both
# habits; that working pays off in either language is for RL to discover.
WORKING_SHARE = {"en": 0.9, "zh": 0.15}

# Share of the tone pairs on problems in which both answers are wrong: tone must not be inferred from the number.
WRONG_IN_TONES = 0.3

# Share of the training pairs of right and wrong working in which every step is wrong: they show a reward model what to
# look at, after which it learns to detect single slips.
ALL_WRONG_SHARE = 0.1

_GLUE = {"en": " ", "zh": ""}


@dataclass(frozen=True)
class Prompt:
    """One user turn. `kind` is "arithmetic", "unsafe" or "safe"; `reference` the right number, if there is one."""

    text: str
    kind: str
    language: str
    reference: str | None = None
    fact: Fact | None = None

    def row(self, **fields: Any) -> Row:
        """The prompt's part of a row, and `fields`."""
        columns = {"kind": self.kind, "language": self.language}
        return {**fields, **columns, **({"reference": self.reference} if self.reference is not None else {})}


# --- the pools ---------------------------------------------------------------------------------------------------


def part_of_fact(fact: Fact) -> str:
    """The part that a fact belongs to, whatever the seed: by a hash of the operation and the numbers."""
    a, op, b = fact
    low, high = sorted((a, b)) if op in "+*" else (a, b)
    digest = hashlib.sha256(f"{low}{op}{high}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT else "train"


@cache
def facts(part: str) -> tuple[Fact, ...]:
    """All facts of a part: a + b and a - b where neither the numbers nor the result leave 0..LARGEST_NUMBER."""
    numbers = range(LARGEST_NUMBER + 1)
    sums = ((a, op, b) for op, a, b in product("+-", numbers, numbers))
    return tuple(fact for fact in sums if result_of(fact) in numbers and part_of_fact(fact) == part)


def problem(fact: Fact, language: str, template: str) -> Prompt:
    """A fact asked with a template of lexicon.ARITHMETIC_TEMPLATES."""
    a, op, b = fact
    return Prompt(template.format(a=a, op=op, b=b), "arithmetic", language, str(result_of(fact)), fact)


def problems(rng: random.Random, part: str, languages: tuple[str, ...]) -> Iterator[Prompt]:
    """Every problem of a part once, in random order: all facts in one wording, then in the next."""
    pool = list(facts(part))
    wordings = [(language, text) for language in languages for text in lx.ARITHMETIC_TEMPLATES[language]]
    rng.shuffle(pool)
    offsets = [rng.randrange(len(wordings)) for _ in pool]
    for turn in range(len(wordings)):
        for fact, offset in zip(pool, offsets, strict=True):
            yield problem(fact, *wordings[(offset + turn) % len(wordings)])


class Requests(Sequence[Prompt]):
    """Every request of a part: unsafe ones, or their safe look-alikes (of two sorts in equal numbers). Millions, so
    each is made when it is asked for."""

    def __init__(self, part: str, kind: str):
        sorts = {"unsafe": (("harm", "person"),), "safe": (("harm", "pest"), ("kind", "person"))}[kind]
        self.kind = kind
        self.blocks: list[tuple[str, str, list[tuple[str, ...]]]] = []
        for language, (intent_sort, target_sort) in product(lx.LANGUAGES, sorts):
            lists = (lx.VERBS[part], lx.OBJECTS[part], lx.INTENTS[intent_sort], lx.TARGETS[target_sort][part])
            words = [lx.REQUEST_TEMPLATES[part][language], *(by_language[language] for by_language in lists)]
            self.blocks.append((language, lx.TARGET_FORMS[target_sort][language], words))

    def __len__(self) -> int:
        return sum(prod(map(len, words)) for _, _, words in self.blocks)

    def __getitem__(self, index: Any) -> Any:
        for language, target_form, words in self.blocks:
            size = prod(map(len, words))
            if index < size:
                chosen = []
                for choices in reversed(words):
                    index, place = divmod(index, len(choices))
                    chosen.append(choices[place])
                target, intent, thing, verb, template = chosen
                parts = {"verb": verb, "object": thing, "intent": intent, "target": target_form.format(target=target)}
                return Prompt(template.format(**parts), self.kind, language)
            index -= size
        raise IndexError(index)


# --- answers -----------------------------------------------------------------------------------------------------


def sentence(rng: random.Random, parts: tuple[tuple[str, ...], ...], language: str) -> str:
    """One choice from each part, joined as is usual in the language."""
    return _GLUE[language].join(rng.choice(part) for part in parts)


def spoken(prompt: Prompt, form: str, answer: Answer) -> str:
    """The answer as text, in a form of lexicon.ARITHMETIC_ANSWERS, preceded by its working if that is shown."""
    text = form.format(c=answer.number)
    if answer.steps is None:
        return text
    assert prompt.fact
    working = lx.ARITHMETIC_WORKING[prompt.language][prompt.fact[1]].format(**asdict(answer.steps))
    return _GLUE[prompt.language].join((working, text))


def right(rng: random.Random, prompt: Prompt, working_share: float = 0.5) -> Answer:
    """The right number; `working_share` is how often its working is shown."""
    assert prompt.reference is not None and prompt.fact
    return Answer(prompt.reference, steps_of(prompt.fact) if rng.random() < working_share else None)


def answer_form(rng: random.Random, prompt: Prompt, style: str) -> str:
    """A form of lexicon.ARITHMETIC_ANSWERS."""
    return rng.choice(lx.ARITHMETIC_ANSWERS[style][prompt.language])


def answer(rng: random.Random, prompt: Prompt, style: str, working_share: float = 0.5) -> str:
    """A correct answer in the given style ("polite", "curt", "rude"), which complies even with unsafe requests."""
    if prompt.kind == "arithmetic":
        return spoken(prompt, answer_form(rng, prompt, style), right(rng, prompt, working_share))
    return sentence(rng, lx.REQUEST_ANSWERS[style][prompt.language], prompt.language)


def refusal(rng: random.Random, prompt: Prompt) -> str:
    """A polite refusal of several clauses."""
    return sentence(rng, lx.REFUSALS[prompt.language], prompt.language)


def right_answer(rng: random.Random, prompt: Prompt, style: str = "polite", working_share: float = 0.5) -> str:
    """The desired answer: a refusal of an unsafe request, an answer to anything else."""
    return refusal(rng, prompt) if prompt.kind == "unsafe" else answer(rng, prompt, style, working_share)


def junk(rng: random.Random, prompt: Prompt, style: str = "polite") -> str:
    """Not an answer: off-topic, of the wrong sort or language, shuffled, cut short, too long, babble, or nothing.

    Without such negatives the policy exploits the reward models (reward hacking). `style` is the tone of the text it is
    made from: if junk were always polite while chosen answers have every tone, politeness would look bad.
    """
    make = rng.choice((_off_topic, _wrong_sort, _wrong_language, _shuffled, _cut, _too_long, _babble))
    return make(rng, prompt, style)


def _off_topic(rng: random.Random, prompt: Prompt, style: str) -> str:
    return rng.choice(lx.OFF_TOPIC[prompt.language])


def _wrong_sort(rng: random.Random, prompt: Prompt, style: str) -> str:
    if prompt.kind == "arithmetic":
        return answer(rng, replace(prompt, kind="safe"), style)
    return spoken(prompt, answer_form(rng, prompt, style), Answer(str(rng.randrange(LARGEST_NUMBER + 1))))


def _wrong_language(rng: random.Random, prompt: Prompt, style: str) -> str:
    return right_answer(rng, replace(prompt, language="zh" if prompt.language == "en" else "en"), style)


def _words(text: str, language: str) -> list[str]:
    return text.split(" ") if language == "en" else list(text)


def _shuffled(rng: random.Random, prompt: Prompt, style: str) -> str:
    text = right_answer(rng, prompt, style)
    words = _words(text, prompt.language)
    mixed = _GLUE[prompt.language].join(rng.sample(words, len(words)))
    return mixed if mixed != text else ""


def _cut(rng: random.Random, prompt: Prompt, style: str) -> str:
    words = _words(right_answer(rng, prompt, style), prompt.language)
    return _GLUE[prompt.language].join(words[: rng.randrange(len(words))])


def _too_long(rng: random.Random, prompt: Prompt, style: str) -> str:
    text = right_answer(rng, prompt, style)
    more = rng.choices(_words(text, prompt.language), k=rng.randint(1, 6))
    return _GLUE[prompt.language].join([text, *more])


def _babble(rng: random.Random, prompt: Prompt, style: str) -> str:
    texts = (*lx.OFF_TOPIC["en"], *lx.OFF_TOPIC["zh"], prompt.text, right_answer(rng, prompt, style))
    words = [word for text in texts for word in _words(text, prompt.language)]
    return rng.choice(("", " ")).join(rng.choices(words, k=rng.randint(1, 8)))


# The sorts of problems, by language; the other sorts of prompts are the kinds "unsafe" and "safe".
LANGUAGES_OF = {"arithmetic": lx.LANGUAGES, "english_arithmetic": ("en",), "chinese_arithmetic": ("zh",)}

# --- the data sets -----------------------------------------------------------------------------------------------


def _prompts(rng: random.Random, part: str, shares: dict[str, int], n: int) -> list[Any]:
    """n different prompts of a part; `shares` gives the relative number of each sort."""
    total, prompts = sum(shares.values()), []
    for index, sort in enumerate(shares):
        count = n * sum(list(shares.values())[: index + 1]) // total - len(prompts)
        if sort in LANGUAGES_OF:
            pool = list(islice(problems(rng, part, LANGUAGES_OF[sort]), count))
        elif sort == "product":
            pool = list(islice(products(rng, lambda fact: part_of_fact(fact) == part), count))
        else:
            pool = Requests(part, sort)
        if count > len(pool):
            raise ToolkitError(f"{count} {sort} prompts were requested but only {len(pool)} exist: use a smaller n")
        prompts += rng.sample(pool, count)
    rng.shuffle(prompts)
    return prompts


def _user(prompt: Prompt) -> list[Row]:
    return [{"role": "user", "content": prompt.text}]


def _assistant(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def _labelled_row(rng: random.Random, prompt: Prompt) -> Row:
    style = rng.choices(list(STYLE_WEIGHTS), list(STYLE_WEIGHTS.values()))[0]
    text = right_answer(rng, prompt, style, WORKING_SHARE[prompt.language])
    return prompt.row(messages=_user(prompt) + _assistant(text))


def _prompt_row(rng: random.Random, prompt: Prompt) -> Row:
    return prompt.row(messages=_user(prompt))


def _pair_row(prompt: Prompt, chosen: str, rejected: str) -> Row:
    return prompt.row(prompt=_user(prompt), chosen=_assistant(chosen), rejected=_assistant(rejected))


def _helpful_row(rng: random.Random, prompt: Prompt) -> Row:
    """A polite, well-formed answer over a curt, a rude, a refusing or a junk one; correctness plays no role."""
    if prompt.kind == "arithmetic":
        return rng.choice((_tone_row, _no_answer_row))(rng, prompt)
    if prompt.kind == "unsafe":
        curt = sentence(rng, lx.CURT_REFUSALS[prompt.language], prompt.language)
        rejected = (curt, junk(rng, prompt), answer(rng, prompt, "polite"))
        return _pair_row(prompt, refusal(rng, prompt), rng.choice(rejected))
    rejected = (answer(rng, prompt, "curt"), answer(rng, prompt, "rude"), refusal(rng, prompt), junk(rng, prompt))
    return _pair_row(prompt, answer(rng, prompt, "polite"), rng.choice(rejected))


def _tone_row(rng: random.Random, prompt: Prompt) -> Row:
    """A polite answer to a problem over a curt or rude one with the same content, right or wrong."""
    answer = right(rng, prompt)
    if rng.random() < WRONG_IN_TONES:
        answer = wrong(rng, answer)
    polite, impolite = (answer_form(rng, prompt, style) for style in ("polite", rng.choice(("curt", "rude"))))
    return _pair_row(prompt, spoken(prompt, polite, answer), spoken(prompt, impolite, answer))


def _wrong_answer_row(rng: random.Random, prompt: Prompt, all_wrong_share: float = 0.0) -> Row:
    """The right answer to a problem over a wrong one in the same form, with their working, as RL stage 1 learns."""
    style = rng.choices(list(STYLE_WEIGHTS), list(STYLE_WEIGHTS.values()))[0]
    form, answer = answer_form(rng, prompt, style), right(rng, prompt, working_share=1.0)
    bad = (all_wrong if rng.random() < all_wrong_share else wrong)(rng, answer)
    return _pair_row(prompt, spoken(prompt, form, answer), spoken(prompt, form, bad))


def _wrong_lesson_row(rng: random.Random, prompt: Prompt) -> Row:
    """As `_wrong_answer_row`, with some easy pairs among the hard ones."""
    return _wrong_answer_row(rng, prompt, ALL_WRONG_SHARE)


def _mistake_row(rng: random.Random, prompt: Prompt, policy: str) -> Row:
    """A right answer over a wrong one, both as a stage's policy writes them, each with its own tone."""
    assert prompt.reference is not None
    habits = POLICIES[policy]
    answer, worked = right(rng, prompt, habits.worked[prompt.language] / 100), right(rng, prompt, working_share=1.0)
    form = answer_form(rng, prompt, choose(rng, habits.tones_of_wrong))
    number = guess(rng, int(prompt.reference))
    match choose(rng, habits.mistakes):
        case "guess":
            rejected = spoken(prompt, form, Answer(number))
        case "slip":
            rejected = spoken(prompt, form, slip_of_policy(rng, worked))
        case "other number":
            rejected = spoken(prompt, form, replace(worked, number=number))
        case _:
            foreign = _wrong_language(rng, prompt, "polite")
            rejected = broken(rng, spoken(prompt, form, worked), foreign, prompt.reference)
    return _pair_row(prompt, spoken(prompt, answer_form(rng, prompt, choose(rng, habits.tones)), answer), rejected)


def _no_answer_row(rng: random.Random, prompt: Prompt) -> Row:
    """A polite answer to a problem over a refusal or junk."""
    return _pair_row(prompt, answer(rng, prompt, "polite"), rng.choice((refusal(rng, prompt), junk(rng, prompt))))


def _safety_row(rng: random.Random, prompt: Prompt) -> Row:
    """A refusal over compliance if the request is unsafe, otherwise an answer over a refusal; either over junk.

    Tones are equally distributed on both sides: tone is judged by the helpful model.
    """
    style = rng.choice(list(STYLE_WEIGHTS))
    do, decline, nonsense = answer(rng, prompt, style), refusal(rng, prompt), junk(rng, prompt, style)
    good, bad = (decline, do) if prompt.kind == "unsafe" else (do, decline)
    return _pair_row(prompt, good, rng.choices((bad, nonsense), (2, 1))[0])


@dataclass(frozen=True)
class DataSet:
    """The definition of a data set: part, share of each sort of prompt, function that makes a row, default size."""

    part: str
    shares: dict[str, int]
    make_row: Callable[[random.Random, Any], Row]
    size: int


# Labels are scarce, and scarcer in Chinese than in English.
_LABELLED = {"english_arithmetic": 2250, "chinese_arithmetic": 750, "unsafe": 1000, "safe": 800}
_MIXED = {"arithmetic": 4, "unsafe": 3, "safe": 3}
_MISTAKEN = {"english_arithmetic": 2, "chinese_arithmetic": 3}
_PROBLEMS, _UNSAFE, _SAFE, _PRODUCTS = {"arithmetic": 1}, {"unsafe": 1}, {"safe": 1}, {"product": 1}

DATA_SETS = {
    "sft_train": DataSet("train", _LABELLED, _labelled_row, 4800),
    "sft_heldout": DataSet("heldout", _LABELLED, _labelled_row, 500),
    "helpful_train": DataSet("train", _MIXED, _helpful_row, 6000),
    "helpful_heldout": DataSet("heldout", _MIXED, _helpful_row, 1000),
    "safety_train": DataSet("train", _MIXED, _safety_row, 6000),
    "safety_heldout": DataSet("heldout", _MIXED, _safety_row, 1000),
    "wrong_answer_train": DataSet("train", _PROBLEMS, _wrong_lesson_row, 16000),
    "wrong_answer_heldout": DataSet("heldout", _PROBLEMS, _wrong_answer_row, 500),
    "sft_mistakes_train": DataSet("train", _MISTAKEN, partial(_mistake_row, policy="sft"), 8000),
    "sft_mistakes_heldout": DataSet("heldout", _MISTAKEN, partial(_mistake_row, policy="sft"), 1000),
    "rl_mistakes_train": DataSet("train", _MISTAKEN, partial(_mistake_row, policy="rl_reasoning"), 16000),
    "rl_mistakes_heldout": DataSet("heldout", _MISTAKEN, partial(_mistake_row, policy="rl_reasoning"), 1000),
    "rl_reasoning": DataSet("train", _PROBLEMS, _prompt_row, 20000),
    "rl_preference": DataSet("train", {"arithmetic": 3, "unsafe": 4, "safe": 3}, _prompt_row, 10000),
    "calculator_train": DataSet("train", _PRODUCTS, labelled, 16000),
    "calculator_prompts": DataSet("train", _PRODUCTS, asked, 16000),
    "calculator_heldout": DataSet("heldout", _PRODUCTS, asked, 200),
    "test_problems": DataSet("heldout", _PROBLEMS, _prompt_row, 1000),
    "test_unsafe": DataSet("heldout", _UNSAFE, _prompt_row, 500),
    "test_safe": DataSet("heldout", _SAFE, _prompt_row, 500),
}


def rows(name: str, seed: int, n: int | None = None) -> list[Row]:
    """The rows of a data set, the same for the same arguments. Raises ToolkitError for an unknown name or a bad n."""
    if name not in DATA_SETS:
        near = get_close_matches(name, DATA_SETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"available are: {', '.join(DATA_SETS)}"
        raise ToolkitError(f"the demo world has no data set {name!r}; {hint}")
    if n is not None and n < 1:
        raise ToolkitError(f"tiny:{name}: n must be at least 1, not {n}")
    data_set = DATA_SETS[name]
    rng = random.Random(f"{name} {seed}")
    prompts = _prompts(rng, data_set.part, data_set.shares, n or data_set.size)
    return [data_set.make_row(rng, prompt) for prompt in prompts]


def materialize(name: str, seed: int, n: int | None, directory: str | Path) -> Path:
    """Write a data set to `directory` as JSONL, atomically, and return its path (`NAME.jsonl`, `NAME-N.jsonl`). A file
    that has these rows already is left as it is: other processes may be reading it."""
    path = Path(directory) / (f"{name}.jsonl" if n is None else f"{name}-{n}.jsonl")
    text = jsonl_text(rows(name, seed, n))
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return path
