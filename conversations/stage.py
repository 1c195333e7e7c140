"""The interface of a stage: plain data, with functions given by name so that nothing is imported. No torch.

Each stage's config.py defines one record, STAGE. A function is written as "module:function".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from conversations.answers.reward_stats import RewardStats
from conversations.row_cache import RowCache
from conversations.run_files import FINAL
from conversations.sections import Head, StageRecipe

SMOKE_TRAINING = {  # of every stage that trains
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "no",
}


class Shrink(NamedTuple):
    """What `--smoke` writes into a section of the recipe ("" is the recipe itself), or into each entry of a list: of
    those with the key `where`, if it names one."""

    section: str
    values: Mapping[str, Any]
    where: str = ""


@dataclass(frozen=True)
class Training:
    """How a stage trains, with a config and a trainer from TRL.

    Args:
        config: the class of TRL that the recipe's `training` feeds.
        head: that of the model it trains; a chat model in the place of a scoring one gets a new head.
        planned_config: (recipe) -> the TRL config, as the stage makes it.
        rehearsal: (recipe, model, tokenizer, run_dir) -> the stage's trainer on two rows, to be tried for one step.
        rehearsal_training: values of `training` that make the step small, beside a batch of 1.
        row_uses: fields of the config by which the uses of a row in one epoch multiply.
        evaluated: held-out figures that can choose the best checkpoint; empty where they are not known beforehand.
    """

    config: str
    planned_config: str
    rehearsal: str
    head: Head = "causal_lm"
    rehearsal_training: Mapping[str, Any] = field(default_factory=dict)
    row_uses: tuple[str, ...] = ()
    evaluated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A stage.

    Args:
        name: of its folder, of its command, and of `stage` in its recipes.
        help: its line in `dsv2 --help`.
        title: what a report calls its runs.
        run: (recipe, Work) -> metrics, a dict that goes to the manifest.
        training: how it trains; None for a stage that loads its model frozen.
        encode: (recipe, tokenizer, max_length) -> conversations.rendering.fitting.Encode, what the stage makes of a
            row; None where rows are prompts.
        check_rows: (recipe, rows) -> None; raises ToolkitError if the rows of `data` are unusable as a whole.
        marks_tokens: whether single tokens of a row count or not, by its mask.
        result: what a finished run holds: a model in final/, or a file.
        measures: whether its metrics are figures of tasks, {task: {"n": rows, ...}}, for results.json and for tables.
        continues: the file of lines from which a run without checkpoints resumes; None where it starts over.
        writes: what else a run writes that a report looks for.
        signs: logged figures that only its runs have, should a run be without its recipe.
        smoke: how `--smoke` shrinks its recipes.
    """

    name: str
    recipe: type[StageRecipe]
    help: str
    title: str
    run: str
    training: Training | None = None
    encode: str | None = None
    check_rows: str | None = None
    marks_tokens: bool = False
    result: str = FINAL
    measures: bool = False
    continues: str | None = None
    writes: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    smoke: tuple[Shrink, ...] = ()


@dataclass(frozen=True)
class OtherModel:
    """A model that a stage uses beside its own, frozen. stats: of its scores, where the recipe asks for them."""

    name: str
    model: Any
    tokenizer: Any
    stats: RewardStats | None = None


@dataclass(frozen=True)
class Work:
    """What a stage works on.

    rows: canonical rows by the name of their list; of a list whose sources go apart, by the source's name in turn.
    others: by their keys in the recipe. lm_head: frozen, where the recipe reads it. cache: of encoded rows. resume:
    whether the run has begun before; resume_from: its newest checkpoint.
    """

    model: Any
    tokenizer: Any
    run_dir: Path
    rows: Mapping[str, Any]
    others: Mapping[str, OtherModel] = field(default_factory=dict)
    lm_head: Any = None
    cache: RowCache = field(default_factory=RowCache)
    resume: bool = False
    resume_from: Path | None = None


def provided(function: str) -> Any:
    """The function of a name such as "sft.stage:run"; its module is loaded."""
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)
