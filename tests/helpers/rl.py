"""GRPO runs of a tiny model, for tests of the stage rl."""

import copy
from pathlib import Path
from typing import Any

import torch

from conversations.answers.prompts import prompt_text
from conversations.rewards.base import Reward
from deepseek_v2_modeling.inference import generate_answers
from rl.config import RlRecipe
from rl.stage import build_trainer, train

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
    rule = "number" if changes.get("curriculum") else "format"
    sections = {**SECTIONS, "rewards": [{"rule": rule}], "output_dir": str(run_dir)}
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


def trainer_for(run_dir: Path, model=None, rewards=None, **changes):
    return build_trainer(
        recipe(run_dir, **changes),
        model=model or chat_model(),
        tokenizer=byte_tokenizer(),
        rows=conversations(16),
        rewards=rewards or [Vowels("vowels")],
        run_dir=run_dir,
    )


def perturbed(model: Any, size: float) -> Any:
    """A copy with other weights in one layer and the head, in evaluation mode."""
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name.startswith(("lm_head", "model.layers.1")):
                weight += size * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    return other


def sample_from(trainer: Any, sampler: Any, monkeypatch: Any) -> None:
    """Rollouts by another model than the one that is updated."""
    usual = type(trainer)._generate_single_turn

    def sample(self, prompt_ids, *args, **kwargs):
        if self.answers:
            return usual(self, prompt_ids, *args, **kwargs)
        settings = {"pad_token_id": 2, "eos_token_id": self.eos_token_ids, "temperature": self.temperature}
        most = self.args.max_completion_length
        return generate_answers(sampler, prompt_ids, max_new_tokens=most, batch_size=len(prompt_ids), **settings), None

    monkeypatch.setattr(type(trainer), "_generate_single_turn", sample)


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without its seconds."""
    return {key: value for key, value in line.items() if key != "step_time" and not key.startswith("seconds/")}
