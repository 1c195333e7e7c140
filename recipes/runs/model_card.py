"""Model cards: the README.md of a model, with the hub's YAML head, filled from the run that trained it.

Nothing is guessed: a licence is only what someone gave, a base model or a data set only what has a name on the hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conversations.errors import ToolkitError
from conversations.run_files import CHECKPOINT, FINAL
from recipes.files import write_text
from recipes.processes import say
from recipes.runs.card_parts import (
    code_span,
    eval_results_of,
    hub_datasets,
    on_hub,
    purpose_of,
    shareable,
    shown_evaluation,
    shown_run,
    tags_of,
)
from recipes.runs.lineage import RunRecord, evaluations_of, lineage, run_of

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
_TEMPLATE = Path(__file__).parents[1] / "templates" / "model_card.md.jinja"


def card_text(
    path: str | Path,
    *,
    name: str,
    adapter: bool,
    base: str,
    scores: bool = False,
    license: str | None = None,
    warnings: Iterable[str] = (),
) -> str:
    """The card of a model that comes from `path`: a run, its final/ or a checkpoint, or any other model directory.

    Args:
        name: what the card calls the model.
        adapter: whether the card is for an adapter, and not for a full model.
        base: the model that `path` is or that it is an adapter on. The card of a full model names the one that the
            first run started from, if there are runs.
        scores: whether it is a reward model.
        license: as the hub names licences; None for that of the card beside `path`, if there is one.
        warnings: what other programs compute differently.
    """
    from huggingface_hub import ModelCard, ModelCardData

    origin, runs = lineage(path)
    measured = evaluations_of(runs[-1].directory) if runs and CHECKPOINT not in Path(path).name else []
    if base and (adapter or not runs):
        origin = base
    data = ModelCardData(
        base_model=origin if on_hub(origin) else None,
        base_model_relation=("adapter" if adapter else "finetune") if on_hub(origin) else None,
        datasets=hub_datasets(runs) or None,
        library_name="peft" if adapter else "transformers",
        license=license or card_license(Path(path)),
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=tags_of(runs, adapter, scores),
        model_name=name,
        eval_results=[result for run in measured for result in eval_results_of(run)] or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=_trimmed(_TEMPLATE.read_text(encoding="utf-8")),
        model_name=name,
        what=purpose_of(runs, adapter, scores),
        base=code_span(shareable(origin)) if origin != str(path) else "",
        auto_class="AutoPeftModelForSequenceClassification" if scores else "AutoPeftModelForCausalLM",
        scores=scores,
        runs=[shown_run(run) for run in runs],
        evaluations=[shown_evaluation(run) for run in measured],
        limits=_limits(data, runs, measured, warnings),
    )
    return str(card)


def card_license(path: Path) -> str | None:
    """The licence in the head of the card that a model has already, such as one that its author added."""
    from huggingface_hub import ModelCard

    for file in (path / CARD, path / FINAL / CARD):
        if file.is_file():
            try:
                stated = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
            except (OSError, ValueError) as error:
                raise ToolkitError(
                    f"{file}: its head is not a model card's ({error}); correct it, or remove it"
                ) from error
            return stated if isinstance(stated, str) else None
    return None


def write_card(run_dir: Path) -> None:
    """Write the card into a run's final/, or write it anew when an evaluation has been added.

    A directory that cannot be written to keeps what it has, which is said.
    """
    from deepseek_v2_modeling.loading import resolve_source, stock_differences
    from recipes.runs.foundation import kind_of

    final = run_dir / FINAL
    source = resolve_source(final)
    text = card_text(
        run_dir,
        name=run_dir.name,
        adapter=source.adapter is not None,
        base=source.base,
        scores=kind_of(source) == "score",
        warnings=stock_differences(source.settings),
    )
    try:
        write_text(final / CARD, text)
    except OSError as error:
        say(f"{final / CARD}: the model card was not written ({error.strerror})")


def renew_card(path: str) -> None:
    """After an evaluation: write the card of the evaluated model anew, if it is the result of a run."""
    run = run_of(path)
    if run is not None and CHECKPOINT not in Path(path).name and (run.directory / FINAL / CARD).is_file():
        write_card(run.directory)


def _limits(
    data: ModelCardData, runs: Sequence[RunRecord], measured: Sequence[RunRecord], warnings: Iterable[str]
) -> list[str]:
    known = "the data and the figures above" if measured else "the data above"
    limits = [f"All that is known of its behaviour is {known}; other uses were not tried."] if runs else []
    if not measured:
        limits.append("It was not evaluated, or its evaluations are not beside the run.")
    if data.license is None:
        limits.append("No licence is stated: add `license:` to the head of this file, as the base and the data allow.")
    return [*limits, *(f"{text}; load it with deepseek_v2_modeling." for text in warnings)]


def _trimmed(template: str) -> str:
    """The template with tags on lines of their own leaving no line behind (ModelCard has no setting for it)."""
    return "".join(line.rstrip() if line.startswith("{%") else f"{line}\n" for line in template.splitlines())
