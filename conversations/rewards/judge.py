"""A language model behind an endpoint as a reward: it scores answers by a rubric, or compares them with a reference or
with one another."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from conversations.answers.prompts import prompt_text
from conversations.rewards.asking import Judge, Judged
from conversations.rewards.base import Answer, OnError, Reward, Values
from conversations.rewards.endpoint import EndpointSettings

Mode = Literal["pointwise", "pairwise", "group"]


class JudgeReward(Reward):
    """A judge's score from 0 to 1, by mode:

    pointwise   (points - lowest) / (highest - lowest) on the scale
    pairwise    comparison with the reference: 1 if the answer is better, 0 if it is worse
    group       the mean of such comparisons with the other answers to its prompt in the same batch; 0.5 if there are
                none

    Two answers are compared in both orders, since judges tend to prefer a position; the value is the mean of the two.

    Args:
        scale: the lowest and the highest points.
        opponents: the number of other answers that each answer of a group is compared with; None for all.
        concurrency: maximum number of concurrent requests.
        run_dir: where verdicts are stored; None keeps them in memory only.

    Raises:
        ToolkitError: the named key is not set, or must not be sent to this address.
    """

    gives_reasons = True

    def __init__(
        self,
        endpoint: EndpointSettings,
        rubric: str,
        weight: float = 1.0,
        on_error: OnError = "error",
        *,
        scale: tuple[float, float] = (1.0, 10.0),
        mode: Mode = "pointwise",
        opponents: int | None = None,
        concurrency: int = 8,
        run_dir: Path | None = None,
    ):
        super().__init__("judge", weight, on_error)
        self.mode, self.opponents = mode, opponents
        self.needs_reference = mode == "pairwise"
        self.asked = Judge(endpoint, rubric, scale=scale, mode=mode, concurrency=concurrency, run_dir=run_dir)

    def summary(self) -> str:
        return self.asked.summary()

    def judge(self, answers: Sequence[Answer]) -> Values:
        """Each distinct answer to a prompt is judged once."""
        if self.mode == "group":
            verdicts = self._group_verdicts(answers)
            judged = [verdicts[prompt_text(answer.prompt), answer.text] for answer in answers]
        else:
            questions = {self._key(answer): partial(self._judged, answer) for answer in answers}
            verdict_of = self.asked.ask_all(questions, self.on_error == "error")
            judged = [verdict_of[self._key(answer)] for answer in answers]
        self.reasons = [verdict.reason for verdict in judged]
        return [verdict.value for verdict in judged]

    def _key(self, answer: Answer) -> tuple[str, str, str | None]:
        return prompt_text(answer.prompt), answer.text, answer.reference if self.needs_reference else None

    def _judged(self, answer: Answer) -> Judged:
        prompt = prompt_text(answer.prompt)
        if self.mode == "pointwise":
            return self.asked.points(prompt, answer.text)
        if answer.reference is None:
            return Judged(None, "no reference to compare with")
        return self.asked.compared(prompt, answer.text, answer.reference, called="the reference")

    def _group_verdicts(self, answers: Sequence[Answer]) -> dict[tuple[str, str], Judged]:
        """{(prompt, text): verdict}, from comparisons of each answer with others to the same prompt."""
        groups: dict[str, dict[str, None]] = {}
        for answer in answers:
            groups.setdefault(prompt_text(answer.prompt), {})[answer.text] = None
        pairs = {(prompt, *pair) for prompt, texts in groups.items() for pair in meetings([*texts], self.opponents)}
        questions = {pair: partial(self.asked.compared, *pair) for pair in sorted(pairs)}
        verdicts = self.asked.ask_all(questions, self.on_error == "error")
        comparisons: dict[tuple[str, str], list[Judged]] = {
            (prompt, text): [] for prompt in groups for text in groups[prompt]
        }
        for (prompt, first, second), verdict in verdicts.items():
            assert verdict.value is not None
            comparisons[prompt, first].append(verdict)
            comparisons[prompt, second].append(Judged(1 - verdict.value, verdict.reason))
        return {place: standing(judged) for place, judged in comparisons.items()}


def meetings(texts: Sequence[str], opponents: int | None) -> set[tuple[str, str]]:
    """The pairs of texts to compare, each in one order: all pairs, or each text with its successors on a circle, so
    that each has `opponents` others (one more if that number is odd)."""
    count = len(texts)
    steps = count // 2 if opponents is None else min(count // 2, -(-opponents // 2))
    pairs = {(texts[i], texts[(i + step) % count]) for i in range(count) for step in range(1, steps + 1)}
    return {(min(pair), max(pair)) for pair in pairs}


def standing(comparisons: Sequence[Judged]) -> Judged:
    """The mean of an answer's comparisons that succeeded; NaN if all of them failed."""
    if not comparisons:
        return Judged(0.5, "no other answer to compare with")
    values = [verdict.value for verdict in comparisons if verdict.value is not None and not math.isnan(verdict.value)]
    if not values:
        return Judged(math.nan, comparisons[0].reason)
    better, worse = sum(value > 0.5 for value in values), sum(value < 0.5 for value in values)
    missing = f", {len(comparisons) - len(values)} not compared" if len(values) < len(comparisons) else ""
    equal = len(values) - better - worse
    return Judged(
        sum(values) / len(values),
        f"better than {better} of {len(comparisons)} others, worse than {worse}, as good as {equal}{missing}",
    )
