"""How a forward attends: its mask, its packed documents, and whether W_UK and W_UV are absorbed."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .configuration import DeepseekV2Config
from .packing import FlatLayout, PackedLayout, flat_layout, pack_layout


@dataclass(frozen=True)
class AttentionPlan:
    """One for all layers of a forward.

    mask: what the attention implementation takes; absorbed, [B, 1, T, S] with True where allowed.
    layout: packed documents to attend one by one; None without, or where the mask keeps them apart.
    """

    mask: Any
    layout: PackedLayout | FlatLayout | None = None
    absorb: bool = False

    def to(self, device: Any) -> "AttentionPlan":
        """For layers on another device (accelerate's dispatch asks for it)."""
        mask, layout = (part if part is None else part.to(device) for part in (self.mask, self.layout))
        return AttentionPlan(mask, layout, self.absorb)


def absorption_pays(config: DeepseekV2Config, queries: int) -> bool:
    """Whether `queries` new tokens cost fewer products absorbed (2C + R a pair) than expanded (N + R + V a
    pair, and C (N + V) a cached token)."""
    narrow = config.qk_nope_head_dim + config.v_head_dim
    return queries * (2 * config.kv_lora_rank - narrow) < config.kv_lora_rank * narrow


def plan_attention(
    config: DeepseekV2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    documents: torch.Tensor | None,
) -> AttentionPlan:
    """The plan for inputs_embeds [B, T, D]; documents [B, T] are never to see one another."""
    queries, past = inputs_embeds.shape[1], cache.get_seq_length() if cache is not None else 0
    if past and absorption_pays(config, queries):
        mask = decoding_mask(attention_mask, queries, past + queries, inputs_embeds.device)
        return AttentionPlan(mask, absorb=True)
    implementation = config._attn_implementation or "eager"
    if documents is not None and implementation.startswith("flash"):
        return AttentionPlan(None, flat_layout(documents))
    if documents is not None and implementation == "sdpa" and not torch.compiler.is_compiling():
        return AttentionPlan(None, pack_layout(documents))  # compiled code cannot wait for the lengths
    return AttentionPlan(prefill_mask(config, inputs_embeds, attention_mask, cache, documents))


def decoding_mask(attention_mask: torch.Tensor | None, queries: int, total: int, device: torch.device):
    """Mask for `queries` new tokens at the end of `total`: [B or 1, 1, T, S], True where allowed, or None.

    attention_mask is [B, S] with 1 on real tokens, or already 4-D (bool, or float to be added).
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    causal = None
    if queries > 1:
        rows = torch.arange(total - queries, total, device=device)
        causal = (torch.arange(total, device=device) <= rows.unsqueeze(1))[None, None]
    if attention_mask is None:
        return causal
    allowed = attention_mask[:, None, None, :].bool()
    return allowed if causal is None else allowed & causal


def _same_document(documents: torch.Tensor, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return documents[batch, query] == documents[batch, key]


def prefill_mask(
    config: DeepseekV2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    documents: torch.Tensor | None,
) -> Any:
    """What the attention implementation of the config takes as a mask; documents [B, T] are kept apart.

    Positions are not handed on: stock takes them for packed documents on its own, with other results when a
    mask or a cache comes along.
    """
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        and_mask_function=None if documents is None else partial(_same_document, documents),
    )
