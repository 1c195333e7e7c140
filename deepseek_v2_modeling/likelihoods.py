"""Log-probabilities of continuations: packed without padding, each shared prefix read once (prefix_trees.py).

P places in the row whose next token is scored, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .batching import evaluation_mode, finite
from .kernels.row_blocks import row_blocks
from .prefix_trees import PackedTree, pack_tree, tree_batches

ROW_TOKENS = 2**12  # per forward
BLOCK_LOGITS = 2**24  # at a time: 64 MiB in float32


class Continuation(NamedTuple):
    """Token ids of a context, which is not empty, and of a continuation, which is not either."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """The continuation's log-probability in nats, given the context, and whether each of its tokens is the most likely
    one."""

    logp: float
    is_greedy: bool


@torch.no_grad()
def continuation_likelihoods(
    model: nn.Module, asked: Sequence[Continuation], row_tokens: int = ROW_TOKENS
) -> Iterator[tuple[list[int], list[Likelihood]]]:
    """Yield (indices into `asked`, their likelihoods), a forward at a time.

    Raises:
        ModelError: the logits are NaN or infinite.
    """
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore[reportCallIssue]
    shares = not (base.config._attn_implementation or "eager").startswith("flash")
    read = [(*context, *continuation[:-1]) for context, continuation in asked]  # nothing follows the last token
    batches = tree_batches(read, row_tokens)
    for batch in batches:
        with evaluation_mode(model):
            yield batch, _likelihoods(base, [read[i] for i in batch], [asked[i].continuation for i in batch], shares)


def _likelihoods(
    base: Any, read: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], shares: bool
) -> list[Likelihood]:
    tree = pack_tree(read) if shares else _side_by_side(read)
    places = [
        place
        for i, (ids, continuation) in enumerate(zip(read, continuations, strict=True))
        for place in tree.places(i, range(len(ids) - len(continuation), len(ids)))
    ]
    distinct, number = torch.tensor(places, device=base.device).unique(return_inverse=True)
    hidden = base.model(
        **_inputs(tree, base.device), use_cache=False, read=(torch.zeros_like(distinct), distinct)
    ).last_hidden_state[0]
    labels = [token for continuation in continuations for token in continuation]
    logps, greedy = _of_labels(base, hidden, number, torch.tensor(labels, device=base.device))
    found, begin = [], 0
    for continuation in continuations:
        end = begin + len(continuation)
        found.append(Likelihood(float(logps[begin:end].sum()), bool(greedy[begin:end].all())))
        begin = end
    return found


def _of_labels(
    base: Any, hidden_PD: torch.Tensor, number: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """([labels] float64 log-probability of each label at its place, [labels] bool whether it is the best).

    number: [labels], which place each label follows. The logits of a place with several labels are computed once, and
    not those of all places at the same time.
    """
    by_place = number.argsort(stable=True)
    ends = torch.bincount(number, minlength=len(hidden_PD)).cumsum(0).tolist()
    logps, greedy = [], []
    for rows in row_blocks(len(hidden_PD), base.config.vocab_size, BLOCK_LOGITS):
        logits_PV = base.lm_head(hidden_PD[rows]).float()
        finite(base, "logits", logits_PV)
        own = by_place[ends[rows.start - 1] if rows.start else 0 : ends[rows.stop - 1]]
        row, targets = number[own] - rows.start, labels[own]
        logps.append(logits_PV[row, targets].double() - logits_PV.logsumexp(-1).double()[row])
        greedy.append(logits_PV.argmax(-1)[row] == targets)
    order = by_place.argsort()
    return torch.cat(logps)[order].cpu(), torch.cat(greedy)[order].cpu()


def _inputs(tree: PackedTree, device: torch.device) -> dict[str, torch.Tensor]:
    names = {"input_ids": tree.ids, "position_ids": tree.positions, "seq_idx": tree.documents}
    inputs = {name: torch.tensor([values], device=device) for name, values in names.items()}
    if any(prefix >= 0 for prefix in tree.prefixes):
        inputs["prefix_documents"] = torch.tensor(tree.prefixes, device=device)
    return inputs


def _side_by_side(read: Sequence[Sequence[int]]) -> PackedTree:
    """A row of documents of their own, for attention that cannot continue documents."""
    tree = PackedTree()
    tree.ends = [tree.add(ids, 0, -1) for ids in read]
    return tree
