"""The losses of a reward model: pair-wise and point-wise (paper, section 4.2), and what may stand beside the first."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

import numpy
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from deepseek_v2_modeling.inference import pad_batch, unpad_batch
from deepseek_v2_modeling.training import IGNORED, RunTrainerMixin, blockwise_loss, shifted_labels

PAIR_BATCH = ("input_ids", "attention_mask", "answer_tokens", "margin")


def bootstrap_weights(ids: Sequence[int], heads: int, seed: int) -> list[float]:
    """How often a row counts for each head: by a Poisson distribution with mean 1, drawn from the row itself.

    All heads see each batch in one forward, so that an order of rows for each head is not to be had; what orders and
    seeds are for, heads that err differently, comes from what each is trained on. Such weights are a bootstrap sample
    of the rows for each head, without knowing how many rows there are (Oza and Russell, "Online Bagging and Boosting",
    2001), and the same ones in each epoch, on any number of processes and after a resume. Beside that each head begins
    with random weights of its own.
    """
    return numpy.random.default_rng([seed, crc32(numpy.asarray(ids, numpy.int64).tobytes())]).poisson(1, heads).tolist()


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's, with answer_tokens [B]: how many tokens at the end of each chosen row are the answer. A margin that is
    missing (None) is 0. head_weights [B, K] where there are several heads."""

    heads: int = 1
    seed: int = 0

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        answers = torch.tensor([example["answer_tokens"] for example in examples])
        with_margins = [{**example, "margin": example["margin"] or 0.0} for example in examples]
        batch = {**super().torch_call(with_margins), "answer_tokens": answers}
        if self.heads > 1:
            rows = [[*example["chosen_ids"], *example["rejected_ids"]] for example in examples]
            batch["head_weights"] = torch.tensor([bootstrap_weights(row, self.heads, self.seed) for row in rows])
        return batch


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


def pairwise_loss(
    scores: torch.Tensor, margin: torch.Tensor, weights: torch.Tensor, center: float | None
) -> torch.Tensor:
    """scores [2 B, K], the B chosen rows first; margin [B]; weights [B, K] of each row for each head -> a scalar.

    TRL's pair-wise loss, with `center` as its center_rewards_coefficient, where rows count differently for each head.
    """
    good, bad = scores.float().chunk(2)
    losses = -F.logsigmoid(good - bad - margin[:, None]) + (center or 0.0) * (good + bad) ** 2
    return (losses * weights).mean()


@contextmanager
def one_label(config: Any) -> Iterator[None]:
    """TRL refuses a reward model with several labels as it starts."""
    labels, config.num_labels = config.num_labels, 1
    try:
        yield
    finally:
        config.num_labels = labels


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
        with one_label(kwargs["model"].config):
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
        weights = inputs.get("head_weights")
        packed = unpad_batch(ids, mask)
        inputs = {"attention_mask": torch.ones_like(packed["input_ids"]), **packed, "margin": margin}
        extra = bool(self.auxiliary.sft or self.auxiliary.prefix)
        if weights is None and not extra:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["output_hidden_states"] = extra
        inputs["margin"] = margin if weights is None else margin[:, None]
        result: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = result
        if weights is not None and model.training:
            arguments: Any = self.args
            loss = pairwise_loss(outputs.logits, margin, weights, arguments.center_rewards_coefficient)
        if not extra:
            return (loss, outputs) if return_outputs else loss
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
            by_head = [
                scores.new_zeros(ids.shape).masked_scatter(mask.bool(), scores)
                for scores in head(hidden)[0].float().unbind(-1)
            ]
            losses["prefix"] = torch.stack([prefix_loss(s, ids, mask, margin[:, None]) for s in by_head]).mean()
        for name, value in losses.items():
            self._metrics["train" if model.training else "eval"][f"{name}_loss"].append(value.item())
        return torch.stack([getattr(self.auxiliary, name) * value for name, value in losses.items()]).sum()


class PairTrainer(RunTrainerMixin, PackedRewardTrainer):
    """-log sigmoid(score of chosen - score of rejected)."""


def pointwise_loss(
    scores: torch.Tensor, targets: torch.Tensor, verdict: str, weights: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """scores, targets, weights [B, K] -> scalar. "label": cross-entropy of sigmoid(score); "score": squared error."""
    each = F.binary_cross_entropy_with_logits if verdict == "label" else F.mse_loss
    return (each(scores, targets, reduction="none") * weights).mean()


class JudgedCollator:
    """Pads input_ids on the right: {input_ids [B, T], attention_mask [B, T], target [B]}; head_weights [B, K] where
    there are several heads."""

    def __init__(self, pad_token_id: int, heads: int = 1, seed: int = 0):
        self.pad_token_id, self.heads, self.seed = pad_token_id, heads, seed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = pad_batch([row["input_ids"] for row in rows], self.pad_token_id, left=False)
        target = torch.tensor([row["target"] for row in rows], dtype=torch.float32)
        batch = {"input_ids": ids, "attention_mask": mask, "target": target}
        if self.heads > 1:
            weights = [bootstrap_weights(row["input_ids"], self.heads, self.seed) for row in rows]
            batch["head_weights"] = torch.tensor(weights)
        return batch


class PointwiseLossTrainer(RewardTrainer):
    """RewardTrainer on single answers; `verdict` says what their targets are."""

    def __init__(self, *args: Any, verdict: str, **kwargs: Any):
        self.verdict = verdict
        with one_label(kwargs["model"].config):
            super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "target"]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**unpad_batch(inputs["input_ids"], inputs["attention_mask"]), use_cache=False)
        scores = outputs.logits.float()
        targets = inputs["target"][:, None].expand_as(scores)
        weights = inputs.get("head_weights", 1.0) if model.training else 1.0
        loss = pointwise_loss(scores, targets, self.verdict, weights)
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
