"""A rule as a reward."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from conversations.answers.many import Asked, verify_all
from conversations.answers.rules import MEASURED, find_rule
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer, OnError, Reward, Values


class RuleReward(Reward):
    """The score of one of the rules of `conversations.verify`.

    Raises:
        ToolkitError: there is no rule of this name.
    """

    gives_reasons = True

    def __init__(
        self,
        rule: str,
        weight: float = 1.0,
        on_error: OnError = "error",
        settings: Mapping[str, Any] | None = None,
    ):
        super().__init__(rule, weight, on_error)
        self.rule, self.settings = rule, dict(settings or {})
        rule_function = find_rule(rule)
        self.needs_reference = self.verifies = rule_function.needs_reference
        self.measured = [key for key in MEASURED if key in rule_function.settings]

    def judge(self, answers: Sequence[Answer]) -> Values:
        """The rule's scores. An unreadable reference affects only its own answer."""
        verdicts = verify_all(self.rule, [self._input_of(answer) for answer in answers])
        unreadable = next((verdict for verdict in verdicts if isinstance(verdict, ToolkitError)), None)
        if unreadable is not None and self.on_error == "error":
            raise unreadable
        self.reasons = [str(v) if isinstance(v, ToolkitError) else v.reason for v in verdicts]
        return [math.nan if isinstance(verdict, ToolkitError) else verdict.score for verdict in verdicts]

    def _input_of(self, answer: Answer) -> Asked:
        measured = {key: value for key in self.measured if (value := getattr(answer, key)) is not None}
        return Asked(answer.text, answer.prompt, answer.reference, {**self.settings, **measured})
