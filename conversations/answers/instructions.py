"""The 25 verifiable instructions of IFEval (Zhou et al. 2023, table 1), as functions of an answer and their arguments.

They follow the paper's own checks, so that results are comparable, with three exceptions: sentences are counted without
a model that would have to be downloaded, languages are detected by another model (detecting.py), and what the paper
checks for English works for Chinese as well: a character is a word, forbidden words need no spaces around them, Chinese
punctuation counts. An argument's annotation says what it must be.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import NewType

from conversations.answers.detecting import LANGUAGES, may_be

Relation = NewType("Relation", str)
Language = NewType("Language", str)
Letter = NewType("Letter", str)

RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "less than": lambda count, target: count < target,
    "at least": lambda count, target: count >= target,
}
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

_CJK = "\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_TOKEN = re.compile(r"[^\W_]+(?:[-.][^\W_]+)*")  # of capital_words: U.S and well-KNOWN are one each, AI's is two
_COMMAS = re.compile("[,，、،]")
_BULLET = re.compile(r"^[^\S\n]*(?:\*[^*]|-)", re.MULTILINE)
_POSTSCRIPTS = {"P.S.": re.compile(r"p\.\s?s\.", re.IGNORECASE), "P.P.S": re.compile(r"p\.\s?p\.\s?s", re.IGNORECASE)}
_FENCE = re.compile(r"\A```(?:json)?|```\Z", re.IGNORECASE)
_QUOTES = ('""', "“”")

_ENDS = re.compile(r"""[.!?…]+["'”’)\]]*(?=\s|\Z)|[。！？]+[”’」』）"]*""")
_LONGEST = 100  # characters before a full stop that are searched for the word it belongs to
_NEXT = re.compile(r"\s*(\S?)")
_NEVER_END = frozenset("mr mrs ms dr prof st jr sr vs e.g i.e fig no gen gov sen rep capt lt col rev cf approx".split())  # noqa: SIM905
_MAY_END = frozenset("etc inc ltd co corp u.s u.k a.m p.m ph.d b.c a.d".split())  # noqa: SIM905


# --- counting


def sentence_count(text: str) -> int:
    """The sentences of an English or Chinese text; what follows the last full stop is one."""
    count, start = 0, 0
    for end in _ENDS.finditer(text):
        if _is_end(text, start, end):
            count += bool(re.search(r"\w", text[start : end.start()]))
            start = end.end()
    return count + bool(re.search(r"\w", text[start:]))


def _is_end(text: str, start: int, end: re.Match[str]) -> bool:
    follows = _NEXT.match(text, end.end())
    goes_on = follows is not None and follows[1].islower()
    if end[0][-1] in "\"'”’)]" and goes_on:  # "Go!" he said.
        return False
    if end[0][0] != "." or end[0].startswith(".."):
        return True
    line = text[max(start, end.start() - _LONGEST) : end.start()].rpartition("\n")[2].split()
    word = line[-1].lstrip("\"'“‘([*_").lower() if line else ""
    if word in _MAY_END:
        return not goes_on
    numbered = word.isdecimal() and len(line) == 1  # 1. of a list
    initial = len(word) == 1 and word.isascii() and word.isalpha() and word != "i"
    return not (word in _NEVER_END or numbered or initial)


def _compared(count: int, relation: str, target: int) -> bool:
    return RELATIONS[relation](count, target)


# --- the instructions


def keywords(text: str, keywords: list) -> bool:
    return all(keyword.lower() in text.lower() for keyword in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: Relation) -> bool:
    return _compared(text.lower().count(keyword.lower()), relation, frequency)


def forbidden_words(text: str, forbidden_words: list) -> bool:
    def contains(word: str) -> bool:
        if re.search(f"[{_CJK}]", word):
            return word in text
        return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None

    return not any(contains(word) for word in forbidden_words)


def letter_frequency(text: str, letter: Letter, let_frequency: int, let_relation: Relation) -> bool:
    return _compared(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, language: Language) -> bool:
    return may_be(text, language.split("-")[0])


def paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by ***."""
    found = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    found = found[not found[0] : len(found) - (not found[-1])]
    return all(found) and len(found) == num_paragraphs


def words(text: str, num_words: int, relation: Relation) -> bool:
    return _compared(len(_WORD.findall(text)), relation, num_words)


def sentences(text: str, num_sentences: int, relation: Relation) -> bool:
    return _compared(sentence_count(text), relation, num_sentences)


def first_word_of_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by an empty line."""
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= len(paragraphs):
        return False
    first = re.match(r"""["'“‘]*([^\s.,?!'"，。？！”’]*)""", paragraphs[nth_paragraph - 1])
    word, target = first[1].lower() if first else "", first_word.lower()
    return word == target or (re.search(f"[{_CJK}]", target) is not None and word.startswith(target))


def postscript(text: str, postscript_marker: str) -> bool:
    pattern = _POSTSCRIPTS.get(postscript_marker)
    return bool(pattern.search(text)) if pattern else postscript_marker.lower() in text.lower()


def placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


def bullets(text: str, num_bullets: int) -> bool:
    return len(_BULLET.findall(text)) == num_bullets


def title(text: str) -> bool:
    """In << and >>, on one line."""
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def constrained_response(text: str) -> bool:
    return any(choice in text for choice in CHOICES)


def highlights(text: str, num_highlights: int) -> bool:
    spans = [*re.findall(r"\*[^\n*]*\*", text), *re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(span.strip("*").strip()) for span in spans) >= num_highlights


def sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    try:
        json.loads(_FENCE.sub("", text.strip()))
    except (ValueError, RecursionError):
        return False
    return True


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def two_responses(text: str) -> bool:
    """Two different responses, separated by six asterisks."""
    responses = [part.strip() for part in text.split("******")]
    responses = responses[not responses[0] : len(responses) - (not responses[-1])]
    return len(responses) == 2 and all(responses) and responses[0] != responses[1]


def capital_words(text: str, capital_frequency: int, capital_relation: Relation) -> bool:
    return _compared(sum(token.isupper() for token in _TOKEN.findall(text)), capital_relation, capital_frequency)


def all_capital(text: str) -> bool:
    return text.isupper() and may_be(text.lower(), "en")


def all_lowercase(text: str) -> bool:
    return text.islower() and may_be(text, "en")


def end_phrase(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] + text[-1] in _QUOTES


def no_comma(text: str) -> bool:
    return _COMMAS.search(text) is None


INSTRUCTIONS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": keywords,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_paragraphs": paragraphs,
    "length_constraints:number_words": words,
    "length_constraints:number_sentences": sentences,
    "length_constraints:nth_paragraph_first_word": first_word_of_paragraph,
    "detectable_content:postscript": postscript,
    "detectable_content:number_placeholders": placeholders,
    "detectable_format:number_bullet_lists": bullets,
    "detectable_format:title": title,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": highlights,
    "detectable_format:multiple_sections": sections,
    "detectable_format:json_format": json_format,
    "combination:repeat_prompt": repeat_prompt,
    "combination:two_responses": two_responses,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": all_capital,
    "change_case:english_lowercase": all_lowercase,
    "startend:end_checker": end_phrase,
    "startend:quotation": quotation,
    "punctuation:no_comma": no_comma,
}

# What an argument must be, by its annotation.
ARGUMENTS: Mapping[object, tuple[str, Callable[[object], bool]]] = {
    int: ("a non-negative whole number", lambda value: type(value) is int and value >= 0),
    str: ("a non-empty string", lambda value: isinstance(value, str) and bool(value.strip())),
    list: (
        "a list of strings",
        lambda value: isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value),
    ),
    Relation: (f"one of {', '.join(RELATIONS)}", lambda value: value in list(RELATIONS)),
    Letter: ("one character", lambda value: isinstance(value, str) and len(value) == 1),
    Language: (
        f"one of {', '.join(LANGUAGES)}",
        lambda value: isinstance(value, str) and value.split("-")[0] in LANGUAGES,
    ),
}
