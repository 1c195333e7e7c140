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
_LONE = re.compile(r"[\s(\[*\"'“]*([a-j])[\s)\]*\"'”.。:：]*")
_FULL_WIDTH = str.maketrans("ＡＢＣＤＥＦＧＨＩＪ（）", "ABCDEFGHIJ()")
_EXPLICIT = re.compile(r"<answer>|(?:^|\n)\s*####|\\boxed", re.IGNORECASE)
_OPTION = re.compile(
    r"(?:^|\n|(?<=\s))[ \t]*(?:\(([A-J])\)|([A-J])[.)：:、．])[ \t]*(\S.*?)[ \t]*"
    r"(?=$|\n|\s(?:\([A-J]\)|[A-J][.)：:、．])\s*\S)"
)


def choice(completion: str, *, reference: str, prompt: str | None = None) -> Verdict:
    """1 if the answer chooses exactly the options of the reference.

    reference: letters (B; A, C; ACD), or the text of the right option; its letter is then looked up among the prompt's
    options, so their order may be shuffled. The answer may give the letter or the option's text.
    """
    options = {} if prompt is None else options_in(prompt)
    right = letters_alone(reference) or _option_with_text(reference, options)
    if right is None:
        return Verdict(None, f"{shown(reference)} is not one of the prompt's options")
    chosen = chosen_letters(completion, options)
    if chosen is None:
        return judged(False, "the answer chooses no option")
    return judged(chosen == right, f"the answer chooses {_listed(chosen)}; the right choice is {_listed(right)}")


def choice_reference(reference: str) -> str:
    """Letters, or the text of an option. Raises ToolkitError for text that can be neither."""
    text = reference.strip()
    if not text or len(text) > LONGEST_OPTION:
        raise ToolkitError(
            f"a reference for the rule choice must be letters from A to J, or the text of an option: {shown(reference)}"
        )
    return text


def options_in(prompt: str) -> dict[str, str]:
    """Letter -> text for the last list of options in a prompt, on lines that begin with A. or (A), or all on one
    line."""
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
    text = completion.rsplit("</think>", 1)[-1].strip()[-MAX_TEXT:].translate(_FULL_WIDTH)
    places, spoken = candidates(text), sentences(text)
    in_prose = [place for place in (after_phrase(text), *spoken[-1:], *spoken[:1]) if place]
    for place in in_prose[:2] if not _EXPLICIT.search(text) else ():
        if several := list(_SEVERAL.finditer(place)):
            return frozenset(re.findall(r"(?<![a-z])[A-J](?![a-z])", several[-1][0]))
    for place in places:
        if letters := letters_alone(place) or _option_with_text(place, options):
            return letters
    marked = places[0] if places and _EXPLICIT.search(text) else text
    if letters := _lone_letter(marked):
        return letters
    for place in (*places[:1], *in_prose):
        if letter := chosen_letter(place):
            return frozenset(letter)
        mentioned = {letter for letter, option in options.items() if _plain(option) and _plain(option) in _plain(place)}
        if len(mentioned) == 1:
            return frozenset(mentioned)
    return None


def letters_alone(text: str) -> frozenset[str] | None:
    """The letters of a text that holds nothing else: B, (B), B., A and C, ACD. Letters without separators must be in
    alphabetical order, since BAD is a word."""
    joined = re.sub(r"\b(?:and|or)\b|\\text|\\mathrm|[{}]", " ", text)
    match = _ALONE.fullmatch(joined)
    if not match:
        return None
    letters = re.findall("[A-J]", match[1])
    return frozenset(letters) if letters == sorted(set(letters)) or len(match[1]) > len(letters) else None


def _lone_letter(text: str) -> frozenset[str] | None:
    """The letter of an answer that is one small letter and nothing else: b, (b), b."""
    match = _LONE.fullmatch(text)
    return frozenset(match[1].upper()) if match else None


def _option_with_text(text: str, options: Mapping[str, str]) -> frozenset[str] | None:
    """The option with this text, with or without its letter before it."""
    plain = _plain(text)
    letters = {letter for letter, option in options.items() if plain in (_plain(option), _plain(f"{letter} {option}"))}
    return frozenset(letters) if plain and len(letters) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _listed(letters: frozenset[str]) -> str:
    return ", ".join(sorted(letters))
