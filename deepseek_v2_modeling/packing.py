"""Packed batches: which tokens belong to which document, and attention that never looks across.

A document starts where a position does not follow on the one before (or where cu_seq_lens says). Attention
runs on the documents themselves, put side by side in buckets of like length: time and memory grow with the sum
of squares of the documents, and no T x T mask is built.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

BUCKET_FILL = 0.75  # a bucket takes documents down to this share of its longest one


def find_documents(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    shape: tuple[int, int],
) -> torch.Tensor | None:
    """Document of each token, [B, T] counted from 0 in each row; None when no row holds more than one.

    Padding starts no document, so that the positions of a left-padded batch (1, 1, 0, 1, 2) are one. On a GPU
    a batch with a padding mask is taken as not packed without looking, unless cu_seq_lens says otherwise: to
    look would make the host wait.
    """
    if cu_seq_lens is not None:
        starts = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.int64, device=cu_seq_lens.device)
        ids = starts.index_fill_(0, cu_seq_lens[:-1].long(), 1)[:-1].view(shape).cumsum(-1)
        return ids - ids[:, :1]
    if position_ids is None or position_ids.ndim != 2 or shape[1] == 1 or position_ids.shape[1] != shape[1]:
        return None
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.device.type != "cpu"):
        return None
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if attention_mask is not None:
        real = attention_mask[:, -shape[1] :].bool()
        starts = starts & real[:, 1:] & real[:, :-1]
    if starts.device.type == "cpu" and not bool(starts.any()):
        return None
    ids = torch.zeros(position_ids.shape, dtype=torch.int64, device=position_ids.device)
    ids[:, 1:] = starts.cumsum(-1)
    return ids.expand(shape)


@dataclass
class PackedLayout:
    """Where documents lie in the flat batch of B*T tokens.

    buckets: index tensors [documents, L] of tokens; shorter documents repeat their last token at the end,
        which no real token attends to (causality) and which `keep` leaves out.
    keep: for each bucket the flat positions in [documents * L] that are real.
    inverse: [B*T] position of each token in the concatenation of all kept outputs.
    """

    buckets: list[torch.Tensor]
    keep: list[torch.Tensor]
    inverse: torch.Tensor


def pack_layout(documents: torch.Tensor) -> PackedLayout:
    """The layout of documents [B, T]. Waits for the lengths when they are on a GPU: once a forward."""
    rows, length = documents.shape
    flat = (documents + torch.arange(rows, device=documents.device).unsqueeze(1) * length).reshape(-1)
    _, counts = flat.unique_consecutive(return_counts=True)
    lengths = counts.tolist()
    begins = (counts.cumsum(0) - counts).tolist()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    buckets: list[torch.Tensor] = []
    keep: list[torch.Tensor] = []
    while order:
        longest = lengths[order[0]]
        taken = [i for i in order if lengths[i] >= BUCKET_FILL * longest]
        order = order[len(taken) :]
        size = torch.tensor([lengths[i] for i in taken], device=flat.device).unsqueeze(1)
        begin = torch.tensor([begins[i] for i in taken], device=flat.device).unsqueeze(1)
        steps = torch.arange(longest, device=flat.device)
        buckets.append(begin + torch.minimum(steps, size - 1))
        keep.append((steps < size).reshape(-1).nonzero().squeeze(1))
    kept = torch.cat([b.reshape(-1)[k] for b, k in zip(buckets, keep, strict=True)])
    inverse = torch.empty_like(kept)
    inverse[kept] = torch.arange(kept.shape[0], device=kept.device)
    return PackedLayout(buckets, keep, inverse)


def attend_documents(
    layout: PackedLayout,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Causal attention inside each document. query, key, value [B, H, T, d] -> [B, T, H, d_v].

    attend: takes [n, H, L, d] and gives [n, L, H, d_v], causal, without a mask.
    """
    batch, _, length, _ = query.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # [B*T, H, d]
    outs = []
    for index, keep in zip(layout.buckets, layout.keep, strict=True):
        rows = index.reshape(-1)
        parts = (t.index_select(0, rows).unflatten(0, index.shape).transpose(1, 2) for t in (q, k, v))
        outs.append(attend(*parts).flatten(0, 1).index_select(0, keep))
    return torch.cat(outs).index_select(0, layout.inverse).unflatten(0, (batch, length))
