"""Full fine-tuning versus LoRA on the demo's data: held-out exact match after the same number of tokens.

    python -m benchmarks.full_vs_lora          about twelve minutes on 2 cores; results/full_vs_lora.json

Adapters on random weights cannot learn what training all weights can: embeddings and head stay random. LoRA is for
models that have already learned something. Both therefore start from the same model, the demo's SFT stopped while the
loss is still falling, and continue for the same number of steps on the same rows, each at its own best learning rate.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import write
from recipes.cli import main as dsv2

RECIPES = Path(__file__).parent.parent / "recipes" / "tiny"
LORA = "lora={targets: [attention, experts, shared_experts, dense, router], r: 64, alpha: 128}"


def command(*words: str) -> None:
    print("dsv2", *words, flush=True)
    if dsv2(words):
        raise SystemExit(f"dsv2 {words[0]} failed")


def exact_match(folder: Path, name: str) -> float:
    out = folder / f"eval_{name}"
    command("eval", str(RECIPES / "eval.yaml"), f"model.path={folder / name}", f"output_dir={out}", f"tasks={_task()}")
    figures: dict[str, Any] = json.loads((out / "results.json").read_text())
    return figures["exact_match"]


def _task() -> str:
    return (
        '[{name: exact_match, metric: exact_match, rule: number, data: [{path: "tiny:test_problems"}], '
        "temperatures: [0], max_new_tokens: 24, batch_size: 250}]"
    )


def tokens(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["num_tokens"] for line in lines if "num_tokens" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/full_vs_lora"))
    parser.add_argument("--start-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--full-lr", type=float, default=1e-3)
    parser.add_argument("--lora-lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], help="the rates were chosen on seed 1")
    parser.add_argument("--name", default="full_vs_lora", help="name of the results file; - writes none")
    args = parser.parse_args()
    recipe, folder = str(RECIPES / "sft.yaml"), args.folder
    common = ("training.eval_strategy=no", "training.save_strategy=no", "training.logging_steps=20")
    start = ("training.lr_scheduler_type=constant_with_warmup", f"training.max_steps={args.start_steps}")
    command("sft", recipe, *common, *start, f"output_dir={folder / 'start'}")
    exact_matches: dict[str, dict[int, float]] = {"full": {}, "lora": {}}
    settings_of = {
        "full": (f"training.learning_rate={args.full_lr}",),
        "lora": (LORA, f"training.learning_rate={args.lora_lr}"),
    }
    for seed in args.seeds:
        on = (f"model.path={folder / 'start'}", f"training.max_steps={args.steps}", f"seed={seed}")
        for side, settings in settings_of.items():
            name = f"{side}_{seed}"
            command("sft", recipe, *common, *on, *settings, f"output_dir={folder / name}")
            exact_matches[side][seed] = exact_match(folder, name)
        assert tokens(folder / f"full_{seed}") == tokens(folder / f"lora_{seed}")
    means = {side: statistics.mean(by_seed.values()) for side, by_seed in exact_matches.items()}
    figures = {
        "exact_match": exact_matches,
        "start": exact_match(folder, "start"),
        "points_apart": round(100 * abs(means["full"] - means["lora"]), 1),
        "tokens": tokens(folder / f"full_{args.seeds[0]}"),
        "learning_rate": {"full": args.full_lr, "lora": args.lora_lr},
        "lora": LORA,
        "steps": {"start": args.start_steps, "each": args.steps},
    }
    print(figures)
    if args.name != "-":
        write(args.name, figures)


if __name__ == "__main__":
    main()
