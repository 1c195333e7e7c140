"""Training on preferences, without sampling: DPO, IPO, KTO, SimPO and ORPO."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from conversations.answers.prompts import prompt_text
from conversations.generation.probes import SAMPLE_TOKENS, SAMPLES, Probe
from conversations.rendering.encoded import EncodedRows
from conversations.row import MARGIN, Row
from conversations.row_cache import RowCache
from conversations.run_files import REJECTED
from conversations.stage import Work
from deepseek_v2_modeling.training import RunLimits, append_lines, training_arguments
from rl.config import RlRecipe
from rl.preferences.data import PairCollator, SingleCollator, encode_preferences
from rl.preferences.methods import METHODS
from rl.preferences.trainer import TRAINERS, PreferenceMixin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGED_AT_END = ("loss", "rewards/margins", "rewards/accuracies", "kl")


def run(recipe: RlRecipe, work: Work) -> dict[str, Any]:
    """Run `train` with the data and models that `dsv2` has loaded."""
    return train(
        recipe,
        model=work.model,
        tokenizer=work.tokenizer,
        rows=work.rows["data"],
        eval_rows=work.rows.get("eval_data"),
        run_dir=work.run_dir,
        resume_from=work.resume_from,
        cache=work.cache,
    )


def train(
    recipe: RlRecipe,
    *,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Row],
    eval_rows: Iterable[Row] | None,
    run_dir: Path,
    resume_from: Path | None,
    cache: RowCache | None = None,
) -> dict[str, Any]:
    """Train `model` on preferences by the recipe's method; writes metrics.jsonl, samples.jsonl, checkpoints and final/
    to `run_dir`.

    Args:
        rows: pairs; for kto labelled answers too.
        eval_rows: held-out rows of the same kinds. Their prompts, without them those of rows, are answered before and
            after training.
        resume_from: a checkpoint of the same run to resume from.
        cache: of encoded rows and of the reference's log-probabilities.

    Returns:
        steps, seconds, what became of the rows, and the last logged loss and rewards, held-out ones included.

    Raises:
        ToolkitError: rows that cannot be trained on.
        StopRequested: a signal ended training early, with a checkpoint.
    """
    rows, eval_rows = (x if isinstance(x, Sequence) else list(x) for x in (rows, eval_rows or ()))
    given: dict[str, Any] = {"rows": rows, "eval_rows": eval_rows, "run_dir": run_dir, "cache": cache}
    probes = probes_of(eval_rows or rows)
    trainer, (_, report, entry) = build_trainer(recipe, model=model, tokenizer=tokenizer, probes=probes, **given)
    if trainer.is_world_process_zero():
        limit = trainer.args.max_length
        print(f"rl: {recipe.method}: {report.summary(limit)}", file=sys.stderr)
        print(f"rl: {entry.line('encoded', report.rows)}", file=sys.stderr)
        if any(MARGIN in row for row in rows[:1]):
            print(f"rl: the pairs' margins play no part in {recipe.method}", file=sys.stderr)
        if resume_from is None:
            append_lines(run_dir / REJECTED, report.rejected)
    output = trainer.train(resume_from)
    trainer.write_samples("after")
    trainer.finish(recipe.model.dtype)
    counted = {"steps": output.global_step, "seconds": trainer.seconds, "tokens": trainer.tokens}
    return {**counted, **report.as_metrics(), **last_logged(trainer.state.log_history)}


def _in_turn(rows: datasets.Dataset) -> datasets.Dataset:
    """Good and bad answers in turn, those of pairs beside the other answer to another prompt: KTO's KL needs other
    prompts, and its figures are means of batches, which say little where a batch has one kind alone."""
    good, bad = (
        [number for number, label in enumerate(rows["label"]) if bool(label) is kind] for kind in (True, False)
    )
    order = zip_longest(good, bad[-1:] + bad[:-1])
    return rows.select([number for two in order for number in two if number is not None]).flatten_indices()


def build_trainer(
    recipe: RlRecipe,
    *,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Row],
    eval_rows: Iterable[Row] | None,
    run_dir: Path,
    cache: RowCache | None = None,
    probes: Sequence[Probe] = (),
) -> tuple[PreferenceMixin, EncodedRows]:
    """The trainer of `train`, and the rows that it trains on."""
    datasets.disable_progress_bars()
    method = METHODS[recipe.method]
    eval_rows = eval_rows or ()
    arguments = preference_config(recipe, run_dir, has_eval=bool(eval_rows))
    fitting: dict[str, Any] = {
        "single": method.single, "max_length": arguments.max_length, "too_long": recipe.format.too_long, "cache": cache,
    }  # fmt: skip
    encoded = encode_preferences(rows, tokenizer, **fitting)
    held_out = encode_preferences(eval_rows, tokenizer, **fitting).data if eval_rows else None
    data, pad = encoded.data, _pad_token_id(tokenizer)
    if method.single:  # its batches stay in this order, and should not hold both answers to a prompt
        data = data.shuffle(recipe.seed).flatten_indices()
        held_out = _in_turn(held_out) if held_out else None
    collator = SingleCollator(pad, arguments.max_length) if method.single else PairCollator(pad)
    trainer = TRAINERS[recipe.method](
        model,
        arguments,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=collator,
        limits=run_limits(recipe),
        cache=cache,
        probes=probes,
        sample_tokens=SAMPLE_TOKENS,
    )
    return trainer, encoded


def probes_of(rows: Iterable[Row]) -> list[Probe]:
    """The first different prompts, each with its chosen or good answer, if there is one."""
    found: dict[str, Probe] = {}
    for row in rows:
        good = row.get("chosen") or (row.get("completion") if row.get("label") else None)
        found.setdefault(prompt_text(row["prompt"]), (row["prompt"], good[0]["content"] if good else None))
        if len(found) == SAMPLES:
            break
    return list(found.values())


def rehearsal(recipe: RlRecipe, model: Any, tokenizer: "PreTrainedTokenizerBase", run_dir: Path) -> PreferenceMixin:
    """The trainer for a toy run."""
    question, good, bad = ([{"role": role, "content": text}] for role, text in _TOY)
    rows = [{"prompt": question, "chosen": good, "rejected": bad}] * 2
    held_out = rows if recipe.eval_data else ()
    given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "rows": rows, "eval_rows": held_out}
    return build_trainer(recipe, **given, run_dir=run_dir)[0]


_TOY = (("user", "a"), ("assistant", "b"), ("assistant", "c"))


def run_limits(recipe: RlRecipe) -> RunLimits:
    """When the recipe's run ends early."""
    return RunLimits(recipe.on_nan, recipe.max_seconds, recipe.max_tokens, recipe.early_stopping_patience)


def preference_config(recipe: RlRecipe, run_dir: Path, has_eval: bool = False) -> Any:
    """TRL's config of the method: the recipe's `training` and the fields that the method and the toolkit set."""
    method = METHODS[recipe.method]
    module, _, name = method.config.rpartition(":")
    cls = getattr(import_module(module or "trl"), name)
    arguments = training_arguments(
        method.settings(recipe.training),
        run_dir=run_dir,
        seed=recipe.seed,
        dtype=recipe.model.dtype,
        limits=run_limits(recipe),
        has_eval=has_eval,
    )
    known = {field.name for field in fields(cls)}
    return cls(**{key: value for key, value in arguments.items() if key in known or key in recipe.training})


def planned_config(recipe: RlRecipe) -> Any:
    """The config of the recipe's own run."""
    return preference_config(recipe, Path(recipe.output_dir), bool(recipe.eval_data))


def last_logged(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last logged value of each metric that summarizes the run, held-out ones included."""
    last: dict[str, float] = {}
    for line in history:
        last |= {key: line[key] for key in line if key.removeprefix("eval_") in LOGGED_AT_END}
    return last


def _pad_token_id(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
