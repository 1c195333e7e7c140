"""Attention masks, and which tokens belong to which packed document."""

import torch


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


def document_ids(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Packed documents of each row, [B, T] counted from 0; None when nothing can be packed.

    A document starts where a position does not follow on the one before. A padding mask means that the row is
    no pack: the positions of a left-padded batch (1, 1, 0, 1, 2) restart without being documents.
    """
    if position_ids is None or attention_mask is not None or position_ids.ndim != 2:
        return None
    starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return starts.to(torch.int64).cumsum(-1)
