"""Padded rows of prompts and answers as one packed row without padding, in which the prompt of a group is read once.

B rows, P columns of prompt (padded on the left), A columns of answer (padded on the right), T = P + A, N packed tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from deepseek_v2_modeling.training import IGNORED

WORTH_SHARING = 0.05  # of the tokens: so many must be saved


@dataclass(frozen=True)
class PackedRows:
    """inputs: of the model, [1, N] each but for prefix_documents. places: [B, 2, T] bool, the tokens of the padded
    batch that were packed, in order: of each row its prompt, if it is read for a whole group, then what is its own.
    index: [B, T], which of the packed tokens each token is, for all of a group the prompt that is read once; -1 at
    padding and in rows that are not read."""

    inputs: dict[str, torch.Tensor]
    places: torch.Tensor
    index: torch.Tensor

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Values [B, T, ...] of all tokens -> [N, ...] of the packed ones; of a prompt that is read once, those of the
        group's first row."""
        return values.unsqueeze(1).expand(-1, 2, *values.shape[1:])[self.places]

    def spread(self, values: torch.Tensor, nothing: Any) -> torch.Tensor:
        """Values [N, ...] of packed tokens -> [B, T, ...] of all, a prompt that is read once for each of its group;
        `nothing` at padding."""
        spread = values[self.index.clamp(min=0)]
        spread[self.index < 0] = nothing
        return spread

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Values [1, N - 1] of all packed tokens except the first -> [B, T]; 0 at padding, at the first token of a
        row and in prompts that were read for a whole group."""
        whole = F.pad(values[0], (1, 0))
        return whole.new_zeros(self.places.shape).masked_scatter(self.places, whole)[:, 1]


def pack_rows(input_ids: torch.Tensor, mask: torch.Tensor, answer_length: int, share: bool = True) -> PackedRows:
    """Padded rows [B, T] -> packed rows; rows without any token in the mask are left out.

    Rows with the same prompt, side by side, are a group: the prompt but for its last token is a document of its own,
    which each row's document continues with the prompt's last token (it predicts the answer's first) and the answer.
    Only the last `answer_length` columns have labels, and never the first token of a row, which nothing predicts.

    Args:
        share: whether prompts are read once for their group, where that saves enough.
    """
    real = mask.bool()
    nothing = real.new_zeros(len(real))
    leads, follows = _groups(input_ids, real, answer_length) if share else (nothing, nothing)
    shared, width = leads | follows, input_ids.shape[1] - answer_length
    in_prefix = torch.arange(input_ids.shape[1], device=real.device) < width - 1
    prefix = real & in_prefix & leads.unsqueeze(1)
    places = torch.stack((prefix, real & ~(in_prefix & shared.unsqueeze(1))), dim=1)
    labels = input_ids.masked_fill(real.cumsum(-1) == 1, IGNORED)
    labels[:, :width] = IGNORED
    inputs = {
        "input_ids": input_ids.unsqueeze(1).expand(places.shape)[places][None],
        "position_ids": (real.cumsum(-1) - 1).unsqueeze(1).expand(places.shape)[places][None],
        "labels": torch.stack((torch.full_like(labels, IGNORED), labels), dim=1)[places][None],
    }
    if share and bool(leads.any()):
        filled = places.any(-1)  # [B, 2]
        document = filled.flatten().cumsum(0).view_as(filled) - 1
        leader = torch.where(leads, document[:, 0], -1).cummax(0).values  # the prompt read last
        continued = torch.stack((torch.full_like(leader, -1), torch.where(shared, leader, -1)), dim=1)
        inputs["seq_idx"] = document.unsqueeze(-1).expand(places.shape)[places][None]
        inputs["prefix_documents"] = continued[filled]
    return PackedRows(inputs, places, _index(places, leads, shared, real))


def _index(places: torch.Tensor, leads: torch.Tensor, shared: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The index of `PackedRows`. leads, shared: [B] bool, the first row of each group with one prompt, and all."""
    number = (places.flatten().cumsum(0) - 1).view_as(places)
    rows = torch.arange(len(real), device=real.device)
    leader = torch.where(leads, rows, -1).cummax(0).values.clamp(min=0)
    in_prefix = places[leader, 0] & shared.unsqueeze(1)
    return torch.where(in_prefix, number[leader, 0], number[:, 1]).masked_fill(~real, -1)


def _groups(input_ids: torch.Tensor, real: torch.Tensor, answer_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([B] bool: the first of several rows with one prompt, [B] bool: the others); none, where they save too little."""
    prompts, masks = input_ids[:, :-answer_length], real[:, :-answer_length]
    read = real.any(-1)
    # Rows that are not read may stand between those of a group: each is compared with the last one that is.
    rows = torch.arange(len(real), device=real.device)
    before = F.pad(torch.where(read, rows, -1).cummax(0).values, (1, 0), value=-1)[:-1]
    alike = (prompts == prompts[before]).all(-1) & (masks == masks[before]).all(-1)
    follows = read & (before >= 0) & alike & (masks.sum(-1) > 1)
    followed = torch.zeros_like(rows).index_add(0, before.clamp(min=0), follows.long()) > 0
    leads = followed & ~follows
    saved = ((masks.sum(-1) - 1) * follows).sum()
    worth = saved >= WORTH_SHARING * real.sum()
    return leads & worth, follows & worth
