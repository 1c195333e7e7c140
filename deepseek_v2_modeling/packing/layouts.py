"""Packed batches: which token belongs to which document, and attention within documents only.

A document starts where a position is not the previous one plus 1, or where cu_seq_lens says so. Attention runs on the
documents themselves, either batched in buckets of similar length or, for kernels that support variable lengths, as one
row with boundaries. Time and memory grow with the sum of the squared document lengths, and no T x T mask is built.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

BUCKET_FILL = 0.75  # the shortest document of a bucket, as a fraction of its longest


def find_documents(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    shape: tuple[int, int],
) -> torch.Tensor | None:
    """The document number of each token, [B, T] counted from 0 in each row; None if no row holds more than one.

    Padding alone does not start a document: the positions of a left-padded batch (1, 1, 0, 1, 2) are one document. In a
    row with several documents, padding is a document of its own, so that no other attends to it. Reading the positions
    makes the host wait for a GPU once per forward; compiled code cannot read them and always gets document numbers.
    """
    if cu_seq_lens is not None:
        starts = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.int64, device=cu_seq_lens.device)
        ids = starts.index_fill_(0, cu_seq_lens[:-1].long(), 1)[:-1].view(shape).cumsum(-1)
        return ids - ids[:, :1]
    if position_ids is None or position_ids.ndim != 2 or shape[1] == 1 or position_ids.shape[1] != shape[1]:
        return None
    if attention_mask is not None and attention_mask.ndim != 2:
        return None
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    edges = None
    if attention_mask is not None:
        real = attention_mask[:, -shape[1] :].bool()
        starts = starts & real[:, 1:] & real[:, :-1]
        edges = real[:, 1:] != real[:, :-1]
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    ids = (starts if edges is None else starts | edges).cumsum(-1)
    return F.pad(ids, (1, 0)).expand(shape)


def document_lengths(documents: torch.Tensor) -> torch.Tensor:
    """The number of tokens of each document in documents [B, T], in the order of the flat batch."""
    rows, length = documents.shape
    flat = documents + torch.arange(rows, device=documents.device).unsqueeze(1) * length
    return flat.reshape(-1).unique_consecutive(return_counts=True)[1]


@dataclass
class Bucket:
    """Documents of similar length, which one call of the kernel attends to.

    queries: token indices [documents, L]; shorter documents are padded with their last token, to which no real token
        attends (causality) and which `keep` drops.
    keep: the flat positions in [documents * L] of real tokens.
    keys, mask: for documents that continue others: token indices [documents, S] of those and of their own, and
        [1, 1, L, S], True where a query may attend. None where the queries are the keys.
    begin: the first token of documents that are equally long and follow one another; None if they are not.
    """

    queries: torch.Tensor
    keep: torch.Tensor
    keys: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    begin: int | None = None

    def to(self, device: Any) -> "Bucket":
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, **moved)

    def attend(self, kernel: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v of all tokens [B*T, H, d] -> [documents * L, H, d_v], padding dropped."""
        query = self._of_documents(q, self.queries, self.begin)
        key, value = (
            self._of_documents(t, self.queries, self.begin) if self.keys is None else self._of_documents(t, self.keys)
            for t in (k, v)
        )
        with_mask = {} if self.mask is None else {"attention_mask": self.mask, "continues": True}
        out = kernel(query, key, value, **with_mask)[0].flatten(0, 1)
        return out if self.begin is not None else out.index_select(0, self.keep)

    @staticmethod
    def _of_documents(x: torch.Tensor, index: torch.Tensor, begin: int | None = None) -> torch.Tensor:
        """x [B*T, H, d] -> [documents, H, L, d]; a view where the documents are all tokens from `begin` on."""
        found = x.index_select(0, index.reshape(-1)) if begin is None else x.narrow(0, begin, index.numel())
        return found.unflatten(0, index.shape).transpose(1, 2)


@dataclass
class PackedLayout:
    """The positions of documents in the flat batch of B*T tokens; inverse: [B*T] the position of each token in the
    concatenation of all buckets' outputs, None if that is their order."""

    buckets: list[Bucket]
    inverse: torch.Tensor | None

    def to(self, device: Any) -> "PackedLayout":
        """A copy on another device; accelerate's dispatch calls this for layers on other devices."""
        inverse = None if self.inverse is None else self.inverse.to(device)
        return PackedLayout([bucket.to(device) for bucket in self.buckets], inverse)

    def attend(
        self, kernel: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention within each document, and to those that it continues: query, key, value [B, H, T, d] ->
        [B, T, H, d_v].

        kernel: causal attention without a mask, [n, H, L, d] -> ([n, L, H, d_v], weights); where documents continue
            others, with an `attention_mask` and `continues=True` too.
        """
        batch, _, length, _ = query.shape
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # [B*T, H, d]
        outs = [bucket.attend(kernel, q, k, v) for bucket in self.buckets]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return (out if self.inverse is None else out.index_select(0, self.inverse)).unflatten(0, (batch, length))


def pack_layout(
    documents: torch.Tensor, prefixes: torch.Tensor | None = None, fill: float = BUCKET_FILL
) -> PackedLayout:
    """The layout of documents [B, T]. On a GPU the host waits for the lengths, once per forward.

    prefixes: [documents], in the order of the flat batch, the number of the earlier document that each continues, or
        -1; that one may continue another.
    fill: the shortest document of a bucket, as a fraction of its longest. With 1 a document is attended to in the same
        shape, and so with the same rounding, whatever other documents are in the batch.
    """
    counts = document_lengths(documents)
    lengths = counts.tolist()
    begins = (counts.cumsum(0) - counts).tolist()
    contexts = continued_tokens(begins, lengths, prefixes, counts.device)
    prefix_lengths = [0 if context is None else len(context) for context in contexts]
    order = sorted(range(len(lengths)), key=lambda i: (prefix_lengths[i], -lengths[i]))
    buckets = []
    while order:
        longest, shared = lengths[order[0]], prefix_lengths[order[0]]
        members = [i for i in order if lengths[i] >= fill * longest and prefix_lengths[i] == shared]
        taken = set(members)
        order = [i for i in order if i not in taken]
        column = partial(_column, members, counts.device)
        steps = torch.arange(longest, device=counts.device)
        queries = column(begins) + torch.minimum(steps, column(lengths) - 1)
        bucket = Bucket(queries, (steps < column(lengths)).reshape(-1).nonzero().squeeze(1))
        if shared:
            before = torch.stack([context for i in members if (context := contexts[i]) is not None])
            bucket.keys = torch.cat((before, queries), dim=1)
            seen = torch.ones(longest, shared + longest, dtype=torch.bool, device=counts.device)
            bucket.mask = seen.tril(shared)[None, None]
        first = begins[members[0]]
        if [begins[i] for i in members] == [first + n * longest for n in range(len(members))]:
            bucket.begin = first if lengths[members[-1]] == longest else None
        buckets.append(bucket)
    if is_in_order([bucket.begin for bucket in buckets]):
        return PackedLayout(buckets, None)
    kept = torch.cat([bucket.queries.reshape(-1)[bucket.keep] for bucket in buckets])
    inverse = torch.empty_like(kept)
    inverse[kept] = torch.arange(kept.shape[0], device=kept.device)
    return PackedLayout(buckets, inverse)


def is_in_order(begins: Sequence[int | None]) -> bool:
    """Whether buckets that begin at these tokens have all tokens in their order."""
    known = [begin for begin in begins if begin is not None]
    return len(known) == len(begins) and known == sorted(known)


def continued_tokens(
    begins: list[int], lengths: list[int], prefixes: torch.Tensor | None, device: torch.device
) -> list[torch.Tensor | None]:
    """The flat indices of all tokens that each document continues; None for one that continues none."""
    continued = [-1] * len(lengths) if prefixes is None else prefixes.tolist()
    whole: dict[int, torch.Tensor] = {}  # of the documents that others continue, their own tokens included
    contexts: list[torch.Tensor | None] = []
    needed = set(continued)
    for number, (begin, length, prefix) in enumerate(zip(begins, lengths, continued, strict=True)):
        context = whole[prefix] if prefix >= 0 else None
        contexts.append(context)
        if number in needed:
            own = torch.arange(begin, begin + length, device=device)
            whole[number] = own if context is None else torch.cat((context, own))
    return contexts


def _column(members: list[int], device: torch.device, values: list[int]) -> torch.Tensor:
    """[members, 1]: the members' values."""
    return torch.tensor([values[i] for i in members], device=device).unsqueeze(1)


@dataclass
class FlatLayout:
    """All documents as one row, for flash kernels: starts [documents + 1] int32, and the length of the longest.

    Needed because flash attention infers documents from positions only if the batch has one row.
    """

    starts: torch.Tensor
    longest: int

    def to(self, device: Any) -> "FlatLayout":
        return FlatLayout(self.starts.to(device), self.longest)

    def attend(
        self, kernel: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Like PackedLayout's; the kernel takes [1, H, B*T, d] and the boundaries."""
        batch, _, length, _ = query.shape
        row = (t.transpose(0, 1).flatten(1, 2).unsqueeze(0) for t in (query, key, value))
        limits = {f"cu_seq_lens_{side}": self.starts for side in "qk"}
        out = kernel(*row, **limits, max_length_q=self.longest, max_length_k=self.longest)[0]
        return out.squeeze(0).unflatten(0, (batch, length))


def flat_layout(documents: torch.Tensor) -> FlatLayout:
    """The layout of documents [B, T]. On a GPU the host waits for the longest length, once per forward."""
    lengths = document_lengths(documents)
    return FlatLayout(F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), int(lengths.max()))
