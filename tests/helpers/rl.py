"""GRPO runs of a tiny model, for tests of the stage rl."""

from pathlib import Path
from typing import Any

from conversations.answers.prompts import prompt_text
from conversations.rewards.base import Reward
from deepseek_v2_modeling.training.mixin import RunLimits
from rl.config import RlRecipe
from rl.stage import grpo_config, prompt_dataset, train
from rl.trainer import PolicyTrainer

from .stages import SECTIONS, byte_tokenizer, chat_model, conversations


class Vowels(Reward):
    """How many vowels: a reward with spread, whatever a random model says."""

    def judge(self, answers):
        return [float(sum(letter in "aeiouAEIOU" for letter in answer.text)) for answer in answers]


class VowelsOfSome(Vowels):
    """One reward, with a value that rounds, for all answers to prompts with an even number."""

    def judge(self, answers):
        even = [int(prompt_text(answer.prompt).split()[0]) % 2 == 0 for answer in answers]
        return [0.1 if e else value for e, value in zip(even, super().judge(answers), strict=True)]


def recipe(run_dir: Path, **changes):
    training = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "beta": 0.1,
        "save_steps": 2,
        **changes.pop("training", {}),
    }
    sections = {**SECTIONS, "rewards": [{"rule": "format"}], "output_dir": str(run_dir)}
    return RlRecipe(**{**sections, "stage": "rl", "training": training, **changes})


def run(run_dir: Path, model=None, rewards=None, resume_from=None, rows=None, **changes):
    return train(
        recipe(run_dir, **changes),
        model=model or chat_model(),
        tokenizer=byte_tokenizer(),
        rows=conversations(16) if rows is None else rows,
        rewards=rewards or [Vowels("vowels")],
        run_dir=run_dir,
        resume_from=resume_from,
    )


def trainer_for(run_dir: Path, model=None, rewards=None, max_rounds=0, rollout_correction=None, **changes):
    rewards = rewards or [Vowels("vowels")]
    return PolicyTrainer(
        model or chat_model(),
        grpo_config(recipe(run_dir, **changes), run_dir, RunLimits(), rewards),
        rewards,
        train_dataset=prompt_dataset(conversations(16)),
        processing_class=byte_tokenizer(),
        limits=RunLimits(),
        max_rounds=max_rounds,
        rollout=recipe(run_dir, **changes).rollout,
        rollout_correction=rollout_correction,
    )


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without its seconds."""
    return {key: value for key, value in line.items() if key != "step_time" and not key.startswith("seconds/")}
