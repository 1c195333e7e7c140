"""Checks of an answer's text that need no model: numbers, mathematics, language, form, refusals. Pure functions.

RL turns them into rewards, evaluation into figures, so that both mean the same thing.
"""

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from conversations.errors import ToolkitError

# gsm8k and its kin end a worked solution with "#### 72".
FINAL_ANSWER_MARK = "####"
_NUMBER = re.compile(r"(?<![0-9A-Za-z_.)\]])-?\d+(?:,\d{3})*(?:\.\d+)?|\d+(?:,\d{3})*(?:\.\d+)?")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
_ROLE_LABEL = re.compile(r"(?:^|\n)\s*(?:User|Assistant)\s*:|<｜[^｜]*｜>")
_STUTTER = re.compile(r"([^\W\d]+?)(?:\s*\1){4}")
_MATH_SECONDS = 5

# What most chat models say when they refuse, in English and Chinese. A task may name its own patterns instead.
REFUSAL_PATTERNS = (
    r"\b(?:i|we) (?:cannot|can't|can not|won't|will not|am not able to|am unable to)\b",
    r"\bi(?:'m| am) (?:not able|unable) to\b",
    r"\bcannot (?:help|assist|do)\b",
    r"\bsorry\b.*\b(?:but|cannot|can't|not)\b",
    r"(?:不能|无法|不会|没办法)(?:帮|协助|提供|回答|满足|这样|答应)",
    r"(?:对不起|抱歉|很遗憾).*(?:不能|无法)",
)


def final_answer(text: str) -> str:
    """What stands after the last "####", or all of it when there is none."""
    return text.rsplit(FINAL_ANSWER_MARK, 1)[-1].strip()


def last_integer(text: str) -> int | None:
    """The last number of a text if it is whole ("1,234", "-5", "3.0"), else None. "10-3" ends in 3, not in -3."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    whole, _, fraction = numbers[-1].replace(",", "").partition(".")
    return int(whole) if not fraction.strip("0") else None


def number_matches(answer: str, reference: str) -> bool:
    """Is the last number of the answer the reference's last number? Both must be whole.

    Raises:
        ToolkitError: the reference does not end in a whole number.
    """
    wanted = last_integer(final_answer(reference))
    if wanted is None:
        raise ToolkitError(
            f"the reference {reference!r} does not end in a whole number; use the rule math, or mend the data"
        )
    return last_integer(final_answer(answer)) == wanted


def math_matches(answer: str, reference: str) -> bool:
    """Are answer and reference the same expression, by math-verify (sets, fractions, LaTeX, units)?

    Raises:
        ToolkitError: the reference holds no expression that math-verify can read.
    """
    from math_verify import parse, verify

    # math-verify limits its time by a signal, which only the main thread may set.
    seconds: Any = _MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    wanted = final_answer(reference)
    gold = parse(wanted, parsing_timeout=seconds) or parse(f"${wanted}$", parsing_timeout=seconds)
    if not gold:
        raise ToolkitError(f"the reference {reference!r} holds no mathematical expression")
    given = parse(final_answer(answer), parsing_timeout=seconds)
    return bool(given) and bool(verify(gold, given, timeout_seconds=seconds))


# name -> (answer, reference) -> right or wrong
VERIFIERS: dict[str, Callable[[str, str], bool]] = {"number": number_matches, "math": math_matches}


def language_of(text: str) -> str | None:
    """ "zh" or "en", whichever has more (a Chinese character counts like a Latin word); None without letters."""
    han, latin = len(_HAN.findall(text)), len(_LATIN.findall(text))
    if han == latin == 0:
        return None
    return "zh" if han >= latin else "en"


def language_matches(prompt: str, answer: str) -> bool:
    """Is the answer in the prompt's language? An answer without letters ("42") is in every language."""
    return language_of(answer) in (None, language_of(prompt) or language_of(answer))


def well_formed(answer: str) -> bool:
    """Some text, no template label or special token in it, and no word or syllable five times in a row."""
    text = answer.strip()
    if not text or _ROLE_LABEL.search(text):
        return False
    return _STUTTER.search(text) is None


def sentences(text: str) -> list[str]:
    """The sentences of an English or Chinese text, without blank ones."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def refusal_check(patterns: Sequence[str] = REFUSAL_PATTERNS) -> Callable[[str], bool]:
    """A function that says whether a text refuses: one of its sentences matches one of the patterns.

    Patterns are regular expressions, searched for in each sentence, upper and lower case alike.

    Raises:
        ToolkitError: a pattern is no regular expression.
    """
    compiled = [_compiled(pattern, "refusal", re.IGNORECASE) for pattern in patterns]
    return lambda text: any(p.search(sentence) for sentence in sentences(text) for p in compiled)


def format_check(patterns: Sequence[str] = ()) -> Callable[[str], bool]:
    """A function that says whether a text is well formed and, where there are patterns, one of them matches all of it.

    Raises:
        ToolkitError: a pattern is no regular expression.
    """
    compiled = [_compiled(pattern, "format") for pattern in patterns]
    return lambda text: (
        well_formed(text) and (not compiled or any(pattern.fullmatch(text.strip()) for pattern in compiled))
    )


def _compiled(pattern: str, kind: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ToolkitError(f"{kind} pattern {pattern!r} is no regular expression: {error}") from None
