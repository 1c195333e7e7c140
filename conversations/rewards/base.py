"""The terms of a reward, r = sum of weight * value (paper, section 4.2: r = c1 helpful + c2 safety + c3 rule).

A reward has the call signature of TRL's reward functions: lists with one entry per completion. It returns a value for
each, or None where it does not apply (for example a rule that needs a reference, on a row without one).
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

    finished: whether the model ended it with an end token, before the token limit. tokens: its length, including the
    end token; None if not known.
    """

    prompt: list[Row]
    text: str
    finished: bool = True
    reference: str | None = None
    tokens: int | None = None


class Reward(ABC):
    """A named, weighted reward function; subclasses implement `judge`.

    on_error: what to do if a value cannot be computed: "error" ends the run, "zero" counts 0, "skip" gives None.
    """

    needs_reference = False
    verifies = False  # whether 1 says that an answer is right
    gives_reasons = False

    def __init__(self, name: str, weight: float = 1.0, on_error: OnError = "error"):
        self.__name__ = name  # TRL uses this name in its logs
        self.weight = weight
        self.on_error = on_error
        self.reasons: Sequence[str | None] = ()  # the reasons for the values of the last call

    @property
    def name(self) -> str:
        return self.__name__

    def summary(self) -> str | None:
        """A line to print at the end of the run, or None."""
        return None

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Release resources other than memory; the reward is not called again."""

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> Values:
        """A value for each answer; None where the reward does not apply, NaN if it could not be computed."""

    def __call__(self, prompts: list[list[Row]], completions: list[list[Row]], **columns: Any) -> Values:
        """TRL's interface: prompts and completions are lists of messages; columns holds a list for each further field
        of the rows."""
        no_values = [None] * len(prompts)
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
                columns.get("finished") or no_values,
                columns.get("reference") or no_values,
                columns.get("completion_ids") or no_values,
                strict=True,
            )
        ]
        return self.judged(answers)

    def judged(self, answers: Sequence[Answer]) -> Values:
        """A finite value for each answer, or the replacement that `on_error` prescribes; sets `reasons`.

        Raises:
            ToolkitError: a value could not be computed, and on_error is "error".
        """
        self.reasons = [None] * len(answers)
        try:
            values = self.judge(answers)
        except Exception as error:
            if self.on_error == "error":
                raise ToolkitError(f"the reward {self.name} failed: {error}") from error
            values = [math.nan] * len(answers)
            self.reasons = [f"the reward {self.name} failed: {error}"] * len(answers)
        bad = next((a for a, v in zip(answers, values, strict=True) if v is not None and not math.isfinite(v)), None)
        if bad is not None and self.on_error == "error":
            raise ToolkitError(f"the reward {self.name} gave no finite value for the answer {bad.text!r}")
        fallback = 0.0 if self.on_error == "zero" else None
        return [fallback if v is not None and not math.isfinite(v) else v for v in values]
