"""Tokens per second of DPO: this project against TRL's DPOTrainer on transformers' own class and plain peft.

    python -m benchmarks.preferences [--prompt 200] [--answer 100] [--full] [--rounds 3]
                                                              about five minutes on 2 cores; results/preferences.json

The same weights, pairs and settings on both sides, each a process of its own, in turn. Answers of a pair have different
lengths (half to one and a half of --answer), prompts too. A step is timed from log to log, whole optimizer steps, and
the median of all but the first two counts: by the clock, and in CPU seconds, which a busy machine disturbs less. Tokens
are those of prompts and answers, no padding, as TRL counts them: a prompt counts twice, though here it is read once.
The reference is computed once on this side before the first step (its seconds count in `ratios_with_reference`: a pair
is used once in an epoch); TRL computes it with every batch, as it does unless told otherwise.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.common import MINI, write
from recipes.runs.preset_tokenizer import build_tokenizer

LORA = {"targets": ("attention", "experts"), "r": 16, "alpha": 32}
WORDS = (
    "river", "stone", "number", "what", "is", "seventeen", "plus", "apple", "green", "house", "tell", "me", "about",
    "how", "many", "small", "large", "water",
)  # fmt: skip
SIDES = ("stock", "ours")


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs whose texts have about --prompt and --answer tokens: a word is one, mostly."""
    rng = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(round(tokens * rng.uniform(0.5, 1.5))))

    def pair() -> dict[str, Any]:
        answers = {key: [{"role": "assistant", "content": text(args.answer)}] for key in ("chosen", "rejected")}
        return {"prompt": [{"role": "user", "content": text(args.prompt)}], **answers}

    return [pair() for _ in range(args.batch * args.steps)]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": args.batch, "max_steps": args.steps, "learning_rate": 1e-5, "beta": 0.1,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "max_length": 2048,
    }  # fmt: skip


class Clock(TrainerCallback):
    """Seconds, CPU seconds and tokens of each step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, float]] = []
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.marks.append((time.perf_counter(), time.process_time(), logs["num_tokens"]))
            self.losses.append(logs.get("task_loss", logs["loss"]))

    def tokens_per_second(self, cpu: bool) -> float:
        steps = zip(self.marks[1:], self.marks[2:], strict=False)
        return statistics.median((end[2] - start[2]) / (end[cpu] - start[cpu]) for start, end in steps)


def stock(args: argparse.Namespace, folder: Path, clock: Clock) -> float:
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoTokenizer
    from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM
    from trl import DPOConfig, DPOTrainer

    from deepseek_v2_modeling import lora_config

    model: Any = DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not args.full:
        torch.manual_seed(0)
        adapters: Any = lora_config(**LORA)
        model = get_peft_model(model, adapters)
    config = DPOConfig(str(folder / "run"), **settings(args), bf16=False, use_cpu=True, gradient_checkpointing=False)
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows(args)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[clock],
    )
    trainer.train()
    return 0.0


def ours(args: argparse.Namespace, folder: Path, clock: Clock) -> float:
    from transformers import AutoTokenizer

    from deepseek_v2_modeling import DeepseekV2ForCausalLM, apply_lora, lora_config
    from rl.config import RlRecipe
    from rl.preferences.stage import build_trainer

    model: Any = DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not args.full:
        torch.manual_seed(0)
        model = apply_lora(model, lora_config(**LORA))
    written: dict[str, Any] = {"stage": "rl", "method": "dpo", "model": {"path": "-"}, "data": [{"path": "-"}]}
    recipe = RlRecipe(**written, training=settings(args), output_dir=str(folder / "run"))
    began = time.process_time()
    trainer, _ = build_trainer(
        recipe,
        model=model.train(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        rows=rows(args),
        eval_rows=None,
        run_dir=folder / "run",
    )
    before = time.process_time() - began
    trainer.add_callback(clock)
    trainer.train()
    return before


def one_side(args: argparse.Namespace) -> None:
    """Print the figures of a side, as JSON."""
    clock = Clock()
    before = {"stock": stock, "ours": ours}[args.side](args, args.folder, clock)
    figures = {
        "tokens_per_second": clock.tokens_per_second(cpu=False),
        "tokens_per_cpu_second": clock.tokens_per_second(cpu=True),
        "losses": clock.losses,
        "reference_cpu_seconds": before,
        "step_cpu_seconds": (clock.marks[-1][1] - clock.marks[1][1]) / (len(clock.marks) - 2),
    }
    print(json.dumps(figures))


def make_model(folder: Path) -> None:
    """transformers' own class with seeded weights, and our tokenizer, whose template both sides read."""
    from transformers.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM

    from conversations.rendering.template import install_template

    tokenizer = build_tokenizer("v2-lite-mini")
    install_template(tokenizer)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    size = max(MINI["vocab_size"], len(tokenizer))
    shape = {**MINI, **ids, "vocab_size": size, "pad_token_id": tokenizer.pad_token_id, "aux_loss_alpha": 0.0}
    DeepseekV2ForCausalLM(DeepseekV2Config(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--answer", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="all weights instead of adapters")
    parser.add_argument("--name", default="preferences", help="name of the results file; - writes none")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return one_side(args)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for _ in range(args.rounds):
            for side in SIDES:
                command = [sys.executable, "-m", "benchmarks.preferences", *sys.argv[1:], "--side", side]
                done = subprocess.run([*command, "--folder", folder], capture_output=True, text=True, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(side, f"{found[side][-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    kinds = ("tokens_per_second", "tokens_per_cpu_second")
    rates = {kind: {side: statistics.median(one[kind] for one in found[side]) for side in SIDES} for kind in kinds}
    mine = found["ours"][0]
    share = mine["reference_cpu_seconds"] / (args.steps * mine["step_cpu_seconds"])
    ratios = {kind: rate["ours"] / rate["stock"] for kind, rate in rates.items()}
    figures = {
        "settings": {key: value for key, value in vars(args).items() if key not in ("side", "folder", "name")},
        **rates,
        "ratios": ratios,
        "ratios_with_reference": {kind: ratio / (1 + share) for kind, ratio in ratios.items()},
        "first_losses": {side: found[side][0]["losses"][:3] for side in SIDES},
        "rounds": found,
    }
    print(json.dumps({key: value for key, value in figures.items() if key != "rounds"}, indent=1))
    if args.name != "-":
        write(args.name, figures)


if __name__ == "__main__":
    main()
