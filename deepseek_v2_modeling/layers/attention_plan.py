"""Decides how a forward attends: the mask, the layout of packed documents, and whether W_UK and W_UV are absorbed."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from ..cache import LatentCache
from ..configuration import DeepseekV2Config
from ..errors import ModelError
from ..kernels.float32_products import rounds_apart
from ..packing.last_tokens import Places
from ..packing.layouts import BUCKET_FILL, FlatLayout, PackedLayout, flat_layout, pack_layout
from ..packing.read_layouts import ReadLayout, read_layout

FEW = 64  # new tokens on a cache of keys and values that are attended without a kernel, which writes out their scores
LONG = 1024  # tokens; padded rows of at least this length are attended one by one, without a mask


@dataclass(frozen=True)
class AttentionPlan:
    """The plan shared by all layers of a forward.

    mask: in the form that the attention implementation takes; if absorbed, [B, 1, T, S] with True where allowed.
    layout: packed documents to attend one by one; None if there are none, or if the mask separates them.
    absorb: whether these are few tokens on a cache, which our own code attends: over the latents themselves, or over
        the keys and values where the cache holds those.
    reads: for the last layer, where the few tokens whose hidden state is used attend; None if it computes all.
    """

    mask: Any
    layout: PackedLayout | FlatLayout | None = None
    absorb: bool = False
    reads: ReadLayout | None = None

    def to(self, device: Any) -> "AttentionPlan":
        """A copy on another device; accelerate's dispatch calls this for layers on other devices."""
        mask, layout = (part if part is None else part.to(device) for part in (self.mask, self.layout))
        return AttentionPlan(mask, layout, self.absorb, self.reads and self.reads.to(device))


def absorption_pays(config: DeepseekV2Config, queries: int) -> bool:
    """Whether `queries` new tokens cost fewer multiplications absorbed (2C + R per query-key pair) than expanded
    (N + R + V per pair plus C (N + V) per cached token). A cache of keys and values needs neither: they must be few."""
    if not config.uses_latents:
        return queries <= FEW
    sizes = config.attention_sizes
    narrow, latent = sizes.nope + sizes.value, sizes.cached[0]
    return queries * (2 * latent - narrow) < latent * narrow


def plan_attention(
    config: DeepseekV2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    documents: torch.Tensor | None,
    prefixes: torch.Tensor | None = None,
    read: Places | None = None,
) -> AttentionPlan:
    """The plan for inputs_embeds [B, T, D]. documents [B, T] numbers packed documents, which must not attend to one
    another but to what they continue: prefixes [documents] has the number of that earlier document, or -1. read: the
    only tokens whose last hidden state is used.

    Raises:
        ModelError: the attention implementation cannot continue documents.
    """
    plan = _plan_for_all(config, inputs_embeds, attention_mask, cache, documents, prefixes)
    begins = cache is None or (isinstance(cache, LatentCache) and cache.get_seq_length() == 0)
    if read is None or not begins:
        return plan
    rows, tokens = inputs_embeds.shape[:2]
    return replace(plan, reads=plan_reads(config, attention_mask, documents, prefixes, read, (rows, tokens)))


def _plan_for_all(
    config: DeepseekV2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    documents: torch.Tensor | None,
    prefixes: torch.Tensor | None,
) -> AttentionPlan:
    queries, past = inputs_embeds.shape[1], cache.get_seq_length() if cache is not None else 0
    if past and absorption_pays(config, queries):
        mask = decoding_mask(attention_mask, queries, past + queries, inputs_embeds.device)
        return AttentionPlan(mask, absorb=True)
    implementation = config._attn_implementation or "eager"
    if documents is not None and implementation.startswith("flash"):
        if prefixes is not None:
            raise ModelError(f"prefix_documents needs sdpa or eager attention, not {implementation}")
        return AttentionPlan(None, flat_layout(documents))
    if implementation == "sdpa" and not torch.compiler.is_compiling():  # compiled code cannot read lengths
        runs = documents if documents is not None else long_padded_rows(attention_mask, cache, queries)
        if runs is not None:
            fill = 1.0 if rounds_apart(inputs_embeds) else BUCKET_FILL
            return AttentionPlan(None, pack_layout(runs, prefixes if documents is not None else None, fill))
    return AttentionPlan(prefill_mask(config, inputs_embeds, attention_mask, cache, documents, prefixes))


def plan_reads(
    config: DeepseekV2Config,
    attention_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    prefixes: torch.Tensor | None,
    read: Places,
    shape: tuple[int, int],
) -> ReadLayout | None:
    """Where the tokens at `read` attend, with nothing in the cache. Attention is then over the latents, which are
    expanded for no token. None where attention of all tokens is cheaper, or where rows are padded and not packed."""
    if not config.uses_latents or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if documents is None:
        if shape[0] > 1 or (attention_mask is not None and not bool((attention_mask == 1).all())):
            return None
        documents = torch.zeros(shape, dtype=torch.int64, device=read[0].device)
    layout = read_layout(documents, prefixes, read)
    return layout if absorption_pays(config, layout.most) else None


def long_padded_rows(attention_mask: torch.Tensor | None, cache: Cache | None, queries: int) -> torch.Tensor | None:
    """Number the runs of padding and of real tokens in a batch [B, T] as documents, so that no T x T mask is needed.

    None for batches without padding, for short ones, for which a mask is cheaper, and if the attention mask or the
    cache needs an explicit mask.
    """
    if queries < LONG or attention_mask is None or attention_mask.ndim != 2:
        return None
    if cache is not None and cache.get_mask_sizes(queries, 0)[0] != queries:
        return None
    real = attention_mask.bool()
    if bool(real.all()):
        return None
    return F.pad((real[:, 1:] != real[:, :-1]).cumsum(-1), (1, 0))


def decoding_mask(attention_mask: torch.Tensor | None, queries: int, total: int, device: torch.device):
    """The mask for the last `queries` of `total` tokens: [B or 1, 1, T, S], True where allowed, or None for no mask.

    attention_mask: [B, S] with 1 on real tokens, or already 4-D (bool, or float to add to the scores).
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


def _same_document(
    documents: torch.Tensor, continues: torch.Tensor | None, batch: Any, head: Any, query: Any, key: Any
) -> Any:
    """continues: [documents, documents] bool, whether the first is the second or continues it."""
    if continues is None:
        return documents[batch, query] == documents[batch, key]
    return continues[documents[batch, query], documents[batch, key]]


def _lineage(prefixes: torch.Tensor) -> torch.Tensor:
    """prefixes [documents] -> [documents, documents] bool: whether the first is the second or continues it, directly
    or not."""
    continues = torch.eye(len(prefixes), dtype=torch.bool, device=prefixes.device)
    for number, prefix in enumerate(prefixes.tolist()):
        if prefix >= 0:
            continues[number] |= continues[prefix]
    return continues


def prefill_mask(
    config: DeepseekV2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    documents: torch.Tensor | None,
    prefixes: torch.Tensor | None = None,
) -> Any:
    """The mask in the form that the config's attention implementation takes; it separates documents [B, T].

    position_ids are not passed on: from them transformers would infer packed documents itself, with different results
    if there is a mask or a cache.
    """
    continues = None if documents is None or prefixes is None else _lineage(prefixes)
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        and_mask_function=None if documents is None else partial(_same_document, documents, continues),
    )
