"""TRL's SFTTrainer for encoded rows: held-out loss per source, sample answers, and the origins of rows for errors."""

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import speed_metrics
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from conversations.answers.prompts import split_prompt
from conversations.generation.probes import ProbedTrainerMixin
from conversations.rendering.encoded import lengths_of
from conversations.row import Row
from deepseek_v2_modeling.training import IGNORED, HeadSettings, mean_of, with_fused_head
from sft.data import origins_of


class ChatTrainer(ProbedTrainerMixin, SFTTrainer):
    """SFTTrainer for data from `sft.data.encode_rows`.

    probes: rows whose conversations are used as prompts for sample answers before and after training.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        train_dataset: Dataset,
        probes: Sequence[Row],
        **kwargs: Any,
    ):
        # `uniform`, because the loss "nll" is a mean over tokens
        with with_fused_head(model, HeadSettings(uniform=args.loss_type == "nll")):
            said = [split_prompt(row["messages"]) for row in probes if "messages" in row]
            super().__init__(model, args, train_dataset=train_dataset, probes=said, **kwargs)
        self.encoded = train_dataset

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """The mean loss over all trained tokens of the held-out rows: `eval_loss`, and `eval_NAME_loss` for each
        source.

        All sources are logged in one line of metrics; transformers would log each one separately and use each to choose
        the best model.
        """
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        began, total, rows = time.time(), torch.zeros(2, dtype=torch.float64), 0
        metrics: dict[str, float] = {}
        for name in self.eval_dataset:
            loader = self.get_eval_dataloader(name)
            prefix = f"{metric_key_prefix}_{name}"
            output = self.evaluation_loop(loader, "Evaluation", True, ignore_keys, prefix)
            metrics[f"{prefix}_loss"] = (output.metrics or {})[f"{prefix}_loss"]
            total += self.held_out_loss
            rows += output.num_samples or 0
        metrics = {f"{metric_key_prefix}_loss": mean_of(total), **metrics}
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=rows)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def loss_weight(self, inputs: Any, rows: int) -> int:
        """Trained tokens: the loss is their mean, so that it does not depend on batching."""
        return int((inputs["labels"][:, 1:] != IGNORED).sum())

    def held_out_losses(self) -> dict[str, float]:
        """The held-out losses of the model after training: those logged for its step, or from a final evaluation."""
        state = self.state
        best = self.args.load_best_model_at_end and state.best_global_step
        step = state.best_global_step if best else state.global_step
        logged = (entry for entry in reversed(state.log_history) if entry["step"] == step and "eval_loss" in entry)
        metrics = next(logged, None) or self.evaluate()
        return {key: value for key, value in metrics.items() if re.fullmatch(r"eval_(.+_)?loss", key)}

    # --- origins of rows ----------------------------------------------------------------------------------------

    def rows_of(self, inputs: Any) -> list[str]:
        return origins_of(self.encoded, documents_of(inputs))

    def tokens_a_row(self) -> float:
        data: Any = self.train_dataset
        return float(lengths_of(data).mean())


def documents_of(inputs: Any) -> Iterator[list[int]]:
    """The token ids of each document of a batch: its rows without padding, or the documents packed into its only
    row."""
    ids = inputs["input_ids"]
    if "cu_seq_lens_q" in inputs:
        sizes = inputs["cu_seq_lens_q"].diff().tolist()
        yield from (part.tolist() for part in ids[0].split(sizes))
    else:
        yield from (row[mask.bool()].tolist() for row, mask in zip(ids, inputs["attention_mask"], strict=True))
