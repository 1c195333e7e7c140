"""The losses of a reward model: pair-wise and point-wise (paper, section 4.2), and what may stand beside the first."""

from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from deepseek_v2_modeling.inference import pad_batch, unpad_batch
from deepseek_v2_modeling.training import IGNORED, RunTrainerMixin, blockwise_loss, shifted_labels

PAIR_BATCH = ("input_ids", "attention_mask", "answer_tokens", "margin")


class PairCollator(DataCollatorForPreference):
    """TRL's, with answer_tokens [B]: how many tokens at the end of each chosen row are the answer. A margin that is
    missing (None) is 0."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        answers = torch.tensor([example["answer_tokens"] for example in examples])
        with_margins = [{**example, "margin": example["margin"] or 0.0} for example in examples]
        return {**super().torch_call(with_margins), "answer_tokens": answers}


def next_answer_tokens(ids: torch.Tensor, mask: torch.Tensor, answer_tokens: torch.Tensor) -> torch.Tensor:
    """ids, mask [2 B, T] padded on the right, the B chosen rows first; answer_tokens [B] -> [1, N] for the packed
    tokens: the next one, where it belongs to a chosen answer."""
    lengths = mask.sum(-1, keepdim=True)
    counts = torch.cat([answer_tokens, torch.zeros_like(answer_tokens)])[:, None]
    places = torch.arange(ids.shape[1], device=ids.device)
    is_answer = (places >= lengths - counts) & (places < lengths)
    return shifted_labels(ids.where(is_answer, IGNORED))[mask.bool()][None]


def prefix_loss(
    scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, margin: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """The pair-wise loss at each token from the first on in which the two differ, the mean over these, then over pairs.

    scores, ids, mask [2 B, T], padded on the right, the B chosen rows first; margin [B, 1] -> a scalar.
    """
    (good, bad), (chosen, rejected), (one, other) = (part.chunk(2) for part in (scores, ids, mask.bool()))
    compared = ((chosen != rejected).cumsum(-1) > 0) & one & other
    losses = -F.logsigmoid(good - bad - margin) * compared
    return (losses.sum(-1) / compared.sum(-1).clamp(min=1)).mean()


class Auxiliary(NamedTuple):
    """Losses beside the pair-wise one, by their weights. The score is read at one token: these say more about the
    tokens before it.

    sft: a language-model loss on chosen answers (Yang et al., "Regularizing Hidden States", 2024) with `lm_head`, which
    is frozen. prefix: `prefix_loss` (so DeepSpeed-Chat trains its reward models).
    """

    sft: float = 0.0
    prefix: float = 0.0
    lm_head: Any = None


class PackedRewardTrainer(RewardTrainer):
    """RewardTrainer that scores a batch's rows without their padding: answers to compare can differ much in length."""

    def __init__(self, *args: Any, auxiliary: Auxiliary | None = None, **kwargs: Any):
        self.auxiliary = auxiliary or Auxiliary()
        super().__init__(*args, **kwargs)
        if self.auxiliary.lm_head is not None:
            self.auxiliary.lm_head.to(self.accelerator.device)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "answer_tokens"]))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, mask, answer_tokens, margin = (inputs[key] for key in PAIR_BATCH)
        packed = unpad_batch(ids, mask)
        inputs = {"attention_mask": torch.ones_like(packed["input_ids"]), **packed, "margin": margin}
        if not (self.auxiliary.sft or self.auxiliary.prefix):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["output_hidden_states"] = True
        result: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = result
        loss = loss + self._auxiliary_loss(model, outputs.hidden_states[-1], ids, mask, answer_tokens, margin)
        return (loss, type(outputs)(logits=outputs.logits)) if return_outputs else loss

    def _auxiliary_loss(
        self,
        model: nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        answer_tokens: torch.Tensor,
        margin: torch.Tensor,
    ) -> torch.Tensor:
        """hidden [1, N, D] of the packed rows -> the losses beside the pair-wise one, by their weights, and logged."""
        lm_head: Any = self.auxiliary.lm_head
        losses = {}
        if self.auxiliary.sft:
            labels, vocabulary = next_answer_tokens(ids, mask, answer_tokens), lm_head.weight.shape[0]
            losses["sft"] = blockwise_loss(lm_head, hidden, labels, vocabulary, shift_labels=labels)
        if self.auxiliary.prefix:
            bare: Any = self.accelerator.unwrap_model(model)
            head = (bare.get_base_model() if hasattr(bare, "peft_config") else bare).score
            scores = head(hidden)[0, :, 0].float()
            scores = scores.new_zeros(ids.shape).masked_scatter(mask.bool(), scores)
            losses["prefix"] = prefix_loss(scores, ids, mask, margin[:, None])
        for name, value in losses.items():
            self._metrics["train" if model.training else "eval"][f"{name}_loss"].append(value.item())
        return torch.stack([getattr(self.auxiliary, name) * value for name, value in losses.items()]).sum()


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
