"""The two losses of a reward model (paper, section 4.2): pair-wise and point-wise."""

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from trl.trainer.reward_trainer import RewardTrainer

from deepseek_v2_modeling.inference import pad_batch, unpad_batch
from deepseek_v2_modeling.training import RunTrainerMixin


class PackedRewardTrainer(RewardTrainer):
    """RewardTrainer that scores a batch's rows without their padding: answers to compare can differ much in length."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        packed = unpad_batch(inputs["input_ids"], inputs["attention_mask"])
        inputs = {**inputs, **packed, "attention_mask": torch.ones_like(packed["input_ids"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class PairTrainer(RunTrainerMixin, PackedRewardTrainer):
    """-log sigmoid(score of chosen - score of rejected)."""


def pointwise_loss(scores: torch.Tensor, targets: torch.Tensor, verdict: str) -> torch.Tensor:
    """scores [B], targets [B] -> scalar. "label": cross-entropy of sigmoid(score); "score": squared error."""
    if verdict == "label":
        return F.binary_cross_entropy_with_logits(scores, targets)
    return F.mse_loss(scores, targets)


class JudgedCollator:
    """Pads input_ids on the right: {input_ids [B, T], attention_mask [B, T], target [B]}."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = pad_batch([row["input_ids"] for row in rows], self.pad_token_id, left=False)
        target = torch.tensor([row["target"] for row in rows], dtype=torch.float32)
        return {"input_ids": ids, "attention_mask": mask, "target": target}


class PointwiseLossTrainer(RewardTrainer):
    """RewardTrainer on single answers; `verdict` says what their targets are."""

    def __init__(self, *args: Any, verdict: str, **kwargs: Any):
        self.verdict = verdict
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "target"]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**unpad_batch(inputs["input_ids"], inputs["attention_mask"]), use_cache=False)
        scores, targets = outputs.logits.squeeze(-1).float(), inputs["target"]
        loss = pointwise_loss(scores, targets, self.verdict)
        logged = self._metrics["train" if model.training else "eval"]
        logged["mean_reward"].append(self._mean_of(scores.detach()))
        if self.verdict == "label":
            right = ((scores > 0) == (targets > 0.5)).float()
            logged["accuracy"].append(self._mean_of(right))
        return (loss, outputs) if return_outputs else loss

    def _mean_of(self, values: torch.Tensor) -> float:
        gathered: Any = self.accelerator.gather_for_metrics(values)
        return gathered.mean().item()


class JudgedTrainer(RunTrainerMixin, PointwiseLossTrainer):
    """The point-wise loss with the balance losses."""
