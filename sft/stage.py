"""Supervised fine-tuning: our rendering and masks, TRL's SFTTrainer, our model's balance losses."""

import sys
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from conversations import render_conversation
from conversations.prompts import answer_text, prompt_text, split_prompt
from deepseek_v2_modeling.inference import generate_answers
from deepseek_v2_modeling.run_files import REJECTED_FILE, SAMPLES_FILE, append_lines
from deepseek_v2_modeling.trainer import RunLimits, RunTrainerMixin, training_arguments
from sft.config import SftRecipe
from sft.data import Row, encode_rows, messages_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 6
SAMPLE_TOKENS = 64


class ChatTrainer(RunTrainerMixin, SFTTrainer):
    """SFTTrainer on rows that are rendered already; `probes` are asked before and after (conversation rows)."""

    def __init__(self, *args: Any, probes: Sequence[Row], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.probes = [split_prompt(row["messages"]) for row in probes]

    def on_fresh_start(self) -> None:
        self.write_samples("before")

    def write_samples(self, when: str) -> None:
        """Greedy answers to the probes, into samples.jsonl; the main process only."""
        tokenizer: Any = self.processing_class
        if not self.is_world_process_zero() or not self.probes:
            return
        ids = [render_conversation(p, tokenizer, add_generation_prompt=True)["input_ids"] for p, _ in self.probes]
        with self.accelerator.autocast():
            answers = generate_answers(
                self.model,
                ids,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                max_new_tokens=SAMPLE_TOKENS,
            )
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        lines = [
            {
                "step": self.state.global_step,
                "when": when,
                "prompt": prompt_text(prompt),
                "completion": answer_text(text),
                "reference": reference,
            }
            for (prompt, reference), text in zip(self.probes, texts, strict=True)
        ]
        append_lines(self.run_dir / SAMPLES_FILE, lines)


def train(
    recipe: SftRecipe,
    *,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Row],
    eval_rows: Iterable[Row] | None,
    run_dir: Path,
    resume_from: Path | None,
) -> dict[str, Any]:
    """Trains `model` on conversations; writes metrics.jsonl, samples.jsonl, checkpoints and final/ into `run_dir`.

    Args:
        rows: canonical rows with `messages`; so are `eval_rows`, which give `eval_loss` and the samples' prompts.
        resume_from: a checkpoint of the same run to go on from.

    Returns:
        steps, seconds, what became of the rows, and eval_loss where there are eval_rows.

    Raises:
        ToolkitError: rows that can not be trained on.
        StopRequested: a signal ended training early, with a checkpoint.
    """
    datasets.disable_progress_bars()
    first, rows = _peek(rows)
    first_held_out, eval_rows = _peek(eval_rows or ())
    arguments = sft_config(recipe, run_dir, has_eval=bool(first_held_out))
    data, report = _encode(recipe, arguments, rows, tokenizer)
    held_out = _encode(recipe, arguments, eval_rows, tokenizer)[0] if first_held_out else None
    trainer = ChatTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        limits=RunLimits(recipe.on_nan, recipe.max_seconds),
        probes=first_held_out or first,
    )
    if trainer.is_world_process_zero():
        print(f"sft: {report.summary(arguments.max_length)}", file=sys.stderr)
        if resume_from is None:
            append_lines(run_dir / REJECTED_FILE, report.rejected)
    output = trainer.train(resume_from)
    metrics: dict[str, Any] = {"steps": output.global_step, "seconds": trainer.seconds, **report.as_metrics()}
    if held_out is not None:
        metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    trainer.write_samples("after")
    trainer.finish(recipe.model.dtype)
    return metrics


def sft_config(recipe: SftRecipe, run_dir: Path, has_eval: bool = False) -> SFTConfig:
    """TRL's config: the recipe's `training` with what the toolkit owns. TRL only packs; it never sees text."""
    limits = RunLimits(recipe.on_nan, recipe.max_seconds)
    arguments = training_arguments(
        recipe.training,
        run_dir=run_dir,
        seed=recipe.seed,
        dtype=recipe.model.dtype,
        limits=limits,
        has_eval=has_eval,
    )
    packs = bool(arguments.get("packing") or arguments.get("eval_packing"))
    return SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": not packs})


def _encode(recipe: SftRecipe, arguments: SFTConfig, rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase"):
    return encode_rows(
        rows,
        tokenizer,
        train_on=recipe.format.train_on,
        max_length=arguments.max_length,
        too_long=recipe.format.too_long,
    )


def _peek(rows: Iterable[Row]) -> tuple[list[Row], Iterable[Row]]:
    """The first few rows, and all of them."""
    iterator = iter(rows)
    first = list(islice(iterator, SAMPLES))
    for number, row in enumerate(first, 1):
        messages_of(row, number)
    return first, chain(first, iterator)
