"""What tests/test_data_parallel.py runs under torchrun: every stage, with two processes on the CPU."""

import sys
from pathlib import Path
from typing import Any

import torch

import sft.stage
from eval.config import EvalRecipe
from eval.stage import evaluate
from reward.config import RewardRecipe
from reward.stage import train as train_reward
from rl.config import RlRecipe
from rl.rewards import RuleReward
from rl.stage import train as train_rl
from sft.config import SftRecipe
from tests.stage_helpers import SECTIONS, byte_tokenizer, chat_model, conversations, pairs, score_model

GLOBAL_BATCH = 4
sft.stage.SAMPLE_TOKENS = 4  # a random model does not stop by itself
SFT = {"max_steps": 4, "learning_rate": 1e-2, "max_length": 64, "save_steps": 2}
REWARD = {"max_steps": 2, "learning_rate": 1e-2, "max_length": 64, "save_strategy": "no"}
RL = {"max_steps": 2, "num_generations": 4, "max_completion_length": 4, "beta": 0.1, "save_strategy": "no"}
TASK = {"name": "right", "metric": "exact_match", "max_new_tokens": 4}


def recipe(cls: Any, stage: str, folder: Path, processes: int, training: dict[str, Any] | None = None) -> Any:
    sections = {**SECTIONS, "stage": stage, "output_dir": str(folder)}
    if training is not None:
        sections["training"] = {**training, "per_device_train_batch_size": GLOBAL_BATCH // processes}
    return cls(**sections, **({"rewards": [{"rule": "format"}]} if stage == "rl" else {}))


def train_sft_model(folder: Path, processes: int, resume_from: Path | None = None) -> dict[str, Any]:
    return sft.stage.train(
        recipe(SftRecipe, "sft", folder, processes, SFT),
        model=chat_model(seed=0 if resume_from is None else 1),
        tokenizer=byte_tokenizer(),
        rows=conversations(24),
        eval_rows=conversations(30)[24:],
        run_dir=folder,
        resume_from=resume_from,
    )


def reward(folder: Path, processes: int) -> dict[str, Any]:
    return train_reward(
        recipe(RewardRecipe, "reward", folder, processes, REWARD),
        model=score_model(),
        tokenizer=byte_tokenizer(),
        rows=pairs(16),
        eval_rows=pairs(20)[16:],
        run_dir=folder,
        resume_from=None,
    )


def rl(folder: Path, processes: int) -> dict[str, Any]:
    return train_rl(
        recipe(RlRecipe, "rl", folder, processes, RL),
        model=chat_model(),
        tokenizer=byte_tokenizer(),
        rows=conversations(16),
        rewards=[RuleReward("format"), RuleReward("number")],
        run_dir=folder,
        resume_from=None,
    )


def measure(folder: Path) -> dict[str, Any]:
    sections = {**SECTIONS, "stage": "eval", "output_dir": str(folder), "tasks": [TASK]}
    return evaluate(
        EvalRecipe(**sections),
        model=chat_model().eval(),
        tokenizer=byte_tokenizer(),
        rows_by_task={"right": conversations(5)},
        run_dir=folder,
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    train_sft_model(folder / "sft", 2)
    train_sft_model(folder / "sft", 2, resume_from=folder / "sft" / "checkpoint-2")
    train_sft_model(folder / "straight", 2)
    reward(folder / "reward", 2)
    rl(folder / "rl", 2)
    assert measure(folder / "eval")["right"]["n"] == 5
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
