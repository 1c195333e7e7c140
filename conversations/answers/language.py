"""The rule `language`: whether the answer is in the prompt's language, by script; code and formulas are ignored."""

import re

from conversations.answers.text import prose
from conversations.answers.verdict import Verdict, judged

# language -> what counts as one word: a character in scripts whose words have one or two, otherwise a run of letters.
_SCRIPTS = {
    "zh": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"),
    "ja": re.compile(r"[\u3040-\u30ff]"),
    "ko": re.compile(r"[\uac00-\ud7af]+"),
    "ru": re.compile(r"[\u0400-\u04ff]+"),
    "ar": re.compile(r"[\u0600-\u06ff]+"),
    "hi": re.compile(r"[\u0900-\u097f]+"),
    "th": re.compile(r"[\u0e00-\u0e7f]+"),
    "el": re.compile(r"[\u0370-\u03ff]{2,}"),
    "he": re.compile(r"[\u0590-\u05ff]+"),
    "en": re.compile(r"[A-Za-z\u00c0-\u024f]{2,}|\b[aAI]\b"),
}
_KANA_SHARE = 0.2  # Japanese is written in Chinese characters too
_ASKS_FOR_ANOTHER = re.compile(
    r"\btranslat|翻译|译成|译为"
    r"|\b(?:in|into|to) (?:english|chinese|mandarin|french|german|spanish|japanese|korean|russian)\b"
    r"|(?:用|以|成)(?:英文|英语|中文|汉语|法语|德语|日语|韩语|俄语|西班牙语)",
    re.IGNORECASE,
)


def language_of(text: str) -> str | None:
    """The language whose script has the most words ("en" for anything in Latin letters); None without words."""
    text = prose(text)
    counts = {language: len(pattern.findall(text)) for language, pattern in _SCRIPTS.items()}
    if counts["ja"] > _KANA_SHARE * counts["zh"]:
        counts["ja"], counts["zh"] = counts["ja"] + counts["zh"], 0
    best = max(counts, key=lambda language: counts[language])
    return best if counts[best] else None


def language(completion: str, *, prompt: str) -> Verdict:
    """1 if the answer is in the prompt's language; an answer without words ("42") is in every language.

    The score is None for a prompt that asks for another language (a translation).
    """
    if _ASKS_FOR_ANOTHER.search(prompt):
        return Verdict(None, "the prompt asks for a specific language")
    of_prompt, of_answer = language_of(prompt), language_of(completion)
    if of_prompt is None or of_answer is None:
        return judged(True, f"the {'prompt' if of_prompt is None else 'answer'} has no words")
    return judged(of_prompt == of_answer, f"the prompt is in {of_prompt}, the answer in {of_answer}")
