"""All that a stage works on, short of weights: read and checked here for `dsv2 check` and for the run alike.

What a run would refuse is refused here, so that the two cannot differ: check measures what it gets, a run loads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conversations.answers.prompts import prompt_of
from conversations.errors import ToolkitError
from conversations.rendering.conversation import render_conversation
from conversations.rendering.fill_in_the_middle import fim_ids
from conversations.row import Row
from deepseek_v2_modeling import DeepseekV2Config
from deepseek_v2_modeling.loading import ModelSource
from recipes.data.mixing import source_names
from recipes.data.row_store import MixedRows
from recipes.data.sources import Mixture, read_sources
from recipes.data.usable_rows import reasoning_of, refusal_of
from recipes.runs.directory import is_finished
from recipes.runs.foundation import Earlier, Foundation, check_model, check_rewards, find_model, head_of
from recipes.runs.rehearsal import rehearse
from recipes.runs.training_fields import check_model_config, check_training, trl_config
from rl.stage import check_prompts

# A template adds no more tokens to a message than this; a token is a byte of text at least.
_AROUND = 16


@dataclass
class Source:
    """One list of data of a recipe, read. key: where it stands in the recipe. limit: rows that are used of it."""

    key: str
    mixture: Mixture
    limit: int | None = None


@dataclass
class Inputs:
    """What a stage works on. settings: the model's, None where they are not known."""

    foundation: Foundation
    settings: DeepseekV2Config | None
    sources: list[Source] = field(default_factory=list)
    rows: Sequence[Row] = ()
    eval_rows: Sequence[Row] | dict[str, Sequence[Row]] = ()
    rows_by_task: dict[str, Sequence[Row]] = field(default_factory=dict)

    @property
    def source(self) -> ModelSource:
        """The model's files, once they are there."""
        assert self.foundation.source is not None
        return self.foundation.source


def check_recipe(recipe: Any, earlier: Earlier | None = None, ask_hub: bool = False) -> Inputs:
    """Everything of a stage but its data.

    Args:
        earlier: what stages that have not been run yet will give, by their run directories.
        ask_hub: whether a model on a hub is looked up there; without, it is not known.

    Raises:
        ToolkitError, ModelError: a setting, a model or a reward that the run would refuse.
    """
    earlier = earlier or {}
    check_settings(recipe)
    foundation = find_model(recipe.model, earlier, ask_hub)
    settings = check_model(recipe, foundation)
    if recipe.stage == "rl":
        check_rewards(recipe, earlier, ask_hub)
    rehearse(recipe, settings, foundation.tokenizer)
    return Inputs(foundation, settings)


def check_settings(recipe: Any) -> None:
    """What the schema cannot check without torch: `training` and `model.config`."""
    check_model_config(recipe.model.config)
    if recipe.stage != "eval":
        check_training(recipe)


def prepare(recipe: Any, earlier: Earlier | None = None, ask_hub: bool = False) -> Inputs:
    """`check_recipe`, and the data.

    Raises:
        ToolkitError, ModelError: whatever the run would refuse, but for what only tokenizing all rows tells.
    """
    inputs = check_recipe(recipe, earlier, ask_hub)
    tokenizer = inputs.foundation.tokenizer
    entries = (*recipe.data, *getattr(recipe, "eval_data", ()))
    if tokenizer is not None and any(entry.fim for entry in entries):
        fim_ids(tokenizer)
    if recipe.stage == "eval":
        for index, task in enumerate(recipe.tasks):
            key = f"tasks.{index}.data" if task.data else "data"
            mixture = _read(inputs, recipe, task.data or recipe.data, key, task)
            inputs.rows_by_task[task.name] = rows = mixture.rows[: task.limit]
            if task.metric not in ("pair_accuracy", "loss"):
                check_positions(rows, tokenizer, inputs.settings, task.max_new_tokens, f"tasks.{index}.max_new_tokens")
        return inputs
    inputs.rows = _read(inputs, recipe, recipe.data, "data").rows
    if recipe.stage == "rl":
        config = trl_config(recipe)
        check_prompts(config, len(inputs.rows))
        longest = config.max_completion_length
        check_positions(inputs.rows, tokenizer, inputs.settings, longest, "training.max_completion_length")
    elif recipe.eval_data:
        inputs.eval_rows = held_out = _read(inputs, recipe, recipe.eval_data, "eval_data").rows
        if recipe.stage == "sft" and len(recipe.eval_data) > 1:
            names = source_names([entry.path for entry in recipe.eval_data])
            inputs.eval_rows = {name: held_out.of_source(i) for i, name in enumerate(names)}
    return inputs


def will_give(recipe: Any, inputs: Inputs) -> Earlier:
    """What the stage's run directory will hold for later stages; nothing where it holds it already."""
    if is_finished(Path(recipe.output_dir)):
        return {}
    if recipe.stage == "eval":
        return {recipe.output_dir: Foundation(kind=None)}
    settings = inputs.foundation.settings if recipe.lora else inputs.settings
    return {recipe.output_dir: replace(inputs.foundation, source=None, settings=settings, kind=head_of(recipe))}


def _read(inputs: Inputs, recipe: Any, entries: Any, key: str, task: Any = None) -> Mixture:
    mixture = read_sources(entries, recipe.seed, key, refusal_of(recipe, task), reasoning_of(recipe))
    inputs.sources.append(Source(key, mixture, task.limit if task else None))
    return mixture


def check_positions(
    rows: MixedRows | Sequence[Row], tokenizer: Any, settings: DeepseekV2Config | None, answer: int, key: str
) -> None:
    """Raises ToolkitError for a prompt that with an answer of `answer` tokens (`key`) has more than the model's
    positions."""
    if settings is None:
        return
    positions = settings.max_position_embeddings
    for origin, tokens in _long_prompts(rows, tokenizer, positions - answer):
        raise ToolkitError(
            f"{origin}: its prompt of {tokens:,} tokens and an answer of {answer:,} ({key}) are more than the "
            f"{positions:,} positions of the model (max_position_embeddings); lower {key}, or leave the row out"
        )


def _long_prompts(rows: Sequence[Row], tokenizer: Any, room: int) -> Iterator[tuple[str, int]]:
    """(where it stands, its tokens) of every prompt with more than `room`."""
    for number, row in enumerate(rows, 1):
        prompt = prompt_of(row, number)
        if sum(len(message["content"].encode("utf-8", "replace")) + _AROUND for message in prompt) + _AROUND <= room:
            continue
        tokens = len(render_conversation(prompt, tokenizer, add_generation_prompt=True)["input_ids"])
        if tokens > room:
            yield row.get("origin", f"row {number}"), tokens
