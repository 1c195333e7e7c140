"""The rule `math`: whether the final answer has the reference's value."""

import re
from functools import lru_cache

from conversations.answers.chinese_numerals import with_digits
from conversations.answers.comparing import same
from conversations.answers.extracting import after_phrase, candidates, chosen_letter, final_line, last_boxes
from conversations.answers.notation import formula, is_balanced
from conversations.answers.values import Choice, Leaf, Value, Words, value_of
from conversations.answers.verdict import Verdict, judged, shown
from conversations.errors import ToolkitError

MAX_WORDS = 30  # a longer reference in words is not an answer


@lru_cache(maxsize=4096)
def math_reference(reference: str) -> Value:
    """The value of a reference: what follows "####", is in \\boxed or follows "the answer is", otherwise all of it.

    Raises:
        ToolkitError: it is empty, its braces do not close, or it is a long text without an answer.
    """
    reference = with_digits(reference)
    text = final_line(reference) or last_boxes(reference) or after_phrase(reference) or reference
    if not re.search(r"\w|\\[a-z]", formula(text)):
        raise ToolkitError(f"the reference {shown(reference)} contains no answer")
    if not is_balanced(text):
        raise ToolkitError(f"the reference {shown(reference)} is broken LaTeX: its braces or environments do not close")
    if len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}|[\u4e00-\u9fff]", text)) > MAX_WORDS:
        raise ToolkitError(
            f"the reference {shown(reference)} is a long text without a final answer in \\boxed{{}} or after ####"
        )
    return value_of(text)


def math(completion: str, *, reference: str) -> Verdict:
    """1 if the final answer is the reference: the same number, expression, list, interval, quantity, choice or text.

    Raises:
        ToolkitError: the reference cannot be read.
    """
    gold = math_reference(reference)
    completion = with_digits(completion)
    answers = candidates(completion)
    if not answers:
        return judged(False, "the answer is empty")
    if isinstance(gold, Choice) and all(isinstance(value_of(text), (Leaf, Words)) for text in answers):
        letter = chosen_letter(completion.strip())
        answers = [letter, *answers] if letter else answers
    for text in answers:
        if same(gold, value_of(text)):
            return judged(True, f"the answer {shown(text)} is the reference {shown(reference)}")
    return judged(False, f"the answer {shown(answers[0])} is not the reference {shown(reference)}")
