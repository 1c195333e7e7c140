"""Scoring with reward models (v2-lite-mini): versus stock transformers at its best batch size, and 4 heads versus 1.

python -m benchmarks.scoring [--rows 500]       results/scoring.json; about 20 minutes on 2 cores, 3 with --rows 32

Stock and ours run in turn, and the least of several rounds counts. With OMP_NUM_THREADS=1 times are those of the CPU,
so that other processes on the machine hardly matter.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.models.deepseek_v2 import DeepseekV2ForSequenceClassification as Stock

from benchmarks.common import conditions, write
from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForSequenceClassification
from deepseek_v2_modeling.inference import pad_batch, score_heads, unpad_batch
from deepseek_v2_modeling.presets import PRESETS
from recipes.process_settings import keep_freed_memory
from reward.trainers import bootstrap_weights, pairwise_loss

TOKENS, PROMPT, GROUP = 512, 384, 8
STOCK_BATCHES = (4, 8, 16)
STOCK_EXPERTS = ("grouped_mm", "eager")  # transformers' experts implementations
PAIRS = 4  # per training step
ROUNDS = 3


def model_of(heads: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = DeepseekV2Config(**{**PRESETS["v2-lite-mini"], "num_labels": heads, "pad_token_id": 0})
    return DeepseekV2ForSequenceClassification(config).to(dtype).eval()


def rows_of(count: int, prompt: int) -> list[list[int]]:
    """Conversations of TOKENS tokens; each group of GROUP begins with the same `prompt` tokens."""
    vocabulary = PRESETS["v2-lite-mini"]["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, vocabulary, (-(-count // GROUP), prompt), generator=generator).tolist()
    answers = torch.randint(2, vocabulary, (count, TOKENS - prompt), generator=generator).tolist()
    return [prompts[row // GROUP] + answer for row, answer in enumerate(answers)]


@torch.no_grad()
def stock_scores(model: Any, rows: list[list[int]], batch: int) -> list[float]:
    scores: list[float] = []
    for start in range(0, len(rows), batch):
        ids, mask = pad_batch(rows[start : start + batch], 0, left=False)
        scores += model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].tolist()
    return scores


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = run()
    return clock() - start, result


def in_turn(sides: Sequence[Callable[[], Any]]) -> list[tuple[float, Any]]:
    """The fastest of ROUNDS calls of each side, called in turn: the first may have to compile oneDNN kernels."""
    rounds = [[timed(side) for side in sides] for _ in range(ROUNDS)]
    return [min(of_side, key=lambda timing: timing[0]) for of_side in zip(*rounds, strict=True)]


def best_of_stock(stock: Any, rows: list[list[int]]) -> tuple[str, int]:
    """Stock's fastest experts implementation and batch size; each is called once before it is timed."""
    tried: dict[tuple[str, int], float] = {}
    for way in STOCK_EXPERTS:
        stock.set_experts_implementation(way)
        for batch in STOCK_BATCHES:
            stock_scores(stock, rows[:batch], batch)
            tried[way, batch] = timed(partial(stock_scores, stock, rows, batch))[0]
    return min(tried, key=lambda setting: tried[setting])


def against_stock(dtype: torch.dtype, count: int, folder: str) -> dict[str, Any]:
    model = model_of(1, dtype)
    model.save_pretrained(folder)
    stock: Any = Stock.from_pretrained(folder, dtype=dtype).eval()
    way, best = best_of_stock(stock, rows_of(max(STOCK_BATCHES), 0))
    stock.set_experts_implementation(way)
    figures: dict[str, Any] = {}
    for name, prompt in (("different", 0), (f"groups of {GROUP} with a prompt of {PROMPT}", PROMPT)):
        rows = rows_of(count, prompt)
        sides = partial(stock_scores, stock, rows, best), partial(score_heads, model, rows, pad_token_id=0)
        (stock_seconds, expected), (ours, scores) = in_turn(sides)
        worst = max(abs(a - b[0]) for a, b in zip(expected, scores, strict=True))
        figures[name] = {
            "stock_seconds": round(stock_seconds, 2),
            "stock_batch": best,
            "stock_experts": way,
            "seconds": round(ours, 2),
            "times": round(stock_seconds / ours, 2),
            "tokens_per_s": round(len(rows) * TOKENS / ours),
            "largest_difference": worst,
        }
        print(dtype, name, figures[name], flush=True)
    return figures


def step_of(model: Any, rows: list[list[int]], heads: int) -> Callable[[], None]:
    """A training step on packed pairs: forward, loss, backward, AdamW."""
    model.train()
    model.config.aux_loss_alpha = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids, mask = pad_batch(rows[: 2 * PAIRS], 0, left=False)
    weights = torch.tensor([bootstrap_weights(row, heads, 0) for row in rows[:PAIRS]], dtype=torch.float)

    def step() -> None:
        scores = model(**unpad_batch(ids, mask), use_cache=False).logits
        pairwise_loss(scores, torch.zeros(PAIRS), weights, 0.01).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def heads_cost(rounds: int) -> dict[str, float]:
    """Ratio of the seconds with 4 heads to those with 1: the minimum of several alternating rounds."""
    rows = rows_of(2 * PAIRS, 0)
    models = {heads: model_of(heads, torch.float32) for heads in (1, 4)}
    scoring = {heads: lambda model=model: score_heads(model, rows, pad_token_id=0) for heads, model in models.items()}
    steps = {heads: step_of(model_of(heads, torch.float32), rows, heads) for heads in (1, 4)}
    ratios = {}
    for name, runs in (("scoring", scoring), ("training step", steps)):
        times: dict[int, list[float]] = {1: [], 4: []}
        for _ in range(rounds + 1):
            for heads, run in runs.items():
                times[heads].append(timed(run)[0])
        least = {heads: min(values[1:]) for heads, values in times.items()}
        ratios[name] = round(least[4] / least[1], 3)
        print(name, least, ratios[name], flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--only", choices=["heads", "stock"])
    args = parser.parse_args()
    keep_freed_memory()  # as in `dsv2`; for stock too
    results: dict[str, Any] = {"rows": args.rows, "tokens": TOKENS, **conditions()}
    if args.only != "stock":
        results["4 heads over 1"] = heads_cost(5)
    if args.only != "heads":
        for dtype in (torch.float32, torch.bfloat16):
            with tempfile.TemporaryDirectory() as folder:
                results[str(dtype).removeprefix("torch.")] = against_stock(dtype, args.rows, folder)
    if args.only is None:
        write("scoring", results)


if __name__ == "__main__":
    main()
