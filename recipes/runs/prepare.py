"""Reads and checks everything that a stage works on except weights, for both `dsv2 check` and runs.

Everything that a run would refuse is refused here, so that the two cannot differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conversations.errors import ToolkitError
from conversations.rendering.conversation import render_conversation
from conversations.rendering.fill_in_the_middle import fim_ids
from conversations.rendering.template import answers_without_thought
from conversations.row import Message, Row, conversations_of
from conversations.row_cache import RowCache
from conversations.sections import RowList, StageRecipe, TrainingRecipe
from conversations.stage import provided
from deepseek_v2_modeling import DeepseekV2Config
from deepseek_v2_modeling.loading import ModelSource
from recipes.data.mixing import source_names
from recipes.data.sources import Mixture, read_sources
from recipes.runs.directory import is_finished
from recipes.runs.foundation import Earlier, Foundation, check_model, check_other_models, coming, find_model, head_of
from recipes.runs.rehearsal import rehearse
from recipes.runs.training_fields import check_model_config, check_training, setting
from recipes.stages import stage_of

# Upper bound on the tokens that a template adds to a message. (A token is at least one byte of text.)
_AROUND = 16
# Recipe keys that do not affect which rows are usable; any new key is assumed to.
_NOT_OF_ROWS = {
    *("model", "output_dir", "seed", "on_nan", "lora", "experts_file", "training", "data", "eval_data"),
    *("max_seconds", "max_tokens", "early_stopping_patience", "dynamic_sampling", "rollout", "rollout_correction"),
    "environment",
    "routing_replay",
}


@dataclass(frozen=True)
class ReadList:
    """A data list of a recipe, with its rows read."""

    listed: RowList
    mixture: Mixture

    @property
    def used(self) -> Sequence[Row]:
        """The rows that the stage uses."""
        rows, limit = self.mixture.rows, self.listed.limit
        return rows if limit is None else rows[:limit]

    @property
    def handed(self) -> Sequence[Row] | dict[str, Sequence[Row]]:
        """The rows as the stage gets them: by source name if the sources are kept apart."""
        if not self.listed.apart:
            return self.used
        names = source_names(self.listed.entries)
        return {name: self.mixture.rows.of_source(source) for source, name in enumerate(names)}


@dataclass(frozen=True)
class Inputs:
    """The inputs of a stage. settings: the model's config; None if it is not known. later: keys of data lists that an
    earlier stage has yet to write. notes: what the stage's own check says."""

    foundation: Foundation
    settings: DeepseekV2Config | None
    lists: Sequence[ReadList] = ()
    later: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def source(self) -> ModelSource:
        """The model's files, once they exist."""
        assert self.foundation.source is not None
        return self.foundation.source


def check_recipe(recipe: StageRecipe, earlier: Earlier | None = None, ask_hub: bool = False) -> Inputs:
    """Check everything about a stage except its data.

    Args:
        earlier: what stages that have not run yet will produce, by run directory.
        ask_hub: whether to look up a hub model; otherwise its config is not known.

    Raises:
        ToolkitError, ModelError: a setting or a model that the run would refuse.
    """
    earlier = earlier or {}
    check_settings(recipe)
    foundation = find_model(recipe.model, earlier, ask_hub)
    if recipe.reasoning == "think_tags" and foundation.tokenizer and answers_without_thought(foundation.tokenizer):
        raise ToolkitError(
            "format.reasoning: think_tags writes a thought behind the </think> with which prompts of the model's own "
            "chat template end; use drop"
        )
    settings = check_model(recipe, foundation)
    check_other_models(recipe, earlier, ask_hub)
    rehearse(recipe, settings, foundation.tokenizer)
    return Inputs(foundation, settings)


def check_settings(recipe: StageRecipe) -> None:
    """Check what the schema cannot check without torch: `training` and `model.config`."""
    check_model_config(recipe.model.config)
    if isinstance(recipe, TrainingRecipe):
        check_training(recipe)


def prepare(
    recipe: StageRecipe, earlier: Earlier | None = None, ask_hub: bool = False, cache: RowCache | None = None
) -> Inputs:
    """`check_recipe`, then read the data; `cache` holds prepared rows.

    Raises:
        ToolkitError, ModelError: anything the run would refuse, except what only tokenizing all rows can show.
    """
    inputs = check_recipe(recipe, earlier, ask_hub)
    lists, tokenizer = recipe.row_lists(), inputs.foundation.tokenizer
    notes: Sequence[str] = ()
    if check_more := stage_of(recipe).check:
        positions = inputs.settings and inputs.settings.max_position_embeddings
        notes = provided(check_more)(recipe, tokenizer, positions, lambda path: coming(path, earlier or {}) is not None)
    if tokenizer is not None and any(entry.fim for listed in lists for entry in listed.entries):
        fim_ids(tokenizer)
    read_lists, later = [], []
    for listed in lists:
        if any(coming(entry.path, earlier or {}) for entry in listed.entries):
            later.append(listed.key)
            continue
        read_lists.append(read_list(recipe, listed, cache))
        if check := stage_of(recipe).check_rows:
            provided(check)(recipe, listed.name, read_lists[-1].mixture.rows)
        if listed.answer is not None:
            longest = value_of(recipe, listed.answer)
            check_positions(read_lists[-1], tokenizer, inputs.settings, longest)
        if listed.read_whole:
            check_conversations(read_lists[-1], tokenizer, inputs.settings)
    return replace(inputs, lists=read_lists, later=later, notes=notes)


def read_list(recipe: StageRecipe, listed: RowList, cache: RowCache | None) -> ReadList:
    """Read the rows of a data list. Raises ToolkitError for a missing file or an unreadable row."""
    refuses_by = {**recipe.model_dump(mode="json", exclude=_NOT_OF_ROWS), "list": listed.name}
    key, refuse = listed.key, listed.refuse
    return ReadList(listed, read_sources(listed.entries, recipe.seed, key, refuse, recipe.reasoning, cache, refuses_by))


def value_of(recipe: StageRecipe, key: str) -> Any:
    """The value of a recipe key, such as tasks.0.limit; keys left out of `training` have TRL's default."""
    section, _, name = key.partition(".")
    if section == "training" and isinstance(recipe, TrainingRecipe):
        return setting(recipe, name)
    value: Any = recipe
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else getattr(value, part)
    return value


def will_give(recipe: StageRecipe, inputs: Inputs) -> Earlier:
    """What the stage's run directory will hold for later stages; empty if it is already there."""
    if is_finished(recipe):
        return {}
    if not isinstance(recipe, TrainingRecipe):
        return {recipe.output_dir: Foundation(kind=None)}
    settings = inputs.foundation.settings if recipe.lora else inputs.settings
    return {recipe.output_dir: replace(inputs.foundation, source=None, settings=settings, kind=head_of(recipe))}


def check_positions(read: ReadList, tokenizer: Any, settings: DeepseekV2Config | None, answer: int) -> None:
    """Raise ToolkitError for a prompt that, with an answer of `answer` tokens, exceeds the model's positions."""
    if settings is None:
        return
    positions, key = settings.max_position_embeddings, read.listed.answer
    for origin, tokens in _long_prompts(read, tokenizer, positions - answer):
        raise ToolkitError(
            f"{origin}: its prompt of {tokens:,} tokens and an answer of {answer:,} ({key}) are more than the "
            f"{positions:,} positions of the model (max_position_embeddings); lower {key}, or leave the row out"
        )


def check_conversations(read: ReadList, tokenizer: Any, settings: DeepseekV2Config | None) -> None:
    """Raise ToolkitError for a conversation that exceeds the model's positions."""
    if settings is None:
        return
    positions = settings.max_position_embeddings
    for number, row in enumerate(read.used, 1):
        for conversation in conversations_of(row):
            if tokens := _tokens_beyond(positions, conversation, tokenizer, answered=False):
                raise ToolkitError(
                    f"{_origin(row, number)}: its conversation of {tokens:,} tokens is more than the {positions:,} "
                    "positions of the model (max_position_embeddings); shorten it, or leave the row out"
                )


def _long_prompts(read: ReadList, tokenizer: Any, room: int) -> Iterator[tuple[str, int]]:
    """Yield (origin, token count) of every prompt of more than `room` tokens."""
    for number, row in enumerate(read.used, 1):
        if tokens := _tokens_beyond(room, read.listed.prompt(row, number), tokenizer, answered=True):
            yield _origin(row, number), tokens


def _origin(row: Row, number: int) -> str:
    return row.get("origin", f"row {number}")


def _tokens_beyond(room: int, messages: Sequence[Message], tokenizer: Any, answered: bool) -> int:
    """The tokens of a conversation, if they are more than `room`, else 0. Most need not be encoded to know that.

    answered: whether an answer to it follows.
    """
    if sum(len(message["content"].encode("utf-8", "replace")) + _AROUND for message in messages) + _AROUND <= room:
        return 0
    tokens = len(render_conversation(messages, tokenizer, add_generation_prompt=answered)["input_ids"])
    return tokens if tokens > room else 0
