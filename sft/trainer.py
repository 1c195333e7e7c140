"""TRL's SFTTrainer for encoded rows: held-out loss per source, sample answers, and the origins of rows for errors."""

import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput, speed_metrics
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from conversations import render_conversation
from conversations.answers.prompts import answer_text, prompt_text, split_prompt
from conversations.row import Row
from conversations.run_files import SAMPLES
from deepseek_v2_modeling.inference import end_tokens, generate_answers
from deepseek_v2_modeling.training import (
    IGNORED,
    HeadSettings,
    RunTrainerMixin,
    append_lines,
    with_fused_head,
)
from sft.data import lengths_of, origins_of

SAMPLED_SHARE = 0.02  # sampled tokens as a fraction of a run's training tokens, at most: sampling is slower
FEWEST_SAMPLE_TOKENS = 8


class ChatTrainer(RunTrainerMixin, SFTTrainer):
    """SFTTrainer for data from `sft.data.encode_rows`.

    probes: rows whose conversations are used as prompts for sample answers before and after training.
    sample_tokens: the maximum length of these answers; in short runs it is reduced, so that sampling takes only a small
        part of the time.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        train_dataset: Dataset,
        probes: Sequence[Row],
        sample_tokens: int = 64,
        **kwargs: Any,
    ):
        # `uniform`, because the loss "nll" is a mean over tokens
        with with_fused_head(model, HeadSettings(uniform=args.loss_type == "nll")):
            super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        self.encoded = train_dataset
        self.probes = [split_prompt(row["messages"]) for row in probes if "messages" in row]
        self.sample_tokens = sample_tokens
        self._eval_loss = torch.zeros(2, dtype=torch.float64)  # sum over tokens, number of tokens

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
            total += self._eval_loss
            rows += output.num_samples or 0
        metrics = {f"{metric_key_prefix}_loss": _mean(total), **metrics}
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=rows)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Like Trainer's, but the loss is a mean over tokens, which does not depend on batching, not over batches."""
        self._eval_loss = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        summed: Any = self.accelerator.reduce(self._eval_loss.to(self.accelerator.device))
        self._eval_loss = summed.cpu()
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = _mean(self._eval_loss)
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result: Any = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum().item()
        self._eval_loss += torch.tensor([result[0].item() * tokens, tokens], dtype=torch.float64)
        return result

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

    # --- samples ------------------------------------------------------------------------------------------------

    def on_fresh_start(self) -> None:
        self.write_samples("before")

    def _sample_tokens(self) -> int:
        """The length of sample answers, by the number of tokens in the run rather than by its speed, so that samples
        are the same on every machine."""
        data: Any = self.train_dataset
        rows = len(data) * self.args.num_train_epochs
        if self.args.max_steps > 0:
            rows = self.args.max_steps * self.get_total_train_batch_size(self.args)
        planned = rows * lengths_of(data).mean()
        affordable = math.ceil(SAMPLED_SHARE * planned / (2 * len(self.probes)))
        return min(self.sample_tokens, max(FEWEST_SAMPLE_TOKENS, affordable))

    def write_samples(self, when: str) -> None:
        """Append greedy answers to the probes to samples.jsonl; only the main process does so. when: "before" or
        "after" training."""
        tokenizer: Any = self.processing_class
        if not self.is_world_process_zero() or not self.probes:
            return
        ids = [render_conversation(p, tokenizer, add_generation_prompt=True)["input_ids"] for p, _ in self.probes]
        ends = end_tokens(self.model, tokenizer)
        with self.accelerator.autocast():
            answers = generate_answers(
                self.model,
                ids,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                max_new_tokens=self._sample_tokens(),
            )
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        lines = [
            {
                "step": self.state.global_step,
                "when": when,
                "prompt": prompt_text(prompt),
                "completion": answer_text(text),
                "truncated": answer[-1] not in ends,
                "reference": reference,
            }
            for (prompt, reference), text, answer in zip(self.probes, texts, answers, strict=True)
        ]
        append_lines(self.run_dir / SAMPLES, lines)


def documents_of(inputs: Any) -> Iterator[list[int]]:
    """The token ids of each document of a batch: its rows without padding, or the documents packed into its only
    row."""
    ids = inputs["input_ids"]
    if "cu_seq_lens_q" in inputs:
        sizes = inputs["cu_seq_lens_q"].diff().tolist()
        yield from (part.tolist() for part in ids[0].split(sizes))
    else:
        yield from (row[mask.bool()].tolist() for row, mask in zip(ids, inputs["attention_mask"], strict=True))


def _mean(loss: torch.Tensor) -> float:
    """The mean loss, from (sum over tokens, number of tokens)."""
    return (loss[0] / loss[1].clamp(min=1)).item()
