"""The recipe schema: chains, validation for every stage, and error messages that name the wrong key. No torch."""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from conversations.errors import ToolkitError
from conversations.sections import AttentionName, Section, StageRecipe
from recipes.stages import stages

NAME = r"^[a-z][a-z0-9_]*$"
_RESULTS = {"seed", "stages", "reward_models", "seconds", "peak_memory_gb"}  # other keys of results.json


class ChainModel(Section):
    """The model that a chain starts from: the default `model` of every stage. Fields left out come from its recipe."""

    path: str | None = Field(default=None, min_length=1, description="A model directory, run, or hub name.")
    preset: str | None = Field(default=None, description="Preset that makes the model when `path` does not exist.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(default=None, description="As in a stage's recipe.")
    attn_implementation: AttentionName | None = Field(default=None, description="As in a stage's recipe.")
    config: dict[str, Any] | None = Field(default=None, description="As in a stage's recipe.")


class ChainStage(Section):
    """One stage of a chain: any additional key overrides that key of its recipe (mappings are merged)."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = Field(pattern=NAME, description="Name of the stage and of its directory.")
    recipe: str = Field(min_length=1, description="The stage's recipe, relative to the chain's file, or a name.")
    results: str | None = Field(
        default=None,
        pattern=r"^(stages|reward_models)\.[a-z][a-z0-9_]*$",
        description="An evaluation: where in results.json its figures go, such as stages.sft.",
    )
    title: str | None = Field(
        default=None, min_length=1, description="What tables and reports call it; by default its name."
    )

    @property
    def overrides(self) -> dict[str, Any]:
        """The keys that override the stage's recipe."""
        return dict(self.model_extra or {})


ENTRY_KEYS = frozenset(ChainStage.model_fields)  # keys of a chain's entry itself, not overrides of its recipe


class Comparison(Section):
    """Two evaluations of the same prompts, compared prompt by prompt."""

    name: str = Field(pattern=NAME, description="Name of the comparison in results.json.")
    before: str = Field(pattern=NAME, description="Chain stage: the earlier evaluation.")
    after: str = Field(pattern=NAME, description="Chain stage: the later evaluation.")
    task: str = Field(pattern=NAME, description="Task that both have.")
    title: str | None = Field(
        default=None, min_length=1, description="What tables and reports call it; by default its name."
    )


class ChainRecipe(Section):
    """Stages in order. `${model}` is the model's path, `${NAME}` the run directory of an earlier stage,
    `${NAME.tokens}` how many tokens it trained on."""

    stage: Literal["chain"] = Field(description="Which stage this is.")
    model: ChainModel = Field(default_factory=lambda: ChainModel(), description="The model the chain begins with.")
    stages: list[ChainStage] = Field(min_length=1, description="What to run, in order.")
    compare: list[Comparison] = Field(default_factory=list, description="Paired comparisons for the results.")
    task_titles: dict[str, str] = Field(
        default_factory=dict, description="What tables call the tasks of evaluations, in the order of their columns."
    )
    output_dir: str = Field(min_length=1, description="Holds the stages' run directories and results.json.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of every stage that does not set its own.")
    on_nan: Literal["stop", "skip"] | None = Field(default=None, description="As in a stage's recipe, for every stage.")

    @model_validator(mode="after")
    def _names(self) -> "ChainRecipe":
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stages share a name: {', '.join(twice)}")
        reserved = {"model", "output_dir", "seed"}.intersection(names)
        if reserved:
            raise ValueError(f'a stage may not be called "{reserved.pop()}"')
        compared = [comparison.name for comparison in self.compare]
        if twice := sorted({name for name in compared if compared.count(name) > 1 or name in _RESULTS}):
            raise ValueError(f'compare: "{twice[0]}" is already a key of results.json; rename it')
        for comparison in self.compare:
            for name in (comparison.before, comparison.after):
                if name not in names:
                    raise ValueError(f'compare.{comparison.name} names no stage of this chain: "{name}"')
        return self


CHAIN = "chain"
Recipe = StageRecipe | ChainRecipe


def validate(tree: dict[str, Any], prefix: str = "") -> Recipe:
    """Validate a mapping as a recipe. `prefix` is put before every key in errors.

    Raises:
        ToolkitError: unknown or missing keys, wrong types or values, one per line.
    """
    classes: dict[str, type[Recipe]] = {name: stage.recipe for name, stage in stages().items()}
    classes[CHAIN] = ChainRecipe
    stage = tree.get("stage")
    if "stage" not in tree:
        raise ToolkitError(f'missing key "{prefix}stage"; it is one of {", ".join(classes)}')
    if not isinstance(stage, str) or stage not in classes:
        near = get_close_matches(str(stage), list(classes), n=1)
        guess = f', did you mean "{near[0]}"?' if near else ""
        raise ToolkitError(f"{prefix}stage: {stage!r} is not one of {', '.join(classes)}{guess}")
    cls = classes[stage]
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ToolkitError("\n".join(_messages(error, tree, cls, prefix))) from None


def dump(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as plain YAML values, `stage` first."""
    values = recipe.model_dump(mode="json")
    return {"stage": values.pop("stage"), **values}


def _messages(error: ValidationError, tree: dict[str, Any], cls: type[BaseModel], prefix: str) -> list[str]:
    """One line for each wrong key; the errors of all members of a union are joined."""
    by_key: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for detail in error.errors():
        by_key.setdefault(_location(detail, tree), []).append(detail)
    for keys in list(by_key):  # an error inside a section says more than "not a number" about the section itself
        if any(other[: len(keys)] == keys and other != keys for other in by_key):
            del by_key[keys]
    return [_message(keys, details, cls, prefix, tree) for keys, details in by_key.items()]


def _location(detail: ErrorDetails, tree: Any) -> tuple[str | int, ...]:
    """The error's keys as in the file: pydantic adds the names of union members to the path."""
    keys: list[str | int] = []
    node: Any = tree
    for key in detail["loc"]:
        children: Any = dict(enumerate(node)) if isinstance(node, list) else node
        if isinstance(children, dict) and key in children:
            node = children[key]
            keys.append(key)
        elif detail["type"] == "missing" and key == detail["loc"][-1]:
            keys.append(key)
    return tuple(keys)


def _message(
    keys: tuple[str | int, ...], details: list[ErrorDetails], cls: type[BaseModel], prefix: str, tree: Any
) -> str:
    path = prefix + ".".join(str(key) for key in keys)
    kind = details[0]["type"]
    if kind == "extra_forbidden":
        return _unknown_key(keys, cls, prefix, tree)
    if kind == "missing":
        section = _section_at(cls, keys[:-1], tree)
        field = section.model_fields.get(str(keys[-1])) if section else None
        meaning = f": {field.description}" if field and field.description else ""
        return f'missing key "{path}"{meaning}'
    reasons = dict.fromkeys(_reason(detail) for detail in details)
    value = details[0]["input"]
    shown = "" if isinstance(value, dict | list | BaseModel) else f", not {value!r}"
    return f"{path or 'recipe'}: {' or '.join(reasons)}{shown}"


_WORDS = {
    "model_type": "must be a section with keys",
    "dict_type": "must be a section with keys",
    "list_type": "must be a list",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


def _reason(detail: ErrorDetails) -> str:
    text = detail["msg"].removeprefix("Value error, ")
    return _WORDS.get(detail["type"], text.replace("Input should ", "must ").replace("String should ", "must "))


def _unknown_key(keys: tuple[str | int, ...], cls: type[BaseModel], prefix: str, tree: Any) -> str:
    parent, wrong = keys[:-1], str(keys[-1])
    section = _section_at(cls, parent, tree)
    siblings = [".".join([*map(str, parent), name]) for name in (section.model_fields if section else {})]
    path = ".".join(map(str, keys))
    likely = get_close_matches(wrong, [name.split(".")[-1] for name in siblings], n=1, cutoff=0.6)
    near = get_close_matches(path, siblings, n=1, cutoff=0.6) if likely else []
    if not near:
        elsewhere = [key for key in _all_keys(cls) if key.split(".")[-1] == wrong]
        near = elsewhere[:1]
    if near:
        return f'unknown key "{prefix}{path}", did you mean "{prefix}{near[0]}"?'
    names = ", ".join(name.split(".")[-1] for name in siblings)
    hint = "; fields of the TRL config go under training" if not parent and "training" in siblings else ""
    return f'unknown key "{prefix}{path}"; known here: {names}{hint}'


def _section_at(cls: type[BaseModel], keys: tuple[str | int, ...], tree: Any) -> type[BaseModel] | None:
    """The class of the section at `keys`, ignoring list indices; of several, the one with most of its keys."""
    sections, node = [cls], tree
    for key in keys:
        node = _child(node, key)
        if isinstance(key, str):
            fields = [field for one in sections if (field := one.model_fields.get(key))]
            sections = [section for field in fields for section in _sections_in(field.annotation)]
    given = set(node) if isinstance(node, dict) else set()
    return max(sections, key=lambda one: len(given & set(one.model_fields)), default=None)


def _child(node: Any, key: str | int) -> Any:
    try:
        return node[key]
    except (LookupError, TypeError):
        return None


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes inside an annotation such as `list[X]` or `X | None`."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for arg in get_args(annotation) for section in _sections_in(arg)]


def _all_keys(cls: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in cls.model_fields.items():
        keys.append(prefix + name)
        index = "0." if "list" in str(field.annotation) else ""
        for section in _sections_in(field.annotation):
            keys += _all_keys(section, f"{prefix}{name}.{index}")
    return keys
