"""What tests/stages/test_data_parallel.py runs under torchrun: every stage, with two processes on the CPU."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import sft.stage
from conversations.rewards.rule import RuleReward
from eval.config import EvalRecipe
from eval.stage import evaluate
from reward.config import RewardRecipe
from reward.stage import train as train_reward
from rl.config import RlRecipe
from rl.stage import train as train_rl
from sft.config import SftRecipe
from tests.helpers.rl import VowelsOfSome
from tests.helpers.stages import SECTIONS, byte_tokenizer, chat_model, conversations, pairs, score_model

GLOBAL_BATCH = 4
sft.stage.SAMPLE_TOKENS = 4  # a random model does not stop by itself
SFT = {"max_steps": 4, "learning_rate": 1e-2, "max_length": 64, "save_steps": 2}
REWARD = {"max_steps": 2, "learning_rate": 1e-2, "max_length": 64, "save_strategy": "no"}
RL = {"max_steps": 2, "num_generations": 4, "max_completion_length": 4, "beta": 0.1, "save_strategy": "no"}
SAID = {"max_new_tokens": 4, "temperatures": [0, 1]}
ONE = {"limit": 1, "max_new_tokens": 3}  # row: one of the processes has none
TASKS = [
    {"name": "right", "metric": "exact_match", **SAID},
    {"name": "one_right", "metric": "exact_match", **ONE},
    {"name": "one_refused", "metric": "refusal", **ONE},
    {"name": "one_formed", "metric": "format", **ONE},
    {"name": "one_nats", "metric": "loss", **ONE},
]
PAIRS = [{"name": "ranked", "metric": "pair_accuracy"}, {"name": "one_ranked", "metric": "pair_accuracy", **ONE}]


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


def dynamic_rl(folder: Path) -> None:
    """Groups of 4 on 2 processes with 6 answers each: both have a part of the second. Writes each process's weights,
    and a checkpoint with its answers and all that it knows of prompts."""
    training = {**RL, "beta": 0.0, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    training |= {"save_strategy": "steps", "save_steps": 2}
    settings = {**SECTIONS, "stage": "rl", "output_dir": str(folder), "rewards": [{"rule": "number"}]}
    settings |= {"curriculum": {"by": "pass_rate"}, "routing_replay": "rollout"}
    model = chat_model(aux_loss_alpha=0.0)
    train_rl(
        RlRecipe(**settings, training=training, dynamic_sampling={"max_rounds": 2}),
        model=model,
        tokenizer=byte_tokenizer(),
        rows=conversations(16),
        rewards=[VowelsOfSome("vowels"), RuleReward("number")],
        run_dir=folder,
        resume_from=None,
    )
    torch.save(model.state_dict(), folder / f"weights.{PartialState().process_index}.pt")


def measure(folder: Path, tasks: list[dict[str, Any]], resume: bool = False) -> dict[str, Any]:
    sections = {**SECTIONS, "stage": "eval", "output_dir": str(folder), "tasks": tasks}
    ranked = tasks is PAIRS
    return evaluate(
        EvalRecipe(**sections),
        model=(score_model if ranked else chat_model)().eval(),
        tokenizer=byte_tokenizer(),
        rows_by_task={task["name"]: pairs(5) if ranked else conversations(5) for task in tasks},
        run_dir=folder,
        resume=resume,
    )


def evaluations(folder: Path) -> dict[str, Any]:
    """The figures of every metric, and those of an evaluation that resumes with half of its samples."""
    found = {"eval": measure(folder / "eval", TASKS), "pairs": measure(folder / "pairs", PAIRS)}
    lines = (folder / "eval" / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "again").mkdir(exist_ok=True)
    for name, part in (("samples", lines[:4]), ("samples.1", lines[5:8]), ("samples.3", lines[9:10])):
        (folder / "again" / f"{name}.jsonl").write_text("".join(part))
    PartialState().wait_for_everyone()
    found["again"] = measure(folder / "again", TASKS, resume=True)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not looked through again by each Trainer
    train_sft_model(folder / "sft", 2)
    train_sft_model(folder / "sft", 2, resume_from=folder / "sft" / "checkpoint-2")
    train_sft_model(folder / "straight", 2)
    reward(folder / "reward", 2)
    rl(folder / "rl", 2)
    dynamic_rl(folder / "dynamic")
    found = evaluations(folder)
    (folder / f"figures.{PartialState().process_index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
