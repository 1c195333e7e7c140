"""The terms of the reward, r = sum of weight * value (paper, section 4.2: r = c1 helpful + c2 safety + c3 rule).

A reward is called as TRL calls its reward functions, with lists of one entry a completion, and returns a value for
each, or None where it has nothing to say (a rule that needs a reference, and a row without one).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from conversations import render_conversation
from conversations.answers.many import Asked, verify_all
from conversations.answers.own_function import call, check_loaded, place_of
from conversations.answers.prompts import Row, answer_text, prompt_text
from conversations.answers.reward_stats import RewardStats
from conversations.answers.rules import find_rule
from conversations.answers.workers import TooLong, Workers
from conversations.errors import ToolkitError
from conversations.stage import OtherModel
from deepseek_v2_modeling.inference import score_sequences
from rl.config import RewardEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnError = Literal["error", "zero", "skip"]
Values = list[float | None]
MIN_STD = 1e-6
REMEMBERED = 100_000  # values of a function of the user's


@dataclass(frozen=True)
class Answer:
    """One completion to judge. finished: whether the model ended it itself, before the limit of tokens."""

    prompt: list[Row]
    text: str
    finished: bool = True
    reference: str | None = None


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

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> Values:
        """A value for each answer; None where the reward does not apply."""

    def __call__(self, prompts: list[list[Row]], completions: list[list[Row]], **columns: Any) -> Values:
        """TRL's call: prompts and completions are lists of messages, columns lists of the rows' other fields."""
        nothing = [None] * len(prompts)
        answers = [
            Answer(prompt, answer_text(completion[-1]["content"]), finished is not False, reference)
            for prompt, completion, finished, reference in zip(
                prompts,
                completions,
                columns.get("finished") or nothing,
                columns.get("reference") or nothing,
                strict=True,
            )
        ]
        self.reasons = [None] * len(answers)
        return self._guarded(answers)

    def _guarded(self, answers: Sequence[Answer]) -> Values:
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


class RuleReward(Reward):
    """The score of a rule of `conversations.verify`.

    Raises:
        ToolkitError: there is no such rule.
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
        self.needs_reference = rule_function.needs_reference
        self.takes_finished = "finished" in rule_function.settings

    def judge(self, answers: Sequence[Answer]) -> Values:
        """The rule's scores. A reference that cannot be read touches its answer only."""
        verdicts = verify_all(self.rule, [self._asked(answer) for answer in answers])
        unread = next((verdict for verdict in verdicts if isinstance(verdict, ToolkitError)), None)
        if unread is not None and self.on_error == "error":
            raise unread
        self.reasons = [str(v) if isinstance(v, ToolkitError) else v.reason for v in verdicts]
        return [math.nan if isinstance(verdict, ToolkitError) else verdict.score for verdict in verdicts]

    def _asked(self, answer: Answer) -> Asked:
        settings = {**self.settings, **({"finished": answer.finished} if self.takes_finished else {})}
        return Asked(answer.text, answer.prompt, answer.reference, settings)


class FunctionReward(Reward):
    """A function of the user's, in processes of its own: what it does to its process touches no other, and a call that
    hangs is ended. It is asked once for each answer to a prompt.

    Raises:
        ToolkitError: no such file or function.
    """

    def __init__(
        self,
        written: str,
        weight: float = 1.0,
        on_error: OnError = "error",
        *,
        timeout: float = 10.0,
        workers: int = 1,
    ):
        super().__init__(place_of(written)[1], weight, on_error)
        self.written, self.timeout, self.count = written, timeout, workers
        self.workers = Workers(workers)
        self.known: dict[tuple[str, str, str | None, bool], float | None] = {}

    def judge(self, answers: Sequence[Answer]) -> Values:
        new = {self._key(answer): answer for answer in answers if self._key(answer) not in self.known}
        asked = [
            {"prompt": a.prompt, "completion": a.text, "reference": a.reference, "finished": a.finished}
            for a in new.values()
        ]
        size = max(1, math.ceil(len(asked) / self.count))
        found = dict(zip(new, self.workers.map(partial(call, self.written), asked, size, self.timeout), strict=True))
        failed = {key: error for key, error in found.items() if isinstance(error, Exception)}
        if failed and self.on_error == "error":
            error = next(iter(failed.values()))
            raise ToolkitError(self._told(error)) from error
        self.known |= {key: value for key, value in found.items() if key not in failed}
        if len(self.known) > REMEMBERED:
            self.known = {key: self.known[key] for key in map(self._key, answers) if key in self.known}
        return [math.nan if (key := self._key(a)) in failed else self.known[key] for a in answers]

    def check(self, answer: Answer) -> None:
        """Calls the function once, and ends its processes.

        Raises:
            ToolkitError: the file cannot be read or run, or has no such function; or, with on_error "error", the call
                failed.
        """
        try:
            (function,) = self.workers.map(check_loaded, [self.written], 1, self.timeout)
            if isinstance(function, Exception):
                raise ToolkitError(self._told(function)) from function
            if self.on_error == "error":
                self.judge([answer])
        finally:
            self.workers.close()

    def _told(self, error: Exception) -> str:
        if isinstance(error, TooLong):
            return f"{self.written} took longer than timeout = {self.timeout:g} s for one answer"
        return str(error) if isinstance(error, ToolkitError) else f"{self.written}: its process ended ({error})"

    def _key(self, answer: Answer) -> tuple[str, str, str | None, bool]:
        return prompt_text(answer.prompt), answer.text, answer.reference, answer.finished


class RewardModelReward(Reward):
    """A reward model's score of the conversation that ends in the answer, without an end token where the answer was cut
    before it; normalised, then clipped.

    Args:
        model: a DeepseekV2ForSequenceClassification with one label, in evaluation mode.
        tokenizer: the reward model's own.
        stats: subtract the mean and divide by the spread; None leaves scores as they are.
        clip: cut to [-clip, clip]; None leaves them.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        stats: RewardStats | None = None,
        clip: float | None = None,
        weight: float = 1.0,
        on_error: OnError = "error",
        batch_size: int = 128,
    ):
        super().__init__(name, weight, on_error)
        self.model = model
        self.tokenizer: Any = tokenizer
        self.stats = stats
        self.clip = clip
        self.batch_size = batch_size

    def judge(self, answers: Sequence[Answer]) -> Values:
        """A policy that has learned something says the same thing often: each conversation is scored once."""
        places = {_said(answer): i for i, answer in enumerate(answers)}
        ids = [self._ids(answers[i]) for i in places.values()]
        scores = score_sequences(self.model, ids, pad_token_id=self.tokenizer.pad_token_id, batch_size=self.batch_size)
        by_place = dict(zip(places, scores, strict=True))
        return [normalised(by_place[_said(answer)], self.stats, self.clip) for answer in answers]

    def _ids(self, answer: Answer) -> list[int]:
        turns = [*answer.prompt, {"role": "assistant", "content": answer.text}]
        ids = render_conversation(turns, self.tokenizer)["input_ids"]
        return ids if answer.finished else ids[:-1]


def _said(answer: Answer) -> tuple[str, str, bool]:
    """What a reward model's score depends on."""
    return prompt_text(answer.prompt), answer.text, answer.finished


def build_rewards(entries: Sequence[RewardEntry], models: Mapping[str, OtherModel]) -> list[Reward]:
    """The terms of a recipe's reward, by names that differ. models: the reward models, by their keys in the recipe."""
    rewards: list[Reward] = []
    for index, entry in enumerate(entries):
        if entry.rule is not None:
            rewards.append(RuleReward(entry.rule, entry.weight, entry.on_error, entry.settings))
            continue
        if entry.python is not None:
            rewards.append(function_reward(entry))
            continue
        other = models[f"rewards.{index}.model"]
        settings: dict[str, Any] = {"clip": entry.clip, "weight": entry.weight, "on_error": entry.on_error}
        rewards.append(RewardModelReward(other.name, other.model, other.tokenizer, stats=other.stats, **settings))
    names = [reward.name for reward in rewards]
    for index, reward in enumerate(rewards):
        if names.count(names[index]) > 1:  # TRL logs by name
            reward.__name__ = f"{names[index]}_{index}"
    return rewards


def function_reward(entry: RewardEntry) -> FunctionReward:
    """Of an entry with `python`."""
    assert entry.python is not None
    settings = {"timeout": entry.timeout, "workers": entry.workers}
    return FunctionReward(entry.python, entry.weight, entry.on_error, **settings)


def normalised(score: float, stats: RewardStats | None, clip: float | None) -> float:
    """(score - mean) / std, cut to [-clip, clip]. NaN stays NaN."""
    if stats is not None:
        score = (score - stats.mean) / max(stats.std, MIN_STD)
    return score if clip is None or math.isnan(score) else max(-clip, min(clip, score))


def check_references(rewards: Sequence[Reward], rows: Sequence[Row]) -> None:
    """Raises ToolkitError for a reward that needs a reference where no row has one: it would say nothing, ever."""
    if any(row.get("reference") is not None for row in rows):
        return
    for reward in rewards:
        if reward.needs_reference:
            raise ToolkitError(
                f"the reward {reward.name} needs a reference, and none of the {len(rows):,} rows has one; "
                "map the column that holds the right answer: data.0.columns: {reference: NAME}"
            )
