"""Cache bytes per token: DeepSeek-V2's latent cache versus DeepSeek 67B's keys and values, from their configs.

The paper (section 3.2.2) stores six bits per value on average and reports 93.3 % less than DeepSeek 67B at 16 bits.

    python -m benchmarks.cache_bytes
"""

import torch

from deepseek_v2_modeling import DeepseekV2Config, LatentCache

DENSE = {"layers": 95, "kv_heads": 8, "head_dim": 128, "bytes": 2}  # DeepSeek 67B
TOKENS = 4096


def dense_bytes() -> int:
    """Keys and values of one token in all layers."""
    return DENSE["layers"] * DENSE["kv_heads"] * DENSE["head_dim"] * 2 * DENSE["bytes"]


def latent_bytes(quantization: str | None) -> float:
    """Measured on a filled cache of V2's shape, including scales and reserved space."""
    config = DeepseekV2Config(num_hidden_layers=60, kv_lora_rank=512, qk_rope_head_dim=64)
    cache = LatentCache(config, quantization=quantization)  # pyright: ignore[reportArgumentType]
    for layer in range(config.num_hidden_layers):
        latent = torch.randn(1, 1, TOKENS, config.kv_lora_rank, dtype=torch.bfloat16)
        rope_key = torch.randn(1, 1, TOKENS, config.qk_rope_head_dim, dtype=torch.bfloat16)
        cache.update(latent, rope_key, layer)
    return cache.nbytes / TOKENS


def main() -> None:
    dense = dense_bytes()
    print(f"DeepSeek 67B, 16 bits     {dense:>9,} bytes per token")
    for quantization in (None, "int8", "int6", "int4"):
        latent = latent_bytes(quantization)
        name = f"DeepSeek-V2, {quantization or '16 bits'}"
        print(f"{name:<25} {latent:>9,.0f} bytes per token   {1 - latent / dense:.1%} less")


if __name__ == "__main__":
    main()
