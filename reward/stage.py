"""Trains reward models on pairs or judged answers, evaluates them on held-out rows, and saves statistics for RL."""

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import datasets
from torch import nn
from trl.trainer.reward_config import RewardConfig

from conversations.answers.judging import Scorer, is_pair, judge, means, means_by_kind
from conversations.answers.reward_stats import RewardStats
from conversations.rendering.encoded import EncodedRows
from conversations.row_cache import RowCache
from conversations.run_files import REJECTED, REWARD_STATS
from conversations.stage import Work
from deepseek_v2_modeling.inference import score_heads
from deepseek_v2_modeling.training import RunLimits, RunTrainerMixin, append_lines, training_arguments
from reward.config import CENTER_REWARDS, RewardRecipe
from reward.data import ANSWERS, Row, answer_ids, encode_judged, encode_pairs, verdict_of
from reward.trainers import Auxiliary, JudgedCollator, JudgedTrainer, PairCollator, PairTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Conversations (prompt, answer), each a list of messages -> the scores of all heads for each.
HeadScorer = Callable[[Sequence[tuple[list[Row], list[Row]]]], list[list[float]]]
STATS_ROWS = 500  # number of training rows from whose scores the statistics are computed


def run(recipe: RewardRecipe, work: Work) -> dict[str, Any]:
    """Run `train` with the data and models that `dsv2` has loaded; returns its results."""
    return train(
        recipe,
        model=work.model,
        tokenizer=work.tokenizer,
        rows=work.rows["data"],
        eval_rows=work.rows.get("eval_data"),
        run_dir=work.run_dir,
        resume_from=work.resume_from,
        cache=work.cache,
        lm_head=work.lm_head,
    )


def train(
    recipe: RewardRecipe,
    *,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Row],
    eval_rows: Iterable[Row] | None,
    run_dir: Path,
    resume_from: Path | None,
    cache: RowCache | None = None,
    lm_head: nn.Module | None = None,
) -> dict[str, Any]:
    """Train a DeepseekV2ForSequenceClassification with one label per score head; writes metrics.jsonl, checkpoints and
    final/ into `run_dir`.

    final/ also has reward_stats.json: {mean, std, n} of scores on training rows, with which RL normalises rewards.

    Args:
        rows: pairs (loss: pairwise) or judged answers (loss: pointwise).
        eval_rows: held-out rows; pairs yield pair_accuracy, judged answers accuracy or mse.
        resume_from: a checkpoint of the same run to resume from.
        cache: the cache of encoded rows; without one they go to a temporary directory.
        lm_head: the chat model's head, for sft_coefficient; it is not trained.

    Returns:
        Steps, seconds, tokens, the counts of the length report, the statistics, and the results on held-out rows,
        overall and for each meta.kind.

    Raises:
        ToolkitError: rows that cannot be trained on.
        StopRequested: a signal ended training early, after writing a checkpoint.
    """
    datasets.disable_progress_bars()
    rows = rows if isinstance(rows, Sequence) else list(rows)
    eval_rows = eval_rows if isinstance(eval_rows, Sequence) else list(eval_rows or ())
    trainer, (_, report, entry) = build_trainer(
        recipe,
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        eval_rows=eval_rows,
        run_dir=run_dir,
        cache=cache,
        lm_head=lm_head,
    )
    max_length = recipe.training.get("max_length", RewardConfig.max_length)
    if trainer.is_world_process_zero():
        print(f"reward: {report.summary(max_length)}", file=sys.stderr)
        print(f"reward: {entry.line('encoded', report.rows)}", file=sys.stderr)
        if resume_from is None:
            append_lines(run_dir / REJECTED, report.rejected)
    output = trainer.train(resume_from)
    scorer = trained_scorer(trainer, tokenizer, max_length)
    stats = score_stats(scorer, random.Random(recipe.seed).sample(rows, min(STATS_ROWS, len(rows))))
    metrics = {
        "steps": output.global_step,
        "seconds": trainer.seconds,
        "tokens": trainer.tokens,
        **report.as_metrics(),
        "reward_stats": stats,
        **judge_rows(lambda conversations: [fmean(heads) for heads in scorer(conversations)], eval_rows),
    }
    trainer.finish(recipe.model.dtype, {REWARD_STATS: stats})
    return metrics


def build_trainer(
    recipe: RewardRecipe,
    *,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    eval_rows: Sequence[Row],
    run_dir: Path,
    cache: RowCache | None = None,
    lm_head: nn.Module | None = None,
) -> tuple[PairTrainer | JudgedTrainer, EncodedRows]:
    """The trainer for the recipe's loss, and the encoded training rows."""
    arguments = reward_config(recipe, run_dir, has_eval=bool(eval_rows))
    fitting: dict[str, Any] = {"max_length": arguments.max_length, "too_long": recipe.format.too_long, "cache": cache}
    arguments.max_length = None  # TRL would drop longer rows silently
    common = {"model": model, "args": arguments, "processing_class": tokenizer, "limits": run_limits(recipe)}
    pairs = [row for row in eval_rows if is_pair(row)]
    judged = [row for row in eval_rows if not is_pair(row)]
    if recipe.loss == "pairwise":
        encoded = encode_pairs(rows, tokenizer, **fitting)
        held_out = encode_pairs(pairs, tokenizer, **fitting).data if pairs else None
        trainer = PairTrainer(
            **common,
            train_dataset=encoded.data,
            eval_dataset=held_out,
            data_collator=PairCollator(_pad_token_id(tokenizer), heads=recipe.heads, seed=recipe.seed),
            auxiliary=Auxiliary(recipe.sft_coefficient, recipe.prefix_coefficient, lm_head),
        )
        return trainer, encoded
    encoded = encode_judged(rows, tokenizer, **fitting)
    held_out = encode_judged(judged, tokenizer, **fitting).data if judged else None
    trainer = JudgedTrainer(
        **common,
        train_dataset=encoded.data,
        eval_dataset=held_out,
        data_collator=JudgedCollator(_pad_token_id(tokenizer), recipe.heads, recipe.seed),
        verdict=verdict_of(rows[0], 1),
    )
    return trainer, encoded


def rehearsal(recipe: RewardRecipe, model: Any, tokenizer: "PreTrainedTokenizerBase", run_dir: Path) -> RunTrainerMixin:
    """The trainer of a run on two toy rows, used to check a recipe."""
    question, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    row = {"prompt": question, "chosen": answer, "rejected": answer}
    if recipe.loss == "pointwise":
        row = {"prompt": question, "completion": answer, "label": True}
    rows = [row] * 2
    held_out = rows if recipe.eval_data else ()
    inputs: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "rows": rows, "eval_rows": held_out}
    if recipe.reads_lm_head:
        inputs["lm_head"] = nn.Linear(model.config.hidden_size, model.config.vocab_size, dtype=model.dtype)
    return build_trainer(recipe, **inputs, run_dir=run_dir)[0]


def run_limits(recipe: RewardRecipe) -> RunLimits:
    """The conditions under which the recipe's run stops early."""
    return RunLimits(recipe.on_nan, recipe.max_seconds, recipe.max_tokens, recipe.early_stopping_patience)


def reward_config(recipe: RewardRecipe, run_dir: Path, has_eval: bool = False) -> RewardConfig:
    """TRL's config: the recipe's `training` plus the fields that the toolkit sets."""
    arguments = training_arguments(
        recipe.training,
        run_dir=run_dir,
        seed=recipe.seed,
        dtype=recipe.model.dtype,
        limits=run_limits(recipe),
        has_eval=has_eval,
    )
    return RewardConfig(**{"center_rewards_coefficient": CENTER_REWARDS, **arguments})


def planned_config(recipe: RewardRecipe) -> RewardConfig:
    """The TRL config that the recipe's run will use."""
    return reward_config(recipe, Path(recipe.output_dir), bool(recipe.eval_data))


def trained_scorer(
    trainer: RunTrainerMixin, tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> HeadScorer:
    """A function that scores conversations with the trainer's model under the conditions of training (autocast, length
    limit)."""

    def scores(conversations: Sequence[tuple[list[Row], list[Row]]]) -> list[list[float]]:
        ids = [answer_ids(prompt, answer, tokenizer, max_length) for prompt, answer in conversations]
        with trainer.accelerator.autocast():
            return score_heads(
                trainer.model,
                ids,
                pad_token_id=_pad_token_id(tokenizer),
                batch_size=2 * trainer.args.per_device_eval_batch_size,
            )

    return scores


def score_stats(scorer: HeadScorer, rows: Sequence[Row]) -> dict[str, Any]:
    """{mean, std, n} of the scores of all answers in these rows, chosen and rejected alike; with several heads, also
    for each head."""
    answers = [(row["prompt"], row[key]) for row in rows for key in ANSWERS if key in row]
    return RewardStats.of(scorer(answers)).as_json()


def judge_rows(scorer: Scorer, rows: Sequence[Row]) -> dict[str, Any]:
    """Those of `pair_accuracy`, `accuracy` and `mse` that apply, with `n`, and the same `by_kind`; empty without
    rows."""
    if not rows:
        return {}
    verdicts = judge(scorer, rows)
    return {**means(verdicts), "by_kind": means_by_kind(rows, verdicts)}


def _pad_token_id(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
