"""What a rollout costs: sampling a token, a decode step with adapters, and many answers of different lengths.

    python -m benchmarks.rollouts [--only sampling|steps|queue]     results/rollouts.json; about 3 minutes

All figures are CPU seconds of one thread.

- sampling: `choose_tokens` against torch.multinomial on the same softmax.
- steps: with adapters on attention and experts, the same merged into a copy, and the same weights without adapters; and
  the merged copy in bf16.
- queue: tokens a second with geometric lengths (mean 100, at most 512) and as many rows of cache on both sides: batch
  after batch, where finished rows leave the batch, against slots that are refilled.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.common import RESULTS, write
from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForCausalLM, LatentCache, apply_lora, lora_config
from deepseek_v2_modeling.adapters import merged_copy
from deepseek_v2_modeling.decode_steps import SlotDecoder, logits_of
from deepseek_v2_modeling.inference import choose_tokens, generate_answers
from recipes.process_settings import keep_freed_memory

SHAPE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": None,
    "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 16,
    "n_shared_experts": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "topk_method": "greedy",
    "routed_scaling_factor": 1.0, "max_position_embeddings": 16384, "pad_token_id": 0,
}  # fmt: skip
ROWS, CONTEXT = 32, 64
MEAN, CAP = 100, 512


def model_of(rank: int = 16) -> Any:
    """Random weights, float32, with adapters that do something."""
    torch.manual_seed(0)
    base = DeepseekV2ForCausalLM(DeepseekV2Config(**SHAPE)).eval()
    model = apply_lora(base, lora_config(("attention", "experts"), r=rank))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False).eval()


def alternating(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Least CPU milliseconds of each, taken in turn, so that other load falls on all alike."""
    best: dict[str, float] = dict.fromkeys(runs, float("inf"))
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_:
                best[name] = min(best[name], (time.process_time() - start) * 1000)
    return {name: round(value, 3) for name, value in best.items()}


def sampling() -> dict[str, Any]:
    found = {}
    for words in (SHAPE["vocab_size"], 102_400):
        logits = torch.randn(ROWS, words, generator=torch.Generator().manual_seed(0)) * 2
        runs = {
            "multinomial_ms": lambda logits=logits: torch.multinomial(logits.softmax(-1), 1),
            "ours_ms": lambda logits=logits: choose_tokens(logits, 1.0),
        }
        row = alternating(runs, 40)
        found[f"[{ROWS}, {words}]"] = {**row, "times": round(row["multinomial_ms"] / row["ours_ms"], 1)}
        print("sampling", words, found[f"[{ROWS}, {words}]"], flush=True)
    return found


@torch.no_grad()
def decoder_of(model: Any, rows: int) -> Callable[[], Any]:
    ids = torch.randint(2, SHAPE["vocab_size"], (rows, CONTEXT), generator=torch.Generator().manual_seed(0))
    cache = LatentCache(model.config)
    logits_of(model, ids, torch.ones_like(ids), torch.arange(CONTEXT).expand(rows, -1), cache)
    decoder = SlotDecoder(model, cache, rows, CONTEXT + CAP)
    decoder.fill(range(rows), cache, range(rows), [CONTEXT] * rows)
    return torch.no_grad()(lambda: decoder(ids[:, 0]))


def steps() -> dict[str, Any]:
    model = model_of()
    sides = {"adapters": model, "merged": merged_copy(model), "merged_bf16": merged_copy(model, torch.bfloat16)}
    with model.disable_adapter():
        sides["none"] = merged_copy(model)
    found: dict[str, Any] = {}
    for rows in (8, ROWS, 128):
        row = alternating({name: decoder_of(side, rows) for name, side in sides.items()}, 20)
        found[f"{rows} rows"] = {f"{name}_ms": value for name, value in row.items()} | {
            "adapters_over_none": round(row["adapters"] / row["none"], 2),
            "merged_over_none": round(row["merged"] / row["none"], 2),
            "bf16_over_float32": round(row["merged_bf16"] / row["merged"], 2),
        }
        print("step", rows, found[f"{rows} rows"], flush=True)
    return found


def queue(answers: int) -> dict[str, Any]:
    model = merged_copy(model_of())
    words = SHAPE["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, words, (answers, 16), generator=generator).tolist()
    ends = torch.randperm(words, generator=generator)[: words // MEAN].tolist()
    asked: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": ends, "max_new_tokens": CAP, "temperature": 1.0}

    def batches() -> list[list[int]]:
        found = []
        for start in range(0, answers, ROWS):
            some = range(start, min(start + ROWS, answers))
            found += generate_answers(model, prompts[some.start : some.stop], seeds=some, batch_size=ROWS, **asked)
        return found

    def refilled() -> list[list[int]]:
        return generate_answers(model, prompts, seeds=range(answers), batch_size=ROWS, **asked)

    found: dict[str, Any] = {"answers": answers, "rows": ROWS}
    for name, run in (("batch after batch", batches), ("slots refilled", refilled)):
        start = time.process_time()
        lengths = [len(answer) for answer in run()]
        seconds = time.process_time() - start
        found[name] = {"tokens": sum(lengths), "seconds": round(seconds, 2)}
        print("queue", name, found[name], flush=True)
    rates = [found[name]["tokens"] / found[name]["seconds"] for name in ("batch after batch", "slots refilled")]
    found["times"] = round(rates[1] / rates[0], 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["sampling", "steps", "queue"])
    parser.add_argument("--answers", type=int, default=256, help="of the queue")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as dsv2 does
    parts = {"sampling": sampling, "steps": steps, "queue": lambda: queue(args.answers)}
    figures = {name: part() for name, part in parts.items() if args.only in (None, name)}
    path = RESULTS / "rollouts.json"
    earlier = json.loads(path.read_text()) if path.is_file() and args.only else {}
    write("rollouts", {"shape": SHAPE, **{name: earlier[name] for name in parts if name in earlier}, **figures})


if __name__ == "__main__":
    main()
