"""The terms of a reward, r = sum of weight * value (paper, section 4.2: r = c1 helpful + c2 safety + c3 rule).

A reward is called as TRL calls its reward functions, with lists of one entry per completion, and returns a value for
each, or None if it does not apply (a rule that needs a reference, and a row without one).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from conversations.answers.prompts import answer_text
from conversations.errors import ToolkitError
from conversations.row import Row

OnError = Literal["error", "zero", "skip"]
Values = list[float | None]


@dataclass(frozen=True)
class Answer:
    """One completion to judge.

    finished: whether the model ended it itself, before the limit of tokens. tokens: their number, the end token
    included; None where it is not known.
    """

    prompt: list[Row]
    text: str
    finished: bool = True
    reference: str | None = None
    tokens: int | None = None


class Reward(ABC):
    """A named, weighted reward function; subclasses say how to `judge` answers.

    on_error: what a value that cannot be had counts as: an error that ends the run, 0, or nothing (None).
    """

    needs_reference = False
    gives_reasons = False

    def __init__(self, name: str, weight: float = 1.0, on_error: OnError = "error"):
        self.__name__ = name  # what TRL calls it in its log
        self.weight = weight
        self.on_error = on_error
        self.reasons: Sequence[str | None] = ()  # for the values that were given last

    @property
    def name(self) -> str:
        return self.__name__

    def summary(self) -> str | None:
        """What the run should say of it when it ends; None for nothing."""
        return None

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Release what the reward holds besides memory; it is not asked again."""

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> Values:
        """A value for each answer; None where the reward does not apply."""

    def __call__(self, prompts: list[list[Row]], completions: list[list[Row]], **columns: Any) -> Values:
        """TRL's call: prompts and completions are lists of messages, columns lists of the rows' other fields."""
        nothing = [None] * len(prompts)
        answers = [
            Answer(
                prompt,
                answer_text(completion[-1]["content"]),
                finished is not False,
                reference,
                None if ids is None else len(ids),
            )
            for prompt, completion, finished, reference, ids in zip(
                prompts,
                completions,
                columns.get("finished") or nothing,
                columns.get("reference") or nothing,
                columns.get("completion_ids") or nothing,
                strict=True,
            )
        ]
        return self.judged(answers)

    def judged(self, answers: Sequence[Answer]) -> Values:
        """A finite value for each answer, or what `on_error` says; `reasons` has why.

        Raises:
            ToolkitError: a value is not available, and on_error is "error".
        """
        self.reasons = [None] * len(answers)
        try:
            values = self.judge(answers)
        except Exception as error:
            if self.on_error == "error":
                raise ToolkitError(f"the reward {self.name} failed: {error}") from error
            values = [math.nan] * len(answers)
        bad = next((a for a, v in zip(answers, values, strict=True) if v is not None and not math.isfinite(v)), None)
        if bad is not None and self.on_error == "error":
            raise ToolkitError(f"the reward {self.name} gave no finite value for the answer {bad.text!r}")
        instead = 0.0 if self.on_error == "zero" else None
        return [instead if v is not None and not math.isfinite(v) else v for v in values]
