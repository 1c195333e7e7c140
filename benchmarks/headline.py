"""Maximum tokens per second within a fixed cache budget: DeepSeek-V2's shape versus DeepSeek 67B's, both at 1/8 width.

    python -m benchmarks.headline              a few minutes on 2 cores; results/headline.json and a plot

The paper's headline: V2's maximum generation throughput is 5.76 times that of DeepSeek 67B. Here the dense model is the
stock Llama class (grouped-query attention), and V2 is this project's class with its latent cache, unquantised and with
six bits. Each uses its best batch size among those whose cache fits the budget.
"""

import argparse
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.common import plot, seconds, write
from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForCausalLM, LatentCache

# DeepSeek 67B: 95 layers, hidden 8192, 64 heads of 128 on 8 KV heads, feed-forward 22016.
DENSE = dict(
    vocab_size=8192, hidden_size=1024, intermediate_size=2752, num_hidden_layers=12, num_attention_heads=64,
    num_key_value_heads=8, head_dim=16,
)  # fmt: skip
# DeepSeek-V2: 60 layers, hidden 5120, 128 heads, 160 experts of width 1536 of which 6, 2 shared.
LATENT = dict(
    vocab_size=8192, hidden_size=640, intermediate_size=1536, moe_intermediate_size=192, num_hidden_layers=8,
    num_attention_heads=128, num_key_value_heads=128, q_lora_rank=192, kv_lora_rank=64, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6,
    first_k_dense_replace=1, topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0,
)  # fmt: skip
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def dense() -> tuple[Any, Any, int]:
    """(model, function that creates its cache, cache bytes per token)."""
    config = LlamaConfig(**DENSE, max_position_embeddings=16384)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    return model, lambda: DynamicCache(config=config), DENSE["num_hidden_layers"] * 8 * 16 * 2 * 2


def latent(quantization: Any) -> tuple[Any, Any, int]:
    """As `dense`."""
    config = DeepseekV2Config(**LATENT, max_position_embeddings=16384)
    model = DeepseekV2ForCausalLM(config).to(torch.bfloat16).eval()
    probe = LatentCache(config, quantization)
    for layer in range(config.num_hidden_layers):
        probe.update(torch.zeros(1, 1, 4096, 64).bfloat16(), torch.zeros(1, 1, 4096, 8).bfloat16(), layer)
    return model, lambda: LatentCache(config, quantization), probe.nbytes // 4096


@torch.no_grad()
def tokens_per_second(model: Any, make_cache: Any, batch: int, context: int) -> float:
    """Decoding speed at this context length. The prompt is processed once and its cache repeated for the batch."""
    cache = make_cache()
    model(input_ids=torch.randint(1, 8192, (1, context)), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    token = torch.randint(1, 8192, (batch, 1))
    return batch / seconds(lambda: model(input_ids=token, past_key_values=cache, use_cache=True), 4, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-mb", type=float, default=64.0)
    parser.add_argument("--context", type=int, default=2048)
    args = parser.parse_args()
    torch.manual_seed(0)
    sides = {
        "dense GQA (67B's shape)": dense(),
        "V2's shape, bf16 cache": latent(None),
        "V2's shape, int6": latent("int6"),
    }
    curves: dict[str, list[tuple[float, float]]] = {}
    best: dict[str, dict[str, float]] = {}
    for name, (model, make_cache, width) in sides.items():
        most = int(args.budget_mb * 1e6 // (width * args.context))
        sizes = sorted({*(b for b in BATCHES if b <= most), most})
        curves[name] = [(batch, tokens_per_second(model, make_cache, batch, args.context)) for batch in sizes if batch]
        batch, rate = max(curves[name], key=lambda point: point[1])
        best[name] = {
            "bytes_a_token": width,
            "largest_batch": most,
            "best_batch": batch,
            "tokens_per_s": round(rate, 1),
        }
        print(name, best[name], flush=True)
    rates = [entry["tokens_per_s"] for entry in best.values()]
    figures = {
        "budget_mb": args.budget_mb,
        "context": args.context,
        "best": best,
        "ratio": round(max(rates[1:]) / rates[0], 2),
    }
    print(f"ratio: {figures['ratio']} (the paper: 5.76)")
    write("headline", figures)
    title = f"{args.budget_mb:.0f} MB of cache, {args.context:,} tokens of context"
    plot("headline", title, ("batch", "tokens per second"), curves)


if __name__ == "__main__":
    main()
