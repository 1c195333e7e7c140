"""Prefill and decoding by context length: this project versus stock transformers, same weights, one process.

    python -m benchmarks.generation            2 to 10 minutes on 2 cores; results/generation.json and two plots

A decoding step has to read the active weights and the cache once, so the achieved share of the machine's measured
memory bandwidth is reported.
"""

import argparse
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as StockConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM as StockModel

from benchmarks.common import MINI, memory_bandwidth, plot, seconds, write
from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForCausalLM, LatentCache

STEPS = 8


def models() -> dict[str, Any]:
    """Both classes in bf16 with the same weights."""
    torch.manual_seed(0)
    stock = StockModel(StockConfig(**MINI)).to(torch.bfloat16).eval()
    ours = DeepseekV2ForCausalLM(DeepseekV2Config(**MINI)).to(torch.bfloat16).eval()
    ours.load_state_dict(stock.state_dict())
    return {"stock": stock, "ours": ours}


@torch.no_grad()
def measure(model: Any, ours: bool, batch: int, context: int) -> tuple[float, float]:
    """(seconds of prefill, seconds of a decoding step)."""
    ids = torch.randint(1, MINI["vocab_size"], (batch, context))
    cache = LatentCache(model.config) if ours else DynamicCache(config=model.config)
    prefill = seconds(
        lambda: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1), repeats=1, warm_up=0
    )
    token = torch.randint(1, MINI["vocab_size"], (batch, 1))
    return prefill, seconds(lambda: model(input_ids=token, past_key_values=cache, use_cache=True), STEPS)


def bytes_of_a_step(model: Any, batch: int, context: int) -> int:
    """Bytes of active weights (with the most experts that batch x K can reach) and of the latent cache, in bf16."""
    config = model.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    all_experts = expert * config.n_routed_experts * moe_layers
    reached = min(1.0, batch * config.num_experts_per_tok / config.n_routed_experts)
    embeddings = config.vocab_size * config.hidden_size
    weights = sum(p.numel() for p in model.parameters()) - embeddings - all_experts * (1 - reached)
    cache = batch * context * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    return int(2 * (weights + cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    bandwidth, rows = memory_bandwidth(), []
    for name, model in models().items():
        for batch in args.batches:
            for context in args.contexts:
                prefill, step = measure(model, name == "ours", batch, context)
                share = bytes_of_a_step(model, batch, context) / step / bandwidth
                row = {"class": name, "batch": batch, "context": context, "prefill_s": round(prefill, 3)}
                rows.append({**row, "tokens_per_s": round(batch / step, 2), "bandwidth_share": round(share, 3)})
                print(rows[-1], flush=True)
    curves = {
        field: {
            f"{name}, batch {batch}": [
                (row["context"], row[field]) for row in rows if row["class"] == name and row["batch"] == batch
            ]
            for name in ("ours", "stock")
            for batch in args.batches
        }
        for field in ("tokens_per_s", "prefill_s")
    }
    write("generation", {"shape": MINI, "rows": rows})
    plot("generation", "Decoding, bf16", ("context (tokens)", "tokens per second"), curves["tokens_per_s"])
    plot("prefill", "Prefill, bf16", ("context (tokens)", "seconds"), curves["prefill_s"])


if __name__ == "__main__":
    main()
