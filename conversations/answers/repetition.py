"""The rule `repetition`: how much of an answer is not repeated."""

import re
from collections import Counter

from conversations.answers.text import prose
from conversations.answers.verdict import Verdict, shown

_WORD = re.compile(r"[㐀-鿿]|[^\W_]+")  # a Chinese character is a word


def repetition(completion: str, *, n: int = 4) -> Verdict:
    """Distinct n-grams of words as a share of all: 1 if nothing is repeated, near 0 for text that loops. Code and
    formulas are ignored; an answer of fewer than n words repeats nothing."""
    words = [word.lower() for word in _WORD.findall(prose(completion))]
    runs = Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    total = sum(runs.values())
    if total == len(runs):
        return Verdict(1.0, f"no run of {n} words is repeated")
    (most, times) = runs.most_common(1)[0]
    return Verdict(
        len(runs) / total,
        f"{total - len(runs)} of {total} runs of {n} words are repeated, {shown(' '.join(most))} {times} times",
    )
