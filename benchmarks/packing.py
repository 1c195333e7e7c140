"""Useful tokens per second of LoRA tuning on conversations of mixed lengths: the gains of packing and of the model.

    python -m benchmarks.packing ROWS.jsonl [ROWS.jsonl ...]       about four minutes on 2 cores; results/packing.json

Three sides train on the same rows with the same weights, adapters, batch size and maximum length, each for --seconds:

    stock padded     transformers' class and plain peft in TRL's SFTTrainer, rows padded to the longest of their batch
    ours padded      this project's model and trainer, rows padded likewise
    ours packed      the same with packing: true (best fit); documents do not attend to one another

Padding is not counted. `--sides` accepts others: "stock packed" is TRL's packing on the stock class, whose attention
mask is quadratic in the packed length. The first losses of the padded sides must agree. The most that packing can gain
is 1 / (useful share of padded batches), which falls as batches grow; it is recorded for several batch sizes.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from transformers import PrinterCallback, TrainerCallback
from transformers.models.deepseek_v2 import DeepseekV2Config as StockConfig
from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM as StockModel
from trl import SFTConfig, SFTTrainer

from benchmarks.common import MINI, matrix_rate, write
from conversations import load_conversations
from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForCausalLM, apply_lora, lora_config
from deepseek_v2_modeling.presets import PRESETS
from deepseek_v2_modeling.training.mixin import RunLimits, training_arguments
from recipes.process_settings import keep_freed_memory
from recipes.runs.preset_tokenizer import build_tokenizer
from sft.data import encode_rows
from sft.trainer import ChatTrainer

SHAPES: dict[str, dict[str, Any]] = {
    "mini": MINI,
    "tiny": PRESETS["tiny"] | {"max_position_embeddings": 2048},
}
LORA = {"targets": ("attention", "experts"), "r": 16, "alpha": 32}
SIDES = ("stock padded", "ours padded", "ours packed")
WARM_UP = 1  # steps that are not measured


class Clock(TrainerCallback):
    """Stops training when its time is up; records (seconds, tokens so far, loss) of each step."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.steps: list[tuple[float, float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.steps.append((time.perf_counter(), logs["num_tokens"], logs["loss"]))
            enough = len(self.steps) > WARM_UP + 1
            control.should_training_stop = enough and self.steps[-1][0] - self.steps[WARM_UP - 1][0] > self.seconds

    def tokens_per_second(self) -> float:
        (began, before, _), (ended, after, _) = self.steps[WARM_UP - 1], self.steps[-1]
        return (after - before) / (ended - began)


def build(shape: str, dtype: str, weights: dict[str, torch.Tensor], ours: bool, token_ids: dict[str, int]) -> Any:
    """The model with these weights (created by the first call) and new float32 adapters, as peft creates them."""
    torch.manual_seed(0)
    settings = SHAPES[shape] | token_ids | ({"aux_loss_alpha": 0.0} if ours else {})  # stock has no balance loss
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**settings)) if ours else StockModel(StockConfig(**settings))
    model = model.to(getattr(torch, dtype))
    if not weights:
        weights |= {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    adapters: Any = lora_config(**LORA)
    return apply_lora(model, adapters) if ours else get_peft_model(model, adapters)


def train(side: str, model: Any, data: Dataset, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one side for --seconds."""
    ours, packing = side.startswith("ours"), side.endswith("packed")
    settings = {
        "per_device_train_batch_size": args.batch, "max_length": args.max_length, "packing": packing,
        "max_steps": 10_000, "learning_rate": 1e-4, "save_strategy": "no",
    }  # fmt: skip
    clock = Clock(args.seconds)
    with tempfile.TemporaryDirectory() as folder:
        common = training_arguments(settings, run_dir=Path(folder), seed=0, dtype=args.dtype, limits=RunLimits())
        config = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": not packing})
        fixed: dict[str, Any] = {"model": model, "args": config, "train_dataset": data, "processing_class": tokenizer}
        trainer: Any = ChatTrainer(**fixed, probes=[]) if ours else SFTTrainer(**fixed)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        fill = useful_share(trainer.get_train_dataloader())
        trainer.train()
    return {
        "useful_tokens_per_s": round(clock.tokens_per_second(), 1),
        "steps": len(clock.steps) - WARM_UP,
        "useful_share": round(fill, 3),
        "first_loss": round(clock.steps[0][2], 3),
    }


def useful_share(loader: Any) -> float:
    """The share of batch positions that are not padding."""
    real = places = 0
    for batch in loader:
        places += batch["input_ids"].numel()
        real += int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
    return real / places


def padded_share(lengths: Sequence[int], batch: int) -> float:
    """The useful share of padded batches of rows in random order."""
    order = random.Random(0).sample(lengths, len(lengths))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    return sum(order) / sum(max(rows) * len(rows) for rows in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="ROWS.jsonl")
    parser.add_argument("--shape", choices=list(SHAPES), default="mini")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default the one that multiplies faster")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), metavar="SIDE")
    parser.add_argument("--name", default="packing", help="name of the results file; - writes none")
    args = parser.parse_args()
    disable_progress_bars()
    faster = max(("float32", "bfloat16"), key=lambda name: matrix_rate(getattr(torch, name)))
    args.dtype = args.dtype or faster
    tokenizer = build_tokenizer("tiny" if args.shape == "tiny" else "v2-lite-mini")
    rows = [row for path in args.paths for row in load_conversations(path)]
    data, report, _ = encode_rows(
        rows, tokenizer, train_on="all_assistant", max_length=args.max_length, too_long="truncate"
    )
    token_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    weights: dict[str, torch.Tensor] = {}
    figures_of_sides: dict[str, dict[str, Any]] = {}
    for side in args.sides:
        if side.startswith("ours"):
            keep_freed_memory()  # as `dsv2` does
        model = build(args.shape, args.dtype, weights, side.startswith("ours"), token_ids)
        figures_of_sides[side] = train(side, model, data, tokenizer, args)
        print(side, figures_of_sides[side], flush=True)
    losses = [entry["first_loss"] for side, entry in figures_of_sides.items() if side.endswith("padded")]
    if losses and max(losses) - min(losses) > 0.02 * max(losses):
        raise SystemExit(f"the sides differ: first losses {losses}")
    rate = {side: entry["useful_tokens_per_s"] for side, entry in figures_of_sides.items()}
    pairs = {"packing alone": SIDES[2:0:-1], "model alone": SIDES[1::-1], "both": SIDES[2::-2]}
    ratios = {gain: round(rate[a] / rate[b], 2) for gain, (a, b) in pairs.items() if a in rate and b in rate}
    lengths = sorted(min(length, args.max_length) for length in report.lengths)
    figures = {
        "files": [Path(path).name for path in args.paths],
        "rows": len(lengths),
        "tokens_a_row": {"mean": round(sum(lengths) / len(lengths)), "longest": lengths[-1]},
        "truncated": report.truncated,
        "padded_useful_share_by_batch": {batch: round(padded_share(lengths, batch), 3) for batch in (4, 8, 16, 32, 64)},
        "shape": args.shape,
        "dtype": args.dtype,
        "batch": args.batch,
        "max_length": args.max_length,
        "lora": LORA,
        "sides": figures_of_sides,
        "ratios": ratios,
    }
    print(ratios)
    if args.name != "-":
        write(args.name, figures)


if __name__ == "__main__":
    main()
