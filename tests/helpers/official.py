"""A slow transcription of DeepSeek's own modeling code, token by token, for settings that `reference/` does not show.

It takes a model's weights and its config as a plain dict with the official names, and shares no code with ours.
"""

import math
from typing import Any

import torch

Weights = dict[str, torch.Tensor]


def mscale(scale: float, factor: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * factor * math.log(scale) + 1.0


def frequencies(c: dict[str, Any]) -> tuple[torch.Tensor, float, float]:
    """(inverse frequencies, factor on cos and sin, factor on q.k)"""
    dim, base, rope = c["qk_rope_head_dim"], c.get("rope_theta", 10000.0), c.get("rope_scaling")
    plain = torch.tensor([1.0 / base ** (i / dim) for i in range(0, dim, 2)])
    scale = (c["qk_nope_head_dim"] + dim) ** -0.5
    if rope is None:
        return plain, 1.0, scale
    factor = rope["factor"]
    if all_dim := rope.get("mscale_all_dim", 0):
        scale *= mscale(factor, all_dim) ** 2
    if rope["type"] == "linear":
        return plain / factor, 1.0, scale

    def correction(rotations: float) -> float:
        length = rope.get("original_max_position_embeddings", 4096)
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction(rope.get("beta_fast", 32))), 0)
    high = min(math.ceil(correction(rope.get("beta_slow", 1))), dim - 1)
    ramp = [min(max((i - low) / ((high - low) or 0.001), 0), 1) for i in range(dim // 2)]
    mixed = [f / factor * r + f * (1 - r) for f, r in zip(plain.tolist(), ramp, strict=True)]
    magnitude = mscale(factor, rope.get("mscale", 1)) / mscale(factor, rope.get("mscale_all_dim", 0))
    return torch.tensor(mixed), magnitude, scale


def turn(x: torch.Tensor, position: int, inverse: torch.Tensor, magnitude: float) -> torch.Tensor:
    """x [..., R], pairs (0, 1), (2, 3), ... as complex numbers."""
    angle = position * inverse
    pairs = torch.complex(x[..., 0::2], x[..., 1::2])
    return torch.view_as_real(pairs * torch.polar(torch.full_like(angle, magnitude), angle)).flatten(-2)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attention(x: torch.Tensor, w: Weights, p: str, c: dict[str, Any]) -> torch.Tensor:
    """x [T, D]"""

    def project(name: str, v: torch.Tensor) -> torch.Tensor:
        return v @ w[f"{p}{name}.weight"].T + w.get(f"{p}{name}.bias", 0)

    heads, nope, rotary, width = (
        c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    inverse, magnitude, scale = frequencies(c)
    if c.get("q_lora_rank") is None:
        q = project("q_proj", x)
    else:
        q = project("q_b_proj", norm(project("q_a_proj", x), w[f"{p}q_a_layernorm.weight"]))
    q = q.unflatten(-1, (heads, nope + rotary))
    latent, k_rope = project("kv_a_proj_with_mqa", x).split([c["kv_lora_rank"], rotary], dim=-1)
    kv = project("kv_b_proj", norm(latent, w[f"{p}kv_a_layernorm.weight"])).unflatten(-1, (heads, nope + width))
    rows = []
    for t in range(len(x)):
        q_rope = turn(q[t, :, nope:], t, inverse, magnitude)
        scores = torch.stack(
            [
                (q[t, :, :nope] * kv[s, :, :nope]).sum(-1) + q_rope @ turn(k_rope[s], s, inverse, magnitude)
                for s in range(t + 1)
            ]
        )  # [S, H]
        rows.append(((scores * scale).softmax(0).unsqueeze(-1) * kv[: t + 1, :, nope:]).sum(0).flatten())
    return project("o_proj", torch.stack(rows))


def turn_halves(x: torch.Tensor, position: int, c: dict[str, Any]) -> torch.Tensor:
    """x [..., W], pairs (0, W/2), (1, W/2 + 1), ..., as in Llama and DeepSeekMoE."""
    half = x.shape[-1] // 2
    turned = torch.empty_like(x)
    for i in range(half):
        angle = position * c.get("rope_theta", 10000.0) ** (-2 * i / (2 * half))
        a, b = x[..., i], x[..., i + half]
        turned[..., i] = a * math.cos(angle) - b * math.sin(angle)
        turned[..., i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def plain_attention(x: torch.Tensor, w: Weights, p: str, c: dict[str, Any]) -> torch.Tensor:
    """DeepSeekMoE's attention, which is DeepSeek-V2's with `use_mla: false` too; x [T, D]."""
    heads, key_heads = c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"]
    width = x.shape[-1] // heads
    q, k, v = (
        (x @ w[f"{p}{name}_proj.weight"].T + w.get(f"{p}{name}_proj.bias", 0)).unflatten(-1, (count, width))
        for name, count in (("q", heads), ("k", key_heads), ("v", key_heads))
    )
    rows = []
    for t in range(len(x)):
        outs = []
        for h in range(heads):
            g = h // (heads // key_heads)
            query = turn_halves(q[t, h], t, c)
            scores = torch.stack([query @ turn_halves(k[s, g], s, c) for s in range(t + 1)]) / math.sqrt(width)
            outs.append(scores.softmax(0) @ v[: t + 1, g])
        rows.append(torch.cat(outs))
    return torch.stack(rows) @ w[f"{p}o_proj.weight"].T + w.get(f"{p}o_proj.bias", 0)


def feed_forward(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def kept_groups(scores: torch.Tensor, c: dict[str, Any]) -> list[int]:
    """V3's: those with the largest sums of their two best scores."""
    size = len(scores) // c["n_group"]
    parts = [sorted(scores[g * size : (g + 1) * size].tolist()) for g in range(c["n_group"])]
    return sorted(range(c["n_group"]), key=lambda g: -(parts[g][-1] + parts[g][-2]))[: c["topk_group"]]


def choose(scores: torch.Tensor, c: dict[str, Any]) -> list[int]:
    """The experts of one token; scores [E], with the bias of V3's gate. V3's masks the other groups with 0, below which
    scores with a bias can be."""
    allowed = list(range(len(scores)))
    if c["topk_method"] == "noaux_tc":
        size, kept = len(scores) // c["n_group"], kept_groups(scores, c)
        masked = [scores[e].item() if e // size in kept else 0.0 for e in allowed]
        return sorted(allowed, key=lambda e: -masked[e])[: c["num_experts_per_tok"]]
    if c["topk_method"] == "group_limited_greedy":
        size = len(scores) // c["n_group"]
        best = [scores[g * size : (g + 1) * size].max().item() for g in range(c["n_group"])]
        kept = sorted(range(c["n_group"]), key=lambda g: -best[g])[: c["topk_group"]]
        allowed = [e for e in allowed if e // size in kept]
    return sorted(allowed, key=lambda e: -scores[e].item())[: c["num_experts_per_tok"]]


def mixture(x: torch.Tensor, w: Weights, p: str, c: dict[str, Any]) -> torch.Tensor:
    """x [T, D]"""
    out = []
    for token in x:
        logits = w[f"{p}gate.weight"] @ token
        v3 = c["topk_method"] == "noaux_tc"
        scores = logits.sigmoid() if v3 else logits.softmax(-1)
        chosen = choose(scores + w[f"{p}gate.e_score_correction_bias"] if v3 else scores, c)
        weights = scores[chosen]
        normalised = c["norm_topk_prob"] and len(chosen) > 1
        if normalised:
            weights = weights / (weights.sum() + 1e-20)
        if v3 or not normalised:
            weights = weights * c["routed_scaling_factor"]
        y = torch.zeros_like(token)
        for weight, e in zip(weights, chosen, strict=True):
            gate, up = w[f"{p}experts.gate_up_proj"][e].chunk(2)
            y = y + weight * feed_forward(token, gate, up, w[f"{p}experts.down_proj"][e])
        if c["n_shared_experts"]:
            y = y + feed_forward(token, *(w[f"{p}shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down")))
        out.append(y)
    return torch.stack(out)


def logits(w: Weights, c: dict[str, Any], ids: list[int]) -> torch.Tensor:
    """[T, vocabulary] of one sequence."""
    x = w["model.embed_tokens.weight"][ids]
    attend = attention if c.get("use_mla", True) else plain_attention
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        x = x + attend(norm(x, w[f"{p}input_layernorm.weight"], c["rms_norm_eps"]), w, f"{p}self_attn.", c)
        y = norm(x, w[f"{p}post_attention_layernorm.weight"], c["rms_norm_eps"])
        if c["n_routed_experts"] and i >= c["first_k_dense_replace"] and i % c["moe_layer_freq"] == 0:
            x = x + mixture(y, w, f"{p}mlp.", c)
        else:
            x = x + feed_forward(y, *(w[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")))
    return norm(x, w["model.norm.weight"], c["rms_norm_eps"]) @ w["lm_head.weight"].T
