"""Verdicts on open-ended answers: of a judge behind an endpoint, or of a reward model; alone or against a baseline."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from conversations.answers.prompts import prompt_text
from conversations.rewards.asking import Judge, Judged
from conversations.rewards.base import Answer
from conversations.rewards.entry import JudgeSettings
from conversations.rewards.model import RewardModelReward
from conversations.rewards.terms import model_reward
from conversations.row import Message
from conversations.stage import OtherModel
from eval.open_ended.conversing import Exchange
from eval.open_ended.entry import OpenTask

BASELINE = "the baseline"  # in reasons


@dataclass(frozen=True)
class Verdict:
    """value: points on the judge's scale, a reward model's score, or in a comparison 1 (better), 0.5 or 0; None if the
    judge did not answer. scores: a reward model's, of the answer and of the baseline's. orders: see `Judged`."""

    value: float | None
    reason: str
    scores: Sequence[float] | None = None
    orders: tuple[float, float] | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """As part of a line of samples.jsonl."""
        more = {"scores": self.scores, "orders": self.orders and [*self.orders]}
        return {"value": self.value, "reason": self.reason, **{key: v for key, v in more.items() if v is not None}}


def verdicts_on(
    task: OpenTask, exchanges: Sequence[Exchange], other: OtherModel | None, run_dir: Path, device: Any
) -> list[Verdict]:
    """A verdict on each answer.

    other: the reward model, if the task has one. run_dir: where a judge's verdicts are stored. device: of the model
    under evaluation.

    Raises:
        ToolkitError: the judge does not answer, unless the task says on_error: skip.
    """
    if task.reward.judge is not None:
        return _judged(task, task.reward.judge, exchanges, run_dir)
    assert other is not None
    reward = model_reward(task.reward, other)
    reward.move(device)
    return (_scored if task.baseline is None else _better_scored)(reward, exchanges)


# --- by a judge


def _judged(task: OpenTask, settings: JudgeSettings, exchanges: Sequence[Exchange], run_dir: Path) -> list[Verdict]:
    low, high = settings.scale
    judge = Judge(
        settings.endpoint(),
        settings.rubric_text(),
        scale=(low, high),
        mode="points" if task.baseline is None else "comparison",
        concurrency=settings.concurrency,
        run_dir=run_dir,
        processes=1,
    )
    ask = partial(_points if task.baseline is None else _compared, judge)
    questions = {place: partial(ask, exchange) for place, exchange in enumerate(exchanges)}
    found = judge.ask_all(questions, stop=task.reward.on_error == "error")
    print(f"eval: {task.name}: so far {judge.summary()}", file=sys.stderr, flush=True)
    scale = (low, high) if task.baseline is None else (0.0, 1.0)
    return [_on_scale(found[place], scale) for place in range(len(exchanges))]


def _points(judge: Judge, exchange: Exchange) -> Judged:
    reference = exchange.question.reference(exchange.turn)
    return judge.points(prompt_text(exchange.prompt), exchange.answer.text, reference)


def _compared(judge: Judge, exchange: Exchange) -> Judged:
    first, *later = exchange.own
    return judge.compared(
        first["content"],
        _side(later),
        _side(exchange.opponent[1:]),
        exchange.question.reference(exchange.turn),
        whole=exchange.turn > 0,
        called=BASELINE,
    )


def _side(messages: Sequence[Message]) -> str:
    """One side of a comparison: an answer, or all that follows the first question."""
    return prompt_text(messages)


def _on_scale(judged: Judged, scale: tuple[float, float]) -> Verdict:
    low, high = scale
    if judged.value is None or math.isnan(judged.value):
        return Verdict(None, judged.reason)
    return Verdict(low + judged.value * (high - low), judged.reason, orders=judged.orders)


# --- by a reward model

_UNSCORED = Verdict(None, "the score is not finite")


def _scored(reward: RewardModelReward, exchanges: Sequence[Exchange]) -> list[Verdict]:
    scores = reward.judged([_answer(exchange.own, exchange.answer.finished) for exchange in exchanges])
    return [_UNSCORED if score is None else Verdict(score, f"{reward.name} gives {score:.3f}") for score in scores]


def _better_scored(reward: RewardModelReward, exchanges: Sequence[Exchange]) -> list[Verdict]:
    own = reward.judged([_answer(exchange.own, exchange.answer.finished) for exchange in exchanges])
    theirs = reward.judged([_answer(exchange.opponent, exchange.opponent_finished) for exchange in exchanges])
    return [_of_scores(reward.name, *both) for both in zip(own, theirs, strict=True)]


def _of_scores(name: str, own: float | None, other: float | None) -> Verdict:
    if own is None or other is None:
        return _UNSCORED
    reason = f"{name} gives {own:.3f}, and {BASELINE} {other:.3f}"
    return Verdict(float(own > other) if own != other else 0.5, reason, scores=[own, other])


def _answer(conversation: Sequence[Message], finished: bool) -> Answer:
    return Answer([*conversation[:-1]], conversation[-1]["content"], finished)
