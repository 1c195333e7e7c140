"""Trainers of reward models: pairwise and pointwise losses (paper, section 4.2), auxiliary losses, several heads."""

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
    """How often a row counts for each head: Poisson-distributed with mean 1, seeded by the row's own token ids.

    The heads of an ensemble should make different errors. They share each forward pass, so they cannot see the rows in
    different orders; instead each is trained on its own bootstrap sample. Poisson weights give such a sample without
    knowing the number of rows (Oza and Russell, "Online Bagging and Boosting", 2001), and the same one in each epoch,
    on any number of processes and after a resume. Each head also has its own random initialisation.
    """
    return numpy.random.default_rng([seed, crc32(numpy.asarray(ids, numpy.int64).tobytes())]).poisson(1, heads).tolist()


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's collator plus answer_tokens [B], the number of tokens at the end of each chosen row that are the answer,
    and, with several heads, head_weights [B, K]. A missing margin (None) is 0."""

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
    """Shifted labels [1, N] of the packed rows: the next token if it belongs to a chosen answer, otherwise IGNORED.

    ids, mask [2 B, T] are padded on the right, with the B chosen rows first; answer_tokens [B].
    """
    lengths = mask.sum(-1, keepdim=True)
    counts = torch.cat([answer_tokens, torch.zeros_like(answer_tokens)])[:, None]
    columns = torch.arange(ids.shape[1], device=ids.device)
    is_answer = (columns >= lengths - counts) & (columns < lengths)
    return shifted_labels(ids.where(is_answer, IGNORED))[mask.bool()][None]


def prefix_loss(
    scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, margin: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """The pairwise loss at every token from the first in which the two answers differ; the mean over these tokens, then
    over pairs.

    scores, ids, mask [2 B, T], padded on the right, with the B chosen rows first; margin [B, 1] -> a scalar.
    """
    (good, bad), (chosen, rejected), (chosen_mask, rejected_mask) = (
        part.chunk(2) for part in (scores, ids, mask.bool())
    )
    compared = ((chosen != rejected).cumsum(-1) > 0) & chosen_mask & rejected_mask
    losses = -F.logsigmoid(good - bad - margin) * compared
    return (losses.sum(-1) / compared.sum(-1).clamp(min=1)).mean()


def pairwise_loss(
    scores: torch.Tensor, margin: torch.Tensor, weights: torch.Tensor, center: float | None
) -> torch.Tensor:
    """TRL's pairwise loss, with `center` as its center_rewards_coefficient and a weight for each row and head.

    scores [2 B, K], with the B chosen rows first; margin [B]; weights [B, K] -> a scalar.
    """
    good, bad = scores.float().chunk(2)
    losses = -F.logsigmoid(good - bad - margin[:, None]) + (center or 0.0) * (good + bad) ** 2
    return (losses * weights).mean()


@contextmanager
def one_label(config: Any) -> Iterator[None]:
    """Set num_labels to 1 while TRL's trainer initialises, which refuses reward models with several labels."""
    labels, config.num_labels = config.num_labels, 1
    try:
        yield
    finally:
        config.num_labels = labels


class Auxiliary(NamedTuple):
    """Weights of auxiliary losses. The pairwise loss uses the score at the last token only; these also give a signal at
    the tokens before it.

    sft: a language-model loss on chosen answers with the frozen `lm_head` (Yang et al., "Regularizing Hidden States",
    2024). prefix: `prefix_loss`, as DeepSpeed-Chat trains its reward models.
    """

    sft: float = 0.0
    prefix: float = 0.0
    lm_head: Any = None


class PackedRewardTrainer(RewardTrainer):
    """RewardTrainer that scores packed rows, without padding, since answers of a pair can differ greatly in length."""

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
        """The weighted sum of the auxiliary losses, which are also logged; hidden [1, N, D] is of the packed rows."""
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
    """The pairwise loss -log sigmoid(score of chosen - score of rejected), with the balance losses."""


def pointwise_loss(
    scores: torch.Tensor, targets: torch.Tensor, verdict: str, weights: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """scores, targets, weights [B, K] -> a scalar. verdict "label": binary cross-entropy of sigmoid(score); "score":
    squared error."""
    loss = F.binary_cross_entropy_with_logits if verdict == "label" else F.mse_loss
    return (loss(scores, targets, reduction="none") * weights).mean()


class JudgedCollator:
    """Pads input_ids on the right: {input_ids [B, T], attention_mask [B, T], target [B]}, and with several heads
    head_weights [B, K]."""

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
    """RewardTrainer on single judged answers. verdict: the kind of their targets, "label" or "score"."""

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
    """The pointwise loss, with the balance losses."""
