"""The rule `choice`: which of the options A to J an answer chooses, one or several."""

import re
from collections.abc import Mapping

from conversations.answers.extracting import MAX_TEXT, after_phrase, candidates, chosen_letter
from conversations.answers.text import sentences
from conversations.answers.verdict import Verdict, judged, shown
from conversations.errors import ToolkitError

LONGEST_OPTION = 400  # characters of a reference that is an option's text
_LETTER = r"(?<![A-Za-z0-9_'])\(?[A-J]\)?(?![A-Za-z0-9_^'])"
_JOIN = r"\s*(?:,|、|;|&|/|\+|和|与|及|and\b)\s*(?:and\b)?\s*(?:(?:option|选项)\s*)?"
_SEVERAL = re.compile(rf"{_LETTER}(?:{_JOIN}{_LETTER})+")
_ALONE = re.compile(r"[\s(\[{*\"'“]*([A-J](?:[\s,、;&/+和与及()]*[A-J])*)[\s)\]}*\"'”.。:：]*")
_EXPLICIT = re.compile(r"<answer>|(?:^|\n)\s*####|\\boxed", re.IGNORECASE)
_OPTION = re.compile(
    r"(?:^|\n|(?<=\s))[ \t]*(?:\(([A-J])\)|([A-J])[.)：:、．])[ \t]*(\S.*?)[ \t]*"
    r"(?=$|\n|\s(?:\([A-J]\)|[A-J][.)：:、．])\s*\S)"
)


def choice(completion: str, *, reference: str, prompt: str | None = None) -> Verdict:
    """1 if the answer chooses exactly the options of the reference.

    reference: letters (B; A, C; ACD), or the text of the right option, whose letter is then that of the prompt's
    options, so that they may stand in any order. The answer may give the letter or the option's text.
    """
    options = {} if prompt is None else options_in(prompt)
    right = letters_alone(reference) or _of_text(reference, options)
    if right is None:
        return Verdict(None, f"{shown(reference)} is none of the prompt's options")
    taken = chosen_letters(completion, options)
    if taken is None:
        return judged(False, "the answer takes no option")
    return judged(taken == right, f"the answer takes {_listed(taken)}, right is {_listed(right)}")


def choice_reference(reference: str) -> str:
    """Letters, or the text of an option. Raises ToolkitError for a text that can be neither."""
    text = reference.strip()
    if not text or len(text) > LONGEST_OPTION:
        raise ToolkitError(
            f"a reference for the rule choice must be letters from A to J, or the text of an option: {shown(reference)}"
        )
    return text


def options_in(prompt: str) -> dict[str, str]:
    """Letter -> text of the last list of options in a prompt: lines that begin with A. or (A), or one line of them."""
    options: dict[str, str] = {}
    for match in _OPTION.finditer(prompt):
        letter, text = match[1] or match[2], match[3]
        if letter == "A":
            options = {}
        if letter == "ABCDEFGHIJ"[len(options)]:
            options[letter] = text
    return options if len(options) > 1 else {}


def chosen_letters(completion: str, options: Mapping[str, str]) -> frozenset[str] | None:
    """The options that an answer chooses; None if it chooses none."""
    text = completion.rsplit("</think>", 1)[-1].strip()[-MAX_TEXT:]
    places, said = candidates(text), sentences(text)
    in_prose = [place for place in (after_phrase(text), *said[-1:], *said[:1]) if place]
    for place in in_prose[:2] if not _EXPLICIT.search(text) else ():
        if several := list(_SEVERAL.finditer(place)):
            return frozenset(re.findall(r"(?<![a-z])[A-J](?![a-z])", several[-1][0]))
    for place in places:
        if found := letters_alone(place) or _of_text(place, options):
            return found
    for place in (*places[:1], *in_prose):
        if letter := chosen_letter(place):
            return frozenset(letter)
        named = {letter for letter, option in options.items() if _plain(option) and _plain(option) in _plain(place)}
        if len(named) == 1:
            return frozenset(named)
    return None


def letters_alone(text: str) -> frozenset[str] | None:
    """The letters of a text that is nothing else: B, (B), B., A and C, ACD; of letters without a mark between them only
    those in order, since BAD is a word."""
    joined = re.sub(r"\b(?:and|or)\b|\\text|\\mathrm|[{}]", " ", text)
    match = _ALONE.fullmatch(joined)
    if not match:
        return None
    letters = re.findall("[A-J]", match[1])
    return frozenset(letters) if letters == sorted(set(letters)) or len(match[1]) > len(letters) else None


def _of_text(text: str, options: Mapping[str, str]) -> frozenset[str] | None:
    """The option with this text, with or without its letter in front."""
    wanted = _plain(text)
    found = {letter for letter, option in options.items() if wanted in (_plain(option), _plain(f"{letter} {option}"))}
    return frozenset(found) if wanted and len(found) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _listed(letters: frozenset[str]) -> str:
    return ", ".join(sorted(letters))
