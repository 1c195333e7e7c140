"""Loading a hub-layout checkpoint: seconds and peak anonymous memory, ours and stock.

A thread samples the memory while `from_pretrained` runs; each run is a separate process, and the sides alternate.
Anonymous memory excludes mapped files, which the system can reclaim.

    python -m benchmarks.loading            creates a 2.4 GB bf16 checkpoint in a temporary directory
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from torch import nn

from benchmarks.common import peak_of_memory, write

SHAPE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 1408, "moe_intermediate_size": 512,
    "num_hidden_layers": 12, "num_attention_heads": 16, "q_lora_rank": None, "kv_lora_rank": 256,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy",
}  # fmt: skip
SIDES = ("stock", "ours")
DTYPES = ("bfloat16", "float32")


def model_class(side: str) -> Any:
    if side == "ours":
        from deepseek_v2_modeling import DeepseekV2ForCausalLM
    else:
        from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM
    return DeepseekV2ForCausalLM


def make(directory: str) -> None:
    """Writes a sharded checkpoint, as large ones are; its values do not matter."""
    cls = model_class("ours")
    with torch.device("meta"):
        model = cls(cls.config_class(**SHAPE))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.01)
    model.save_pretrained(directory, max_shard_size="700MB")


def load(side: str, directory: str, dtype: str) -> dict[str, float]:
    cls = model_class(side)
    with peak_of_memory() as peaks:
        start = time.perf_counter()
        model = cls.from_pretrained(directory, dtype=getattr(torch, dtype))
        seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    peak = peaks[0]
    return {"seconds": seconds, "weights_gb": weights, "peak_gb": peak, "peak_over_weights": peak / weights}


def best(runs: list[dict[str, float]]) -> dict[str, float]:
    """The fastest run, which other load on the machine affected least."""
    return {key: round(value, 3) for key, value in min(runs, key=lambda run: run["seconds"]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "DIRECTORY", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load(*args.one)))
        return
    runs: dict[str, list[dict[str, float]]] = {f"{side} {dtype}": [] for dtype in DTYPES for side in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        make(directory)
        for _ in range(args.rounds):
            for name, results in runs.items():
                side, dtype = name.split()
                command = [sys.executable, "-m", "benchmarks.loading", "--one", side, directory, dtype]
                process = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(process.stdout.splitlines()[-1]))
    figures = {name: best(results) for name, results in runs.items()}
    for name, figure in figures.items():
        print(f"{name:<15} {figure['seconds']:>6.2f} s   peak {figure['peak_over_weights']:.2f} x the weights")
    write("loading", {"files": "bfloat16", "loaded": figures})


if __name__ == "__main__":
    main()
