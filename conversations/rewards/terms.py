"""Builds the terms of the reward from the `rewards` section of a recipe."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conversations.answers.prompts import prompt_of
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer, OnError, Reward
from conversations.rewards.entry import JudgeSettings, RewardEntry
from conversations.rewards.function import FunctionReward
from conversations.rewards.judge import JudgeReward
from conversations.rewards.model import RewardModelReward
from conversations.rewards.rule import RuleReward
from conversations.row import Row
from conversations.stage import OtherModel


def build_rewards(
    entries: Sequence[RewardEntry], models: Mapping[str, OtherModel], run_dir: Path | None = None
) -> list[Reward]:
    """The terms of a recipe's reward, with unique names.

    models: the reward models, by their keys in the recipe. run_dir: where a judge's verdicts are stored.
    """
    rewards: list[Reward] = []
    for index, entry in enumerate(entries):
        if entry.rule is not None:
            rewards.append(RuleReward(entry.rule, entry.weight, entry.on_error, entry.settings))
            continue
        if entry.python is not None:
            rewards.append(function_reward(entry))
            continue
        if entry.judge is not None:
            rewards.append(judge_reward(entry.judge, run_dir, entry.weight, entry.on_error))
            continue
        rewards.append(model_reward(entry, models[f"rewards.{index}.model"]))
    names = [reward.name for reward in rewards]
    for index, reward in enumerate(rewards):
        if names.count(names[index]) > 1:  # TRL logs by name
            reward.__name__ = f"{names[index]}_{index}"
    return rewards


@contextmanager
def opened_rewards(
    entries: Sequence[RewardEntry], models: Mapping[str, OtherModel], run_dir: Path | None = None
) -> Iterator[list[Reward]]:
    """Context manager around `build_rewards` that closes the rewards at the end."""
    rewards = build_rewards(entries, models, run_dir)
    try:
        yield rewards
    finally:
        for reward in rewards:
            reward.close()


def function_reward(entry: RewardEntry) -> FunctionReward:
    """The reward of an entry with `python`."""
    assert entry.python is not None
    settings = {"timeout": entry.timeout, "workers": entry.workers}
    return FunctionReward(entry.python, entry.weight, entry.on_error, **settings)


def model_reward(entry: RewardEntry, other: OtherModel) -> RewardModelReward:
    """The reward of an entry with `model`, which has been loaded."""
    settings: dict[str, Any] = {"clip": entry.clip, "weight": entry.weight, "on_error": entry.on_error}
    settings |= {"combine": entry.combine, "device": other.device}
    return RewardModelReward(other.name, other.model, other.tokenizer, stats=other.stats, **settings)


def judge_reward(
    judge: JudgeSettings, run_dir: Path | None = None, weight: float = 1.0, on_error: OnError = "error"
) -> JudgeReward:
    """The reward of an entry with `judge`."""
    return JudgeReward(
        judge.endpoint(),
        judge.rubric_text(),
        weight,
        on_error,
        scale=(judge.scale[0], judge.scale[1]),
        mode=judge.mode,
        opponents=judge.opponents,
        concurrency=judge.concurrency,
        run_dir=run_dir,
    )


def check_references(rewards: Sequence[Reward], rows: Sequence[Row]) -> None:
    """Raise ToolkitError if a reward needs a reference and no row has one: it would never give a score."""
    if any(row.get("reference") is not None for row in rows):
        return
    for reward in rewards:
        if reward.needs_reference:
            raise ToolkitError(
                f"the reward {reward.name} needs a reference, and none of the {len(rows):,} rows has one; "
                "map the column that holds the right answer: data.0.columns: {reference: NAME}"
            )


def check_rewards(entries: Sequence[RewardEntry], rows: Sequence[Row]) -> None:
    """Raise ToolkitError if a rule or judge needs references and no row has one, a user-defined function fails on the
    first row, or a judge's key is missing. Makes no request to a judge."""
    judges = [judge_reward(entry.judge) for entry in entries if entry.judge]
    check_references([*(RuleReward(entry.rule) for entry in entries if entry.rule), *judges], rows)
    for entry in entries:
        if entry.python and rows:
            function_reward(entry).check(Answer(prompt_of(rows[0], 1), "", reference=rows[0].get("reference")))
