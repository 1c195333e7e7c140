"""The choice of experts and their weights: the table of what differs between the family's gates.

N tokens, E routed experts, K experts a token, G groups of experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..configuration import DeepseekV2Config


class Routing(NamedTuple):
    """A gate. scores: logits [N, E] -> scores [N, E]. shares: scores -> shares that sum to 1, the P of the balance
    losses. group_score: scores for the choice [N, G, E/G] -> [N, G]. scales_normalised: whether normalised weights are
    scaled by routed_scaling_factor as well."""

    scores: Callable[[torch.Tensor], torch.Tensor]
    shares: Callable[[torch.Tensor], torch.Tensor]
    group_score: Callable[[torch.Tensor], torch.Tensor]
    scales_normalised: bool


def _normalised(scores: torch.Tensor) -> torch.Tensor:
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


# By scoring_func: DeepSeek-V2 (paper, eq. 20-22) and DeepSeek-V3 (arXiv 2412.19437, eq. 12-20).
ROUTINGS = {
    "softmax": Routing(lambda x: x.softmax(-1), lambda scores: scores, lambda x: x.amax(-1), False),
    "sigmoid": Routing(torch.sigmoid, _normalised, lambda x: x.topk(2, dim=-1).values.sum(-1), True),
}


def expert_scores(config: DeepseekV2Config, logits_NE: torch.Tensor) -> torch.Tensor:
    """The gate's scores [N, E] of all experts."""
    return ROUTINGS[config.scoring_func].scores(logits_NE)


def expert_shares(config: DeepseekV2Config, logits_NE: torch.Tensor) -> torch.Tensor:
    """The scores [N, E], normalised to sum to 1."""
    routing = ROUTINGS[config.scoring_func]
    return routing.shares(routing.scores(logits_NE))


def choose_experts(
    config: DeepseekV2Config, scores_NE: torch.Tensor, bias_E: torch.Tensor | None = None
) -> torch.Tensor:
    """The K experts with the highest scores, plus a bias that only the choice knows: [N, K]. Except with `greedy`, only
    those in the topk_group best groups (device-limited routing).

    The scores of other groups become 0, as in the official code. Stock makes those of DeepSeek-V3 -inf, which differs
    where fewer than K experts of the kept groups have a score with bias above 0.
    """
    if bias_E is not None:
        scores_NE = scores_NE.detach() + bias_E
    if config.topk_method != "greedy":
        groups = config.n_group or 1
        score_NG = ROUTINGS[config.scoring_func].group_score(scores_NE.unflatten(-1, (groups, -1)))
        kept_groups = score_NG.topk(config.topk_group or groups, dim=-1, sorted=False).indices
        allowed_NG = torch.zeros_like(score_NG, dtype=torch.bool).scatter_(1, kept_groups, True)
        allowed = allowed_NG.repeat_interleave(scores_NE.shape[-1] // groups, dim=1)
        scores_NE = scores_NE.masked_fill(~allowed, 0.0)
    return scores_NE.topk(config.num_experts_per_tok or 1, dim=-1, sorted=False).indices


def replayed_experts(
    config: DeepseekV2Config, scores_NE: torch.Tensor, replayed_NK: torch.Tensor, bias_E: torch.Tensor | None = None
) -> torch.Tensor:
    """The experts to use again, [N, K]; where there are none (-1), those that the router chooses."""
    replayed_NK = replayed_NK.to(scores_NE.device, torch.int64)
    return torch.where(replayed_NK[:, :1] < 0, choose_experts(config, scores_NE, bias_E), replayed_NK)


def expert_weights(config: DeepseekV2Config, scores_NE: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
    """The gate weights [N, K] float32 of the chosen experts. With norm_topk_prob they are normalised, and then scaled
    by routed_scaling_factor in DeepSeek-V3 but not in DeepSeek-V2 (official)."""
    weights = scores_NE.gather(1, experts_NK)
    if config.norm_topk_prob and experts_NK.shape[1] > 1:
        weights = _normalised(weights)
        return weights * config.routed_scaling_factor if ROUTINGS[config.scoring_func].scales_normalised else weights
    return weights * config.routed_scaling_factor
