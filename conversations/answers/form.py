"""The rule `format`: is the answer a finished, readable text?"""

import re
from collections.abc import Sequence
from itertools import pairwise

from conversations.answers.text import compiled, matches, prose, sentences
from conversations.answers.verdict import Verdict, judged, shown

_LABEL = re.compile(r"(?:^|\n)\s*(?:User|Assistant)\s*:|<｜[^｜]*｜>")
_LAUGHS = "哈嘿呵嘻哇啊嗯呜唉哼"
_STUTTERS = (
    (re.compile(r"(?<!\w)([^\W\d_]+)(?:[\s,]+\1){4}(?!\w)", re.IGNORECASE), "a word"),
    (re.compile(r"(?<![\w.])(\d{2,}(?:\.\d+)?)(?:\s+\1){2}(?![\w.])"), "a number"),
    (re.compile(r"(?<![\w.])(\d)(?:\s+\1){5}(?![\w.])"), "a number"),
    (re.compile(rf"((?![{_LAUGHS}])[一-鿿])\1{{4}}|([一-鿿]{{2,6}}?)(?:[\s，、]?\2){{4}}"), "a word"),
    (re.compile(r"([^\W\d_]{3,20})\1{4}"), "a syllable"),
    (re.compile(r"([^\W\d_])\1{15}"), "a letter"),
)
_LEAST_WORDS = 3  # of a sentence that may not come again at once
_MOST_TIMES = 3  # of a sentence anywhere


def format(completion: str, *, finished: bool = True, patterns: Sequence[str] = ()) -> Verdict:
    """1 for text that the model ended itself, without template labels, special tokens, stutter or repeated sentences.

    finished: False where the limit of tokens cut it. Words in code and formulas may repeat.
    patterns: regular expressions, one of which must match the whole answer, where there are any.

    Raises:
        ToolkitError: a pattern is not a regular expression, or takes too long.
    """
    forms = compiled(tuple(patterns), "the format pattern")
    text = completion.strip()
    if not finished:
        return judged(False, "the answer was cut off at the token limit")
    if not text:
        return judged(False, "the answer is empty")
    label = _LABEL.search(text)
    if label:
        return judged(False, f"the answer contains {shown(label[0].strip())}")
    text = prose(text)
    for pattern, what in _STUTTERS:
        match = next((m for m in pattern.finditer(text) if not set(m[0]) <= set(_LAUGHS)), None)
        if match:
            return judged(False, f"the answer repeats {what}: {shown(match[0])}")
    repeated = _repeated_sentence(text)
    if repeated:
        return judged(False, f"the answer repeats a sentence: {shown(repeated)}")
    if forms and not any(matches(form, completion.strip(), whole=True) for form in forms):
        return judged(False, "the answer matches none of the patterns")
    return judged(True, "the answer is well formed")


def _repeated_sentence(text: str) -> str | None:
    said = [" ".join(sentence.lower().split()) for sentence in sentences(text)]
    long = [sentence for sentence in said if _words(sentence) >= _LEAST_WORDS]
    at_once = next((a for a, b in pairwise(said) if a == b and _words(a) >= _LEAST_WORDS), None)
    return at_once or next((sentence for sentence in long if long.count(sentence) >= _MOST_TIMES), None)


def _words(sentence: str) -> int:
    return len(re.findall(r"[\u3400-\u9fff]|[^\W_]+", sentence))
