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

SMOKE_TRAINING = {  # for every stage that trains
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "no",
}


class Shrink(NamedTuple):
    """The values that `--smoke` sets in a section of the recipe ("" is the recipe itself), or in each entry of a list:
    only in entries that have the key `where`, if it names one. A value may be a function of the section."""

    section: str
    values: Mapping[str, Any]
    where: str = ""


@dataclass(frozen=True)
class Training:
    """How a stage trains, with a config and a trainer from TRL.

    Args:
        config: the TRL config class that receives the recipe's `training`; "module:class" if trl does not export it.
        head: the head of the trained model; a chat model used where a scoring model is needed gets a new head.
        planned_config: (recipe) -> the TRL config, as the stage creates it.
        rehearsal: (recipe, model, tokenizer, run_dir) -> the stage's trainer on two rows, for a trial step.
        rehearsal_training: values of `training` that keep the trial step small, in addition to a batch of 1.
        row_uses: config fields whose product is how often a row is used per epoch.
        evaluated: held-out metrics that can select the best checkpoint; empty if they are not known in advance.
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
        name: the name of its package, of its command, and of `stage` in its recipes.
        help: its line in `dsv2 --help`.
        title: what a report calls its runs.
        run: (recipe, Work) -> metrics, a dict stored in the manifest.
        training: how it trains; None for a stage that loads its model frozen.
        encode: (recipe, tokenizer, max_length) -> conversations.rendering.fitting.Encode, which encodes a row for the
            stage; None if rows are prompts.
        check: (recipe, tokenizer, positions, is_coming) -> lines for the user; raises ToolkitError for what a run would
            refuse of what it reads besides `data` and models. The tokenizer and the model's positions are None if not
            known; is_coming says of a path whether an earlier stage of a chain has yet to write it.
        check_rows: (recipe, name of the list, rows) -> None; raises ToolkitError if the rows of a list are unusable as
            a whole.
        marks_tokens: whether a mask selects the tokens of a row that are trained.
        result: what a finished run holds: a model in final/, or a file.
        measures: whether its metrics are per task, {task: {"n": rows, ...}}, for results.json and for tables.
        continues: the JSONL file from which a run without checkpoints resumes; None if it starts over.
        writes: other files of a run that a report reads.
        signs: logged metrics that only this stage has; they identify a run without its recipe.
        smoke: how `--smoke` shrinks its recipes.
        methods: variants of the stage by the recipe's `method`.
    """

    name: str
    recipe: type[StageRecipe]
    help: str
    title: str
    run: str
    training: Training | None = None
    encode: str | None = None
    check: str | None = None
    check_rows: str | None = None
    marks_tokens: bool = False
    result: str = FINAL
    measures: bool = False
    continues: str | None = None
    writes: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    smoke: tuple[Shrink, ...] = ()
    methods: Mapping[str, "Stage"] = field(default_factory=dict)


@dataclass(frozen=True)
class OtherModel:
    """A frozen model that a stage uses besides its own. stats: of its scores, if the recipe needs them. device: where
    it runs; None is the device of the stage."""

    name: str
    model: Any
    tokenizer: Any
    stats: RewardStats | None = None
    device: str | None = None


@dataclass(frozen=True)
class Work:
    """What a stage works on.

    Args:
        rows: canonical rows by the name of their list; for a list whose sources are used separately, a mapping from the
            source's name to its rows.
        others: other models by their keys in the recipe.
        lm_head: the frozen LM head, if the recipe reads it.
        cache: the cache of encoded rows.
        resume: whether the run was started before.
        resume_from: its newest checkpoint; None if there is none.
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
    """The function named by text such as "sft.stage:run"; imports its module."""
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)
