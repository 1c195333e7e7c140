"""Runs that are killed with SIGKILL, started again, and compared with an uninterrupted one.

    python -m tests.helpers.resume_launch DIR               at the moments of `MOMENTS`, as test_resume.py does
    python -m tests.helpers.resume_launch DIR --kills 20    at random moments, from the command's start to its end
    python -m tests.helpers.resume_launch DIR --kills 10 --only rl

Every run is a separate process, forked from this one after the libraries are imported, and does everything that
`dsv2 sft` or `dsv2 rl` does: recipe, data, model, training, final/.
"""

import argparse
import gc
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import sft.stage
from deepseek_v2_modeling.checkpoints import tensor_files
from deepseek_v2_modeling.training import checkpoints as trainer_checkpoints
from recipes.cli import main as dsv2
from rl.trainer import PolicyTrainer
from sft.trainer import ChatTrainer

# Dropout-like noise (NEFTune) makes the weights depend on the state of the random numbers, too.
COMMON: dict[str, Any] = {"model": {"path": "base", "preset": "tiny"}, "seed": 3}
SFT: dict[str, Any] = {**COMMON, "stage": "sft", "format": {"too_long": "drop"}}
TRAINING = {"learning_rate": 1e-3, "save_total_limit": 2, "neftune_noise_alpha": 5.0}
RECIPES: dict[str, dict[str, Any]] = {
    # 4 epochs of a few steps; evaluates between epochs, after a checkpoint that its steps ask for
    "packed": {
        **SFT,
        "data": [{"path": "tiny:sft_train?n=40"}],
        "eval_data": [{"path": "tiny:sft_heldout?n=8"}],
        "training": {
            **TRAINING, "packing": True, "max_length": 128, "per_device_train_batch_size": 1, "num_train_epochs": 3,
            "save_steps": 3, "logging_steps": 2, "eval_strategy": "epoch",
        },
    },
    # 4 to 1, held-out loss by source, micro-batches, the best checkpoint at the end
    "mixed": {
        **SFT,
        "data": [{"path": "tiny:sft_train?n=24", "weight": 4}, {"path": "tiny:sft_train?seed=9&n=6", "weight": 1}],
        "eval_data": [{"path": "tiny:sft_heldout?n=6"}, {"path": "tiny:sft_heldout?seed=9&n=6"}],
        "early_stopping_patience": 3,
        "training": {
            **TRAINING, "max_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "max_steps": 12, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 2,
            "load_best_model_at_end": True,
        },
    },
    # all that a rollout keeps: experts, log-probabilities, pass rates, other prompts; two updates on each of 5 rollouts
    "rl": {
        **COMMON,
        "stage": "rl",
        "data": [{"path": "tiny:rl_reasoning?n=40"}],
        "rewards": [{"rule": "number"}, {"rule": "language"}],
        "routing_replay": "rollout",
        "dynamic_sampling": {"max_rounds": 2},
        "rollout_correction": {"mode": "token_truncate"},
        "curriculum": {"by": "pass_rate"},
        "training": {
            "learning_rate": 1e-3, "save_total_limit": 2, "per_device_train_batch_size": 8, "num_generations": 4,
            "gradient_accumulation_steps": 2, "num_iterations": 2, "max_completion_length": 12, "max_steps": 10,
            "save_steps": 3, "logging_steps": 1, "beta": 0.02,
        },
    },
}  # fmt: skip

TIMES = re.compile(r"_runtime$|_per_second$|^seconds/|^step_time$")
Patch = Callable[[], None]


def killed_at(
    owner: Any,
    name: str,
    call: int,
    after: bool = False,
    when: Callable[..., bool] | None = None,
    by: signal.Signals = signal.SIGKILL,
) -> Patch:
    """Sends a signal at the `call`-th call of a function, of those for which `when` holds."""

    def patch() -> None:
        function, calls = getattr(owner, name), [0]

        def deadly(*args: Any, **kwargs: Any) -> Any:
            counts = when is None or when(*args, **kwargs)
            calls[0] += counts
            if counts and calls[0] == call and not after:
                os.kill(os.getpid(), by)
            result = function(*args, **kwargs)
            if counts and calls[0] == call and after:
                os.kill(os.getpid(), by)
            return result

        setattr(owner, name, deadly)

    return patch


def _is_evaluation(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> bool:
    return "eval_loss" in logs


# name -> (recipe, what kills it, the exit code)
KILLED = -signal.SIGKILL
MOMENTS: dict[str, tuple[str, Patch, int]] = {
    "in a step": ("mixed", killed_at(ChatTrainer, "compute_loss", 11), KILLED),
    "in a save": ("packed", killed_at(ChatTrainer, "_save_rng_state", 2), KILLED),
    "before the old checkpoint goes": ("mixed", killed_at(trainer_checkpoints, "remove_old_checkpoints", 2), KILLED),
    "between epochs": ("packed", killed_at(ChatTrainer, "log", 2, after=True, when=_is_evaluation), KILLED),
    "in writing final": ("mixed", killed_at(tensor_files, "follow_umask", 1), KILLED),
    "in a rollout": ("rl", killed_at(PolicyTrainer, "_sample", 7), KILLED),
    "between two updates on a rollout": ("rl", killed_at(PolicyTrainer, "_compute_loss", 8), KILLED),
    "SIGTERM": ("mixed", killed_at(ChatTrainer, "training_step", 9, by=signal.SIGTERM), 130),
    "Ctrl-C": ("mixed", killed_at(ChatTrainer, "training_step", 14, by=signal.SIGINT), 130),
}


def start(folder: Path, name: str, run: str, patch: Patch | None = None) -> int:
    """The process id of a run of a recipe in `folder`/`run`; what it says goes to `run`.log."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        sft.stage.SAMPLE_TOKENS = 2
        if patch:
            patch()
        code = dsv2([RECIPES[name]["stage"], f"{name}.yaml", f"output_dir={run}"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """How a run ended: its exit code, or -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(run: Path) -> dict[str, Any]:
    """All that must be the same: the weights' bytes, metrics but for times, samples."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not TIMES.search(k)} for line in lines]
    weights = {path.name: path.read_bytes() for path in sorted((run / "final").glob("*.safetensors"))}
    assert weights and metrics
    return {"weights": weights, "metrics": metrics, "samples": (run / "samples.jsonl").read_text()}


def compare(unbroken: Path, broken: Path) -> None:
    one, other = result(unbroken), result(broken)
    for what in one:
        assert one[what] == other[what], f"{broken}: other {what} than {unbroken}"
    left = [path.name for path in broken.iterdir() if path.name.startswith(".")]
    assert not left, f"{broken}: {left} left over"


def finish(folder: Path, name: str, run: str) -> None:
    code = ended(start(folder, name, run))
    assert code == 0, f"{run} ended with {code}:\n{(folder / f'{run}.log').read_text()[-4000:]}"


def prepare(folder: Path, names: Sequence[str]) -> None:
    """Writes these recipes and runs each of them unbroken."""
    for name in names:
        recipe = RECIPES[name]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": name}))
        finish(folder, name, name)


def kill_at_moments(folder: Path) -> None:
    for number, (moment, (name, patch, wanted)) in enumerate(MOMENTS.items()):
        run = f"killed-{number}"
        code = ended(start(folder, name, run, patch))
        assert code == wanted, f"{moment}: ended with {code}"
        finish(folder, name, run)
        compare(folder / name, folder / run)
        print(f"{moment}: the same", flush=True)


def kill_at_random(folder: Path, names: Sequence[str], kills: int, seed: int) -> None:
    """Each run is killed up to four times, then left alone."""
    rng, done, number = random.Random(seed), 0, 0
    longest = {name: _seconds(folder, name) for name in names}
    while done < kills:
        name, run = rng.choice(names), f"random-{number}"
        number += 1
        for _ in range(4):
            pid, wait = start(folder, name, run), rng.uniform(0.1, 1.0) * longest[name]
            time.sleep(wait)
            if os.waitpid(pid, os.WNOHANG)[0]:
                break
            os.kill(pid, signal.SIGKILL)
            ended(pid)
            done += 1
            at = sorted(path.name for path in (folder / run).glob("checkpoint-*"))
            print(
                f"kill {done}: {run} ({name}) after {wait:.2f} s, with {', '.join(at) or 'no checkpoint'}", flush=True
            )
        finish(folder, name, run)
        compare(folder / name, folder / run)
        print(f"{run}: the same", flush=True)


def _seconds(folder: Path, name: str) -> float:
    began = time.monotonic()
    finish(folder, name, f"{name}-timed")
    compare(folder / name, folder / f"{name}-timed")
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=RECIPES, help="with --kills: runs of this recipe alone")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # what is imported is not looked through again by each Trainer
    names = [args.only] if args.only else list(RECIPES)
    prepare(folder, names)
    if args.kills:
        kill_at_random(folder, names, args.kills, args.seed)
    else:
        kill_at_moments(folder)


if __name__ == "__main__":
    main()
