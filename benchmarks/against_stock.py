"""Compares a small V2-Lite with stock transformers and peft on this machine's CPU; writes the table of docs/speed.md.

    python -m benchmarks.against_stock [--rounds N]      about 40 minutes on 2 cores; results/against_stock.json

The results are written after each case; `--continue` measures only the cases that they lack.

Both sides have the same weights, adapters and tokens. Each run is a separate process, and the sides alternate, so that
a slowdown of the machine affects both. Losses, gradient norms and logits are compared; if they differ, the measurement
stops. `--only` and `--toy` (the same code at toy size) write nothing; `--table` rebuilds the table of the docs from the
stored results.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.common import MINI, RESULTS, conditions, matrix_rate, memory_gb, write
from benchmarks.gpu.check import (
    TOY,
    Bench,
    adapted,
    checkpoint,
    decode_seconds,
    new_cache,
    step_flops,
    training_step,
)

SIDES = ("ours", "stock")
SPEED = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
MARKS = ("<!-- made by benchmarks/against_stock.py -->\n", "<!-- end -->")
Figures = dict[str, float]


class Case(NamedTuple):
    dtype: str
    batch: int
    context: int
    trains: bool = False
    checkpointing: bool = False
    full: bool = False  # full fine-tuning instead of LoRA


CASES = {
    "LoRA step (attention and experts, r = 16), bf16, 4 x 512": Case("bfloat16", 4, 512, trains=True),
    "LoRA step, float32, 4 x 512": Case("float32", 4, 512, trains=True),
    "full fine-tuning step, float32, 4 x 512": Case("float32", 4, 512, trains=True, full=True),
    "LoRA step with checkpointing, bf16, 4 x 2,048": Case("bfloat16", 4, 2048, trains=True, checkpointing=True),
    "decoding, bf16, batch 8 at 2,048 tokens": Case("bfloat16", 8, 2048),
    "decoding, bf16, batch 1 at 8,192 tokens": Case("bfloat16", 1, 8192),
    "decoding, bf16, batch 1 at 128 tokens": Case("bfloat16", 1, 128),
}
# Maximum relative difference between what the two sides compute.
TOLERANCE = {"bfloat16": 0.03, "float32": 0.002}


def measure(case: Case, side: str, toy: bool) -> dict[str, Figures]:
    """Measures one side in this process: `speed` (for the table) and `computed` (what both sides must agree on)."""
    bench = Bench("cpu", TOY if toy else MINI | {"aux_loss_alpha": 0.0})  # stock has no balance loss
    if toy:
        case = case._replace(batch=2, context=16)
    model = bench.model(getattr(torch, case.dtype))
    if side == "stock":
        model = bench.twin(model)
    run = training if case.trains else decoding
    figures = run(bench, model, side, case, bench.ids(case.batch, case.context))
    figures["speed"]["peak_gb"] = memory_gb("VmHWM")
    return figures


def training(bench: Bench, model: Any, side: str, case: Case, ids: torch.Tensor) -> dict[str, Figures]:
    if case.full:
        model, trained = model.train(), dict(model.named_parameters())
    else:
        model, trained = adapted(model, side == "ours")
    if case.checkpointing:
        checkpoint(model)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    norm = torch.stack([p.grad.float().norm() for p in trained.values() if p.grad is not None]).norm()
    step = partial(training_step, model, torch.optim.AdamW(trained.values(), lr=1e-4), ids)
    seconds = bench.seconds(step, repeats=3, warm_up=1)
    flops = step_flops(model.config, ids.numel(), case.context, case.full)
    speed = {"tokens_per_s": ids.numel() / seconds, "mfu": flops / seconds / matrix_rate(getattr(torch, case.dtype))}
    return {"speed": speed, "computed": {"loss": loss.item(), "gradient_norm": norm.item()}}


@torch.no_grad()
def decoding(bench: Bench, model: Any, side: str, case: Case, ids: torch.Tensor) -> dict[str, Figures]:
    model = model.eval()
    prefill, step = decode_seconds(bench, model, side, ids)
    ids = ids[:, :256]
    keep: dict[str, Any] = {"past_key_values": new_cache(model, side), "use_cache": True, "logits_to_keep": 1}
    model(ids[:, :-1], **keep)
    logits = model(ids[:, -1:], **keep).logits.float()
    computed = {"logsumexp": logits.logsumexp(-1).mean().item(), "spread": logits.std().item()}
    return {"speed": {"tokens_per_s": case.batch / step, "prefill_s": prefill}, "computed": computed}


def run_apart(name: str, side: str, toy: bool) -> dict[str, Figures]:
    """`measure` in a separate process."""
    command = [sys.executable, "-m", "benchmarks.against_stock", "--only", name, "--side", side, *["--toy"] * toy]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    if process.returncode:
        sys.exit(f"{name}: {side} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def compare(name: str, ours: Figures, stock: Figures) -> None:
    for key, value in stock.items():
        if not abs(ours[key] - value) <= TOLERANCE[CASES[name].dtype] * abs(value):
            sys.exit(f"{name}: the sides differ: {key} is {ours[key]:.5g} in ours, {value:.5g} in stock")


def measure_case(name: str, rounds: int, toy: bool) -> dict[str, list[Figures]]:
    """Side -> the figures of each round."""
    runs: dict[str, list[Figures]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        figures = {side: run_apart(name, side, toy) for side in SIDES}
        compare(name, figures["ours"]["computed"], figures["stock"]["computed"])
        for side in SIDES:
            runs[side].append({key: float(f"{v:.4g}") for key, v in figures[side]["speed"].items()})
            print(f"{name}: {side}: {runs[side][-1]}", flush=True)
    return runs


def earlier_runs(path: Path) -> dict[str, Any]:
    """The cases of the results file, which must be of this machine and these versions."""
    results, now = json.loads(path.read_text()), conditions()
    for key in ("processor", "threads", "versions"):
        if results[key] != now[key]:
            sys.exit(f"{path}: {key} was {results[key]} and is {now[key]}: measure all cases, without --continue")
    return results["runs"]


def table(runs: dict[str, dict[str, list[Figures]]]) -> str:
    """Markdown: medians over the rounds, and the ratios of ours to stock."""
    lines = ["| | ours | stock | |", "|---|---|---|---|"]
    for name, sides in runs.items():
        ours, stock = ({key: median(run[key] for run in sides[side]) for key in sides[side][0]} for side in SIDES)
        cells = [speed_cell(side) for side in (ours, stock)]
        speed, memory = ours["tokens_per_s"] / stock["tokens_per_s"], ours["peak_gb"] / stock["peak_gb"]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {speed:.2g} x the speed, {memory:.2g} x the memory |")
        if "prefill_s" in ours:
            times = [f"{side['prefill_s']:.3g} s" for side in (ours, stock)]
            faster = stock["prefill_s"] / ours["prefill_s"]
            lines.append(f"| {name.replace('decoding', 'its prefill')} | {times[0]} | {times[1]} | {faster:.2g} x |")
    return "\n".join(lines) + "\n"


def page_text(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    machine = f"{results['processor']}, {results['threads']} threads"
    return f"{machine}; {versions}; {results['date']}:\n\n{table(results['runs'])}"


def speed_cell(figures: Figures) -> str:
    share = f", {figures['mfu']:.0%} of the matrix rate".replace("%", " %") if "mfu" in figures else ""
    speed = float(f"{figures['tokens_per_s']:.3g}")
    return f"{speed:,g} tokens/s{share}, {figures['peak_gb']:.2g} GB"


def put_into(page: Path, text: str) -> None:
    """Replaces the text between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        sys.exit(f"{page} has no lines {MARKS[0].strip()} and {MARKS[1]}")
    page.write_text(before + MARKS[0] + text + end + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side of a case (2)")
    parser.add_argument("--only", default="", metavar="WORD", help="the cases whose name has this")
    parser.add_argument("--continue", dest="resume", action="store_true", help="an interrupted measurement")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = [name for name in CASES if args.only in name]
    if args.side:
        print(json.dumps(measure(CASES[names[0]], args.side, args.toy)))
        return
    path = RESULTS / "against_stock.json"
    if not args.table:
        runs = earlier_runs(path) if args.resume else {}
        for name in (name for name in names if name not in runs):
            runs[name] = measure_case(name, args.rounds, args.toy)
            if not (args.toy or args.only):
                write(path.stem, {"shape": MINI, "runs": {name: runs[name] for name in CASES if name in runs}})
        if args.toy or args.only:
            print(table(runs))
            return
    results = json.loads(path.read_text())
    put_into(SPEED, page_text(results))
    print(table(results["runs"]))


if __name__ == "__main__":
    main()
