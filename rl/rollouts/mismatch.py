"""How far the policy that is updated is from the one that sampled, token by token, and the correction for it.

Both have the same weights, and still differ: by the dtype, by kernels, by tokens that go to other experts, or because
the answers come from another engine. B answers, A tokens, L MoE layers, K experts a token.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from trl.trainer.grpo_trainer import GRPOTrainer

from conversations.errors import ToolkitError
from rl.config import RolloutCorrection
from rl.rollouts.replay import joined

FAR = 2.0  # times as likely, or half


def log_ratios(policy: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log(policy / sampler) of each token [B, A] from their log-probabilities; 0 where the mask is 0, or where the
    sampler did not say (NaN)."""
    return torch.where(mask.bool() & ~sampled.isnan(), policy - sampled, 0.0)


def mismatch_sums(log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[3]: the sum of r - 1 - log r (k3, an estimate of KL(sampler || policy) per token), the number of tokens whose
    ratio is outside [1/2, 2], and of all tokens."""
    k3 = (torch.expm1(log_ratio.double()) - log_ratio.double()) * mask
    far = (log_ratio.abs() > torch.tensor(FAR).log()) * mask
    return torch.stack([k3.sum(), far.sum().double(), mask.sum().double()])


def correction(log_ratio: torch.Tensor, mode: str, cap: float) -> torch.Tensor:
    """Importance weights, [B, A] or, of whole answers, [B, 1].

    token_truncate: min(r, cap) (TIS). token_mask: r, and 0 outside [1/cap, cap] (IcePop). sequence_mask: the same with
    the ratio of the whole answer.
    """
    ratio = (log_ratio.sum(-1, keepdim=True) if mode == "sequence_mask" else log_ratio).exp()
    if mode == "token_truncate":
        return ratio.clamp(max=cap)
    return ratio * ((ratio >= 1 / cap) & (ratio <= cap))


def agreement_sums(routes: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """[2]: how many token-layers chose the same experts, and how many there are. Both [tokens, L, K]."""
    same = (routes.sort(-1).values == sampled.sort(-1).values).all(-1)
    return torch.stack([same.sum().double(), torch.tensor(same.numel(), device=same.device).double()])


class CorrectedRollouts(GRPOTrainer if TYPE_CHECKING else object):
    """The part of `PolicyTrainer` that compares the update's forward with the rollout's.

    TRL has it for vLLM alone. updating: the micro-batch of an update, while TRL computes its loss: the advantages in it
    are weighted between the policy's log-probabilities and the loss, so that all of TRL's losses are corrected.
    """

    # Of many types in transformers and TRL.
    accelerator: Any
    args: Any
    model: Any
    rollout_correction: RolloutCorrection | None
    updating: dict[str, Any] | None = None

    def check_correction(self) -> None:
        """Raises ToolkitError where TRL corrects already."""
        if self.rollout_correction and self.args.use_vllm and self.args.vllm_importance_sampling_correction:
            raise ToolkitError(
                "rollout_correction and training.vllm_importance_sampling_correction correct the same; leave one out"
            )

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self.updating = dict(inputs)
        try:
            return super()._compute_loss(model, self.updating)
        finally:
            self.updating = None

    def compare(self, logps: torch.Tensor, routes: Any, index: torch.Tensor) -> None:
        """logps [B, A] of the update's forward; routes: as recorded there, of tokens packed in a row; index [B, A]:
        which of them each token of the answers is."""
        batch = self.updating
        if batch is None or "sampling_per_token_logps" not in batch:
            return
        mask, old = batch["completion_mask"] * batch.get("tool_mask", 1), batch.get("old_per_token_logps")
        log_ratio = log_ratios(logps.detach() if old is None else old, batch["sampling_per_token_logps"], mask)
        agreed = log_ratio.new_zeros(2, dtype=torch.float64)
        if routes:
            sampled = batch["rollout_routes"][:, -mask.shape[1] :]
            known = (sampled[:, :, 0, 0] >= 0) & mask.bool()
            agreed = agreement_sums(joined(routes[0])[index[known]], sampled[known])
        self._log_mismatch(torch.cat([mismatch_sums(log_ratio, mask), agreed]))
        if self.rollout_correction:
            weights = correction(log_ratio, self.rollout_correction.mode, self.rollout_correction.cap)
            if self.loss_type == "vespo":  # has a place for them in its own weights
                batch["importance_sampling_ratio"] = weights
            else:
                batch["advantages"] = batch["advantages"].unsqueeze(1) * weights

    def _log_mismatch(self, sums: torch.Tensor) -> None:
        """`mismatch_sums` and `agreement_sums` of this process: shares of those of all."""
        k3, far, tokens, agreed, token_layers = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, part, whole in (
            ("k3", k3, tokens),
            ("outside_x2", far, tokens),
            ("routes_agree", agreed, token_layers),
        ):
            if whole:
                self._metrics["train"][f"mismatch/{name}"].append(part / whole)
