"""Checks how time grows with size against an expected law: linear with an offset, or constant.

    python -m benchmarks.growth [--only WORD ...]        under 10 minutes on 2 cores; results/growth.json and a plot

Each entry of CURVES says what is measured at which sizes. The line is fitted by least squares on relative errors; the
deviation of the points shows whether the law holds. `--toy` runs the same code at toy sizes and writes nothing.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from benchmarks.common import MINI, RESULTS, seconds, write
from benchmarks.gpu.check import TOY, Bench, training_step
from benchmarks.loading import load
from conversations.run_files import METRICS
from deepseek_v2_modeling import LatentCache, apply_lora, lora_config
from deepseek_v2_modeling.training import quiet_libraries
from recipes.report.report import write_report
from recipes.runs.preset_tokenizer import build_tokenizer

SMALL: dict[str, Any] = MINI | {  # with V2-Lite's cache: 576 values a token and layer
    "num_hidden_layers": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_routed_experts": 32,
    "num_experts_per_tok": 4, "max_position_embeddings": 65536, "aux_loss_alpha": 0.0,
}  # fmt: skip
DOCUMENT = 512  # tokens per packed document
TOKENS = 2048  # per step when another size varies
ROWS = 8  # decoded together
Figures = dict[str, float]


def lora_step(bench: Bench, tokens: int = TOKENS, rank: int = 16, experts: int | None = None) -> Figures:
    """Seconds of a LoRA step (attention and experts, bf16, AdamW) on one row of packed documents."""
    changes = {} if experts is None else {"n_routed_experts": experts}
    adapters: Any = lora_config(targets=("attention", "experts"), r=rank, alpha=32)
    model = apply_lora(bench.model(torch.bfloat16, **changes), adapters).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    positions = torch.arange(tokens)[None] % DOCUMENT
    step = partial(training_step, model, optimizer, bench.ids(1, tokens), position_ids=positions)
    return {"seconds": seconds(step, repeats=3, warm_up=1)}


@torch.no_grad()
def decoding_step(bench: Bench, context: int) -> Figures:
    model = bench.model(torch.bfloat16).eval()
    cache = LatentCache(model.config)
    keep: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    model(bench.ids(1, context), logits_to_keep=1, **keep)
    cache.batch_repeat_interleave(ROWS)
    token = bench.ids(ROWS, 1)
    return {"seconds": seconds(lambda: model(token, **keep), repeats=15, warm_up=3)}


def checkpoint(bench: Bench, layers: int, folder: str) -> float:
    """Saves a model with its tokenizer to the folder; returns the size of its weights in MB."""
    tokenizer = build_tokenizer("v2-lite-mini")
    model = bench.model(torch.bfloat16, num_hidden_layers=layers, vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def loading(bench: Bench, layers: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        size = checkpoint(bench, layers, folder)
        runs = [load("ours", folder, "bfloat16") for _ in range(3)]
    best = sorted(runs, key=lambda run: run["seconds"])[1]
    return {"x": size, "seconds": best["seconds"], "memory_over_weights": best["peak_over_weights"]}


def first_token(bench: Bench, layers: int) -> Figures:
    """Seconds of a `dsv2 chat` that answers with one token, from start to exit."""
    command = [sys.executable, "-m", "recipes.cli", "chat", "", "--prompt", "Hello", "--max-new-tokens", "1"]
    with tempfile.TemporaryDirectory() as folder:
        size, command[4] = checkpoint(bench, layers, folder), folder
        run = partial(subprocess.run, command, check=True, capture_output=True)
        return {"x": size, "seconds": seconds(run, repeats=3, warm_up=1)}


def report(bench: Bench, lines: int) -> Figures:
    """Seconds to build the report page of a run with this many lines of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / METRICS).open("w", encoding="utf-8") as file:
            for step, (loss, norm) in enumerate(torch.rand(lines, 2).tolist()):
                file.write(json.dumps({"loss": loss, "grad_norm": norm, "learning_rate": 1e-4, "step": step}) + "\n")
        return {"seconds": seconds(lambda: write_report([Path(folder)]), repeats=2, warm_up=0)}


class Curve(NamedTuple):
    """unit: unit of the sizes. measure: (bench, size) -> figures, including `x` if that is not the size itself. flat:
    the expected law is constant time."""

    unit: str
    measure: Callable[[Bench, int], Figures]
    sizes: Sequence[int]
    toy: Sequence[int]
    flat: bool = False


CURVES = {
    "LoRA step over packed tokens": Curve(
        "tokens", lambda bench, n: lora_step(bench, tokens=n), (512, 2048, 8192, 32768), (64, 128)
    ),
    "LoRA step over experts, active work equal": Curve(
        "experts", lambda bench, n: lora_step(bench, experts=n), (8, 16, 32, 64, 128, 256), (4, 8), flat=True
    ),
    "LoRA step over rank": Curve("rank", lambda bench, n: lora_step(bench, rank=n), (8, 16, 32, 64, 128), (4, 8)),
    "decoding step over context": Curve("tokens of context", decoding_step, (256, 1024, 4096, 16384), (16, 32)),
    "loading over checkpoint": Curve("MB", loading, (2, 6, 12, 24, 48), (1, 2)),
    "dsv2 chat to the first token": Curve("MB", first_token, (2, 12, 24, 48), (1, 2)),
    "report over metric lines": Curve("lines", report, (1000, 10_000, 100_000, 1_000_000), (10, 100)),
}  # fmt: skip


def measured(curve: Curve, toy: bool) -> list[Figures]:
    points = []
    for size in curve.toy if toy else curve.sizes:
        gc.collect()
        points.append({"x": size} | curve.measure(Bench("cpu", TOY if toy else SMALL), size))
        print({key: round(value, 4) for key, value in points[-1].items()}, flush=True)
    return points


def fitted(points: Sequence[Figures], flat: bool) -> dict[str, float]:
    """The fitted line: offset in seconds and seconds per unit; off: the largest relative deviation of a point."""
    x, y = (numpy.array([point[key] for point in points]) for key in ("x", "seconds"))
    terms = numpy.stack([numpy.ones_like(y), numpy.zeros_like(y) if flat else x], axis=1)
    start, slope = numpy.linalg.lstsq(terms / y[:, None], numpy.ones_like(y), rcond=None)[0]
    return {"start": float(start), "each": float(slope), "off": float(abs(terms @ (start, slope) / y - 1).max())}


def rows_of_page(curves: dict[str, dict[str, Any]]) -> str:
    """A table for docs/speed.md."""
    lines = ["| | at | seconds | the line | points off it by |", "|---|---|---|---|---|"]
    for name, curve in curves.items():
        sizes, times = (
            ", ".join(f"{point[key]:{form}}" for point in curve["points"])
            for key, form in (("x", ",.0f"), ("seconds", ".3g"))
        )
        law, unit = curve["law"], CURVES[name].unit
        line = f"{law['start']:.2g} s" + ("" if CURVES[name].flat else f" + {law['each'] * 1e6:.3g} µs a unit")
        lines.append(f"| {name} | {sizes} {unit} | {times} | {line} | up to {100 * law['off']:.0f} % |")
    return "\n".join(lines)


def draw(curves: dict[str, dict[str, Any]], file: Path) -> None:
    """Plots points and line of each curve, one panel per curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, -(-len(curves) // 2), figsize=(15, 7), dpi=100, squeeze=False)
    for ax, (name, curve) in zip(axes.flat, curves.items(), strict=False):
        x = numpy.array([point["x"] for point in curve["points"]])
        smooth = numpy.geomspace(x.min(), x.max(), 50)
        ax.plot(x, [point["seconds"] for point in curve["points"]], "o", label="measured")
        ax.plot(smooth, curve["law"]["start"] + curve["law"]["each"] * smooth, label="fitted law")
        ax.set(title=name, xlabel=CURVES[name].unit, ylabel="seconds", xscale="log", yscale="log")
        ax.grid(True, which="both", alpha=0.3)
        ax.legend()
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="curves whose name has one of these")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    quiet_libraries()
    curves: dict[str, dict[str, Any]] = {}
    for name, curve in CURVES.items():
        if any(word in name for word in args.only):
            print(name)
            points = measured(curve, args.toy)
            curves[name] = {"points": points, "law": fitted(points, curve.flat)}
    print(rows_of_page(curves))
    if not args.toy and args.only == [""]:
        write("growth", {"shape": SMALL, "curves": curves})
        draw(curves, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
