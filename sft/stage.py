"""Supervised fine-tuning with TRL's SFTTrainer, our rendering and masks, and our model's balance losses."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from trl.trainer.sft_config import SFTConfig

from conversations.generation.probes import SAMPLE_TOKENS, SAMPLES
from conversations.rendering.encoded import EncodedRows
from conversations.row import Row
from conversations.row_cache import RowCache
from conversations.run_files import REJECTED
from conversations.stage import Work
from deepseek_v2_modeling.training import RunLimits, append_lines, training_arguments
from sft.config import SftRecipe
from sft.data import check_row, encode_rows
from sft.trainer import ChatTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(recipe: SftRecipe, work: Work) -> dict[str, Any]:
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
    )


def train(
    recipe: SftRecipe,
    *,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Row],
    eval_rows: Iterable[Row] | Mapping[str, Iterable[Row]] | None,
    run_dir: Path,
    resume_from: Path | None,
    cache: RowCache | None = None,
) -> dict[str, Any]:
    """Train `model` on conversations; writes metrics.jsonl, samples.jsonl, checkpoints and final/ into `run_dir`.

    Args:
        rows: canonical rows with `messages` or `text`.
        eval_rows: held-out rows of the same form, for `eval_loss` and the prompts of the samples. A mapping of several
            named sources also gives an `eval_NAME_loss` for each.
        resume_from: a checkpoint of the same run to resume from.
        cache: the cache of encoded rows; without one they go to a temporary directory.

    Returns:
        Steps, seconds, tokens, the counts of the length report, and the held-out losses (nats per token) of final/ if
        there are eval_rows.

    Raises:
        ToolkitError: rows that cannot be trained on.
        ModelError: a non-finite loss, a full disk, or an unknown metric for the best model.
        StopRequested: a signal ended training early, after writing a checkpoint.
    """
    trainer, encoded = build_trainer(
        recipe, model=model, tokenizer=tokenizer, rows=rows, eval_rows=eval_rows, run_dir=run_dir, cache=cache
    )
    if trainer.is_world_process_zero():
        max_length = recipe.training.get("max_length", SFTConfig.max_length)
        _report_rows(encoded, max_length, None if resume_from else run_dir / REJECTED)
    output = trainer.train(resume_from)
    totals = {"steps": output.global_step, "seconds": trainer.seconds, "tokens": trainer.tokens}
    metrics: dict[str, Any] = {**totals, **encoded[""].report.as_metrics()}
    if trainer.eval_dataset is not None:
        metrics |= trainer.held_out_losses()
    trainer.write_samples("after")
    trainer.finish(recipe.model.dtype)
    return metrics


def build_trainer(
    recipe: SftRecipe,
    *,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Row],
    eval_rows: Iterable[Row] | Mapping[str, Iterable[Row]] | None,
    run_dir: Path,
    cache: RowCache | None = None,
) -> tuple[ChatTrainer, dict[str, EncodedRows]]:
    """The trainer that `train` runs, and the encoded rows: "" -> the training rows, and one entry per held-out
    source."""
    datasets.disable_progress_bars()
    first, rows = _peek(rows)
    sources: Any = eval_rows if isinstance(eval_rows, Mapping) else {"": eval_rows or ()}
    peeked = {name: _peek(source) for name, source in sources.items()}
    probes = [row for group in zip_longest(*(shown for shown, _ in peeked.values())) for row in group if row]
    arguments = sft_config(recipe, run_dir, has_eval=bool(probes))
    max_length = arguments.max_length
    encode = partial(
        encode_rows, tokenizer=tokenizer, train_on=recipe.format.train_on, max_length=max_length,
        too_long=recipe.format.too_long, cache=cache,
    )  # fmt: skip
    encoded = encode(rows)
    held_out = {name: encode(source) for name, (shown, source) in peeked.items() if shown}
    if arguments.padding_free and not arguments.packing:
        arguments.max_length = None  # the rows are already within max_length, but TRL would check again
    trainer = ChatTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded.data,
        eval_dataset=_datasets(held_out),
        processing_class=tokenizer,
        limits=run_limits(recipe),
        probes=probes[:SAMPLES] or first,
        sample_tokens=SAMPLE_TOKENS,
    )
    return trainer, {"": encoded, **{f"eval_data {name}".strip(): source for name, source in held_out.items()}}


def rehearsal(recipe: SftRecipe, model: Any, tokenizer: "PreTrainedTokenizerBase", run_dir: Path) -> ChatTrainer:
    """The trainer of a run on two toy rows, used to check a recipe. The rows have no prompts, so no samples are
    written."""
    rows = [{"text": "a b"}] * 2
    held_out = rows if recipe.eval_data else ()
    inputs: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "rows": rows, "eval_rows": held_out}
    return build_trainer(recipe, **inputs, run_dir=run_dir)[0]


def run_limits(recipe: SftRecipe) -> RunLimits:
    """The conditions under which the recipe's run stops early."""
    return RunLimits(recipe.on_nan, recipe.max_seconds, recipe.max_tokens, recipe.early_stopping_patience)


def leaves_padding_out(recipe: SftRecipe, arguments: Mapping[str, Any]) -> bool:
    """Whether to concatenate the rows of a batch instead of padding them to the longest, if the recipe does not say.

    The loss and gradients are the same. On a CPU, padding takes as much time as tokens; `sdpa` attends to rows of
    different lengths without a mask of all pairs of tokens, other implementations do not.
    """
    others = ("packing", "torch_compile", "neftune_noise_alpha")  # the noise depends on the lengths of rows
    if not arguments["use_cpu"] or "padding_free" in arguments or any(arguments.get(name) for name in others):
        return False
    several = arguments.get("per_device_train_batch_size", SFTConfig.per_device_train_batch_size) > 1
    return several and recipe.model.attn_implementation in (None, "sdpa")


def sft_config(recipe: SftRecipe, run_dir: Path, has_eval: bool = False) -> SFTConfig:
    """TRL's config: the recipe's `training` plus the fields that the toolkit sets. TRL only packs rows; it does not
    tokenize."""
    arguments = training_arguments(
        recipe.training,
        run_dir=run_dir,
        seed=recipe.seed,
        dtype=recipe.model.dtype,
        limits=run_limits(recipe),
        has_eval=has_eval,
    )
    if leaves_padding_out(recipe, arguments):
        arguments["padding_free"] = True
    return SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": not arguments.get("packing")})


def planned_config(recipe: SftRecipe) -> SFTConfig:
    """The TRL config that the recipe's run will use."""
    return sft_config(recipe, Path(recipe.output_dir), bool(recipe.eval_data))


def _datasets(held_out: Mapping[str, EncodedRows]) -> Any:
    """None, one data set, or several by name, as the Trainer expects them."""
    by_name = {name: encoded.data for name, encoded in held_out.items()}
    return by_name.get("", by_name or None)


def _report_rows(encoded: Mapping[str, EncodedRows], max_length: int | None, rejected: Path | None) -> None:
    """Print the length reports (of held-out rows only if any were changed or left out) and whether the encoded rows
    came from the cache; append rejected rows to the file `rejected`."""
    for name, (_, report, entry) in encoded.items():
        label = f"sft: {name}{': ' if name else ''}"
        if not name or report.truncated or report.split or report.rejected:
            print(f"{label}{report.summary(max_length)}", file=sys.stderr)
        print(f"{label}{entry.line('encoded', report.rows)}", file=sys.stderr)
        if rejected is not None:
            append_lines(rejected, report.rejected)


def _peek(rows: Iterable[Row]) -> tuple[list[Row], Iterable[Row]]:
    """The first few rows, and an iterable of all rows."""
    if not isinstance(rows, Sequence):
        iterator = iter(rows)
        first = list(islice(iterator, SAMPLES))
        rows = chain(first, iterator)
    else:
        first = list(rows[:SAMPLES])
    for number, row in enumerate(first, 1):
        check_row(row, number)
    return first, rows
