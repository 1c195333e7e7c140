"""What tests/stages/test_sharded.py runs, on one process and under torchrun on two: training by the command line."""

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from deepseek_v2_modeling.loading import save_directory
from deepseek_v2_modeling.sharding import reshard
from deepseek_v2_modeling.training import RunTrainerMixin
from recipes.cli import main
from recipes.processes import is_main, wait_for_all, world_size

from .models import IN_BLOCKS
from .stages import assistant, byte_tokenizer, chat_model, conversations, pairs

BATCH = 4
TRAINING = {"max_steps": 4, "learning_rate": 1e-2, "max_length": 64, "save_steps": 2, "logging_steps": 1}
LORA = {"targets": ["attention", "experts", "shared_experts"], "r": 4}
WITH_EMBEDDINGS = {"targets": ["attention", "embeddings", "lm_head"], "r": 4}
# 5 held-out rows, which are no full batches of two processes
EVALUATING = {**TRAINING, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
EACH_STEP = {"save_steps": 1, "save_total_limit": 4}
ON_PAIRS = {
    "data": [{"path": "pairs.jsonl"}],
    "eval_data": [{"path": "held_out_pairs.jsonl"}],
    # slow, so that KTO's KL stays 0: it depends on what is in the batch of each process
    "training": {**EVALUATING, "max_steps": 2, "save_strategy": "no", "learning_rate": 1e-3},
}
RECIPES: dict[str, dict[str, Any]] = {
    "full": {"stage": "sft", "eval_data": [{"path": "held_out.jsonl"}], "training": {**EVALUATING, **EACH_STEP}},
    "lora": {"stage": "sft", "lora": LORA, "training": {**TRAINING, **EACH_STEP, "gradient_checkpointing": True}},
    "packed": {
        "stage": "sft",
        "lora": LORA,
        "model": {"path": "base", "dtype": "bfloat16"},
        "training": {**TRAINING, "packing": True, "save_strategy": "no", "gradient_accumulation_steps": 2},
    },
    "chosen": {
        "stage": "sft",
        "lora": {**LORA, "targets": ["attention", "experts"], "experts_file": "experts.json"},
        "training": {**TRAINING, **EACH_STEP},
    },
    "quantized": {
        "stage": "sft",
        "lora": LORA,
        "model": {"path": "wide", "quantization": "nf4"},
        "training": {**TRAINING, "save_strategy": "no"},
    },
    "reward": {"stage": "reward", "lora": LORA, **ON_PAIRS, "training": EVALUATING},
    "dpo": {"stage": "rl", "method": "dpo", "lora": WITH_EMBEDDINGS, **ON_PAIRS},
    "kto": {"stage": "rl", "method": "kto", "lora": WITH_EMBEDDINGS, **ON_PAIRS, "model": {"path": "one_dpo/final"}},
}
ROLLOUTS: dict[str, Any] = {
    "stage": "rl",
    "rewards": [{"rule": "format"}],  # which random answers meet if they end by themselves
    "eval_data": [{"path": "held_out.jsonl", "split": "train[:1]"}],  # one of two processes has nothing to answer
    "training": {
        **{"max_steps": 3, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "beta": 0.1},
        **{"num_generations": 4, "max_completion_length": 48, "eval_strategy": "steps", "eval_steps": 3},
        "per_device_eval_batch_size": 4,
    },
}
RL: dict[str, dict[str, Any]] = {"rl_full": ROLLOUTS, "rl_lora": {**ROLLOUTS, "lora": LORA}}
STEPPED = ("full", "lora", "chosen")  # with a checkpoint of each step: resumed on other numbers of processes
BY_EXPERTS = ("full", "lora", "packed", "chosen", "quantized")  # with expert parallelism too


def prepare(folder: Path) -> None:
    """Write the model and the rows."""
    save_directory(chat_model(), byte_tokenizer(), folder / "base")
    save_directory(chat_model(**IN_BLOCKS), byte_tokenizer(), folder / "wide")
    apart = [{**row, "rejected": assistant("no" + "x" * (i % 7))} for i, row in enumerate(pairs(21))]
    rows = {"rows": conversations(24), "held_out": conversations(29)[24:]}
    rows |= {"pairs": apart[:16], "held_out_pairs": apart[16:]}
    (folder / "experts.json").write_text('{"experts": {"1": [1, 2, 6]}}')
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))


def train(name: str, folder: Path, output: str, parallel: dict[str, int] | None = None) -> int:
    """Run a recipe of the table in `folder`; returns the exit code."""
    recipe = {"model": {"path": "base"}, "data": [{"path": "rows.jsonl"}], **(RECIPES | RL)[name], "output_dir": output}
    batch = BATCH // world_size() // recipe["training"].get("gradient_accumulation_steps", 1)
    recipe["training"] = {**recipe["training"], "per_device_train_batch_size": batch}
    if parallel is not None:
        recipe["parallel"] = parallel
    path = folder / f"{output}.yaml"
    if is_main():
        path.write_text(json.dumps(recipe))
    wait_for_all()
    return main([recipe["stage"], str(path), "--no-cache"])


def stopped_at(step: int, run: Path, copy: Path) -> None:
    """Copy a run as it was after a step."""
    later = {"final", *(f"checkpoint-{number}" for number in range(step + 1, TRAINING["max_steps"] + 1))}
    shutil.copytree(run, copy, ignore=lambda _, names: later.intersection(names))
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"output_dir: {run.name}", f"output_dir: {copy.name}"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "status": "stopped"}))


def note_meshes(folder: Path) -> None:
    """Write down among which processes the parameters of the trainers that finish are divided."""
    finish = RunTrainerMixin.finish

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        reshard(self.model)
        meshes = {
            name: parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else None
            for name, parameter in self.model.named_parameters()
        }
        done = finish(self, *args, **kwargs)
        if is_main():
            (folder / f"{self.run_dir.name}.meshes.json").write_text(json.dumps(meshes))
        return done

    RunTrainerMixin.finish = noting


def two_processes(folder: Path) -> None:
    """Everything that two processes do: all recipes, and resuming what two and what one have begun."""
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not looked through again by each Trainer
    note_meshes(folder)
    shared = {"fsdp": world_size()}
    for name in RECIPES:
        assert train(name, folder, f"two_{name}", shared) == 0
    for name in BY_EXPERTS:
        assert train(name, folder, f"ep_{name}", {**shared, "ep": world_size()}) == 0
    for name, parallel in {"rl_full": shared, "rl_lora": {**shared, "ep": world_size()}}.items():
        assert train(name, folder, f"one_{name}") == 0  # all weights in each process, but the same rollouts
        assert train(name, folder, f"two_{name}", parallel) == 0
    if is_main():
        stopped_at(2, folder / "two_rl_lora", folder / "rl_again")
        stopped_at(2, folder / "two_full", folder / "two_again")
        stopped_at(2, folder / "ep_lora", folder / "lora_again")
    assert train("rl_lora", folder, "rl_again", {**shared, "ep": world_size()}) == 0
    assert train("full", folder, "two_again", shared) == 0
    assert train("lora", folder, "lora_again", shared) == 0
    for name in STEPPED:
        assert train(name, folder, f"one_to_two_{name}", shared) == 0
    dist.destroy_process_group()


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
