"""Recipe sections that several stages share, as pydantic models. No torch: a recipe is checked before torch loads.

Every field has a type, bounds and a one-sentence description. Types are strict: `seed: "7"` is an error, not seven.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from conversations.answers.prompts import prompt_of
from conversations.formats.reasoning import Reasoning
from conversations.formats.turn_reading import Role
from conversations.reading.load import OnBadRow
from conversations.rendering.conversation import TrainOn
from conversations.rendering.fill_in_the_middle import FimMode
from conversations.rendering.lengths import TooLong
from conversations.row import Message, Refuse, Row

Head = Literal["causal_lm", "score"]  # as in deepseek_v2_modeling.loading, which imports torch

# The groups and projections of deepseek_v2_modeling.adapters.lora, which imports torch (a test compares the two).
Target = Literal[
    "attention", "attention.q", "attention.k", "attention.v", "attention.kv_a", "attention.kv_b", "attention.o",
    "experts", "experts.gate_up", "experts.down",
    "shared_experts", "dense", "router", "embeddings", "lm_head",
]  # fmt: skip


def _no_kernel_of_the_hub(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            "must be the name of an implementation, such as eager, sdpa or flash_attention_2: kernels from the hub "
            "(OWNER/NAME) are remote code and are never loaded"
        )
    return name


AttentionName = Annotated[str, AfterValidator(_no_kernel_of_the_hub)]
Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values are not coerced, numbers are finite, defaults are validated
    too."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class ModelSection(Section):
    """The model a stage starts from."""

    path: str = Field(min_length=1, description="A model directory, a run, a run's final/, or a hub name.")
    preset: str | None = Field(
        default=None, description="Preset of `dsv2 init` for a seeded random model when `path` does not exist."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="dtype of frozen weights and of computation; trained weights are always float32."
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None,
        description="Keep the frozen weights of layers in 4 or 8 bits, for adapters on a large model (QLoRA).",
    )
    attn_implementation: AttentionName | None = Field(
        default=None, description="transformers' attention implementation (eager, sdpa, ...); null lets it choose."
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="Overrides of the model's config, such as aux_loss_alpha."
    )


class LoraSection(Section):
    """Low-rank adapters; a recipe with `lora: null` trains all weights."""

    targets: list[Target] = Field(min_length=1, description="Which groups of weights get adapters.")
    r: Rank | dict[Target, Rank] = Field(default=16, description="Rank: a number, or one for each target.")
    alpha: Alpha | dict[Target, Alpha] | None = Field(
        default=None, description="The update is scaled by alpha / r: a number, or one for each target; null is 2 r."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapters' input, during training only.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r) instead of alpha / r.")
    experts_file: str | None = Field(
        default=None, description="Train the adapters of these routed experts only: a file of `dsv2 experts`."
    )

    @field_validator("targets")
    @classmethod
    def _no_target_twice(cls, targets: list[Target]) -> list[Target]:
        twice = sorted({target for target in targets if targets.count(target) > 1})
        if twice:
            raise ValueError(f"listed twice: {', '.join(twice)}")
        return targets

    @model_validator(mode="after")
    def _one_value_for_each_target(self) -> "LoraSection":
        for name in ("r", "alpha"):
            value = getattr(self, name)
            if isinstance(value, dict) and set(value) != set(self.targets):
                raise ValueError(
                    f"{name} names {sorted(value)} but targets are {sorted(self.targets)}; give one number, "
                    "or one for each target"
                )
        return self

    @model_validator(mode="after")
    def _experts_file_needs_experts(self) -> "LoraSection":
        if self.experts_file is not None and not any(target.split(".")[0] == "experts" for target in self.targets):
            raise ValueError(f"experts_file needs experts among the targets, which are {sorted(self.targets)}")
        return self


class ParallelSection(Section):
    """How many processes share the weights of the model that is trained, their gradients and the optimizer's state."""

    fsdp: int = Field(
        ge=2,
        le=4096,
        description="Processes that share the weights (FSDP2); it must divide those that --processes starts.",
    )
    ep: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Of these, processes among which each layer's routed experts are divided (expert parallelism), "
        "so that tokens are sent instead of experts; it must divide fsdp and the number of experts.",
    )

    @model_validator(mode="after")
    def _ep_divides_fsdp(self) -> "ParallelSection":
        if self.fsdp % self.ep:
            sizes = ", ".join(str(size) for size in range(1, self.fsdp + 1) if self.fsdp % size == 0)
            raise ValueError(f"ep is {self.ep} and must divide fsdp, which is {self.fsdp}: use {sizes}")
        return self


class FimSection(Section):
    """Fill-in-the-middle on plain text, with DeepSeek-Coder's tokens."""

    rate: float = Field(default=0.5, gt=0, le=1, description="Share of the rows converted to fill-in-the-middle.")
    mode: FimMode = Field(
        default="psm", description="Prefix, suffix, middle (as DeepSeek-Coder was trained), or suffix, prefix, middle."
    )


class DataSource(Section):
    """One source of rows. `path` is a file, a hub data set, `tiny:NAME` from the demo's generator, or a task of
    reasoning-gym."""

    path: str = Field(
        min_length=1,
        description="jsonl, ndjson, json, csv, tsv, parquet or arrow file (also with .gz or .zst), a .zip, folder or "
        "pattern of these, hub data set (OWNER/NAME or OWNER/NAME:CONFIG), tiny:NAME?seed=7&n=1000, or "
        "reasoning_gym:TASK?seed=7&n=1000; relative files are relative to the recipe.",
    )
    split: str | None = Field(
        default=None,
        description="train[:90%] and train[90%:] divide rows by their first question; test[:100] takes rows by number.",
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Share in the mixture, relative to the other sources (1 if only those have one). The source with "
        "the largest weight is used once, the others are sampled or repeated. Without any, all are used once.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Known key: the file's name for it, for files with other column names."
    )
    roles: dict[str, Role] = Field(
        default_factory=dict, description="The file's role name: system, user, assistant or tool."
    )
    on_bad_row: OnBadRow = Field(
        default="error", description="Stop at a bad row, or write it to rejected.jsonl with the reason and continue."
    )
    max_bad_rows: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="With on_bad_row: skip, more bad rows than this (a number, or a share) stop the run."
    )
    fim: FimSection | None = Field(default=None, description="Fill-in-the-middle, for rows of plain text.")

    @model_validator(mode="after")
    def _limit_needs_skip(self) -> "DataSource":
        if self.max_bad_rows is not None and self.on_bad_row == "error":
            raise ValueError("max_bad_rows needs on_bad_row: skip")
        return self


class FormatSection(Section):
    """How conversations become token ids and loss masks."""

    train_on: TrainOn = Field(
        default="all_assistant", description="Train on every assistant turn, or on the last one only."
    )
    too_long: TooLong = Field(default="truncate", description="What happens to rows longer than training.max_length.")
    reasoning: Reasoning = Field(
        default="refuse",
        description="Reasoning stored with an answer: a bad row, dropped, or trained before the answer "
        "between <think> and </think>.",
    )


@dataclass(frozen=True)
class RowList:
    """A data list of a recipe, and what the stage requires of its rows.

    Args:
        name: the stage's name for it.
        key: its key in the recipe.
        limit: how many of its rows are used; None uses all.
        answer: the key that holds the maximum answer length in tokens; None if nothing is generated.
        apart: whether the rows of each source are used separately.
        prompt: what a model is asked for a row, given with its number.
        read_whole: whether a model reads whole conversations, which nothing cuts to its positions.
    """

    name: str
    key: str
    entries: Sequence[DataSource]
    refuse: Refuse
    limit: int | None = None
    answer: str | None = None
    apart: bool = False
    prompt: Callable[[Row, int], list[Message]] = prompt_of
    read_whole: bool = False


@dataclass(frozen=True)
class ModelUse:
    """A model named in a recipe that a stage uses besides the one it starts from.

    Args:
        kind: its role, in words.
        key: the recipe key of its path.
        remedy: what to do if it is missing.
        stand_in: if it is missing, use the stage's own model with a random head instead.
        stats: whether the statistics of its scores are used.
        device: where it runs; None is the device of the stage.
    """

    kind: str
    key: str
    path: str
    head: Head
    remedy: str
    stand_in: bool = False
    stats: bool = False
    device: str | None = None


class StageRecipe(Section):
    """The keys common to every stage's recipe. `output_dir` is relative to the working directory."""

    stage: str = Field(description="Which stage this is.")
    model: ModelSection = Field(description="The model the stage starts from.")
    output_dir: str = Field(min_length=1, description="The run directory, created when missing.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of everything random in the stage.")
    on_nan: Literal["stop", "skip"] = Field(
        default="stop", description="A loss or gradient that is not finite: stop the run, or leave out that update."
    )

    @property
    def head(self) -> Head:
        """The head with which a stage that does not train loads its model."""
        return "causal_lm"

    @property
    def reasoning(self) -> Reasoning:
        """How reasoning beside an answer is handled. Prompts omit it: a model is not shown its earlier reasoning."""
        return "drop"

    def row_lists(self) -> list[RowList]:
        """All data lists."""
        raise NotImplementedError

    def other_models(self) -> list[ModelUse]:
        """The models used besides `model`."""
        return []

    def files(self) -> dict[str, str]:
        """Other files that are read, by what they are."""
        return {}

    def parts(self) -> Mapping[str, "StageRecipe"]:
        """The recipes of runs that this one consists of, by name; none if it is a run itself."""
        return {}

    @property
    def reads_lm_head(self) -> bool:
        """Whether the stage uses the LM head of `model` although it trains another head."""
        return False

    @property
    def score_heads(self) -> int | None:
        """How many score heads the trained model gets; None for as many as it has."""
        return None


class TrainingRecipe(StageRecipe):
    """The keys common to the recipes of sft, reward and rl."""

    lora: LoraSection | None = Field(default=None, description="Adapters to train; null trains all weights.")
    experts_file: str | None = Field(
        default=None, description="Without lora: train all weights of these routed experts and nothing else (ESFT)."
    )
    data: list[DataSource] = Field(min_length=1, description="What to train on.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the TRL config of the stage, except those that the toolkit sets."
    )
    compares_with_base: ClassVar[bool] = False  # whether the loss reads a model on the same base beside the trained one
    parallel: ParallelSection | None = Field(
        default=None, description="Share the weights among processes; null gives each process all of them."
    )
    max_seconds: float | None = Field(
        default=None, gt=0, description="Stop training after this many seconds, as if it had reached its last step."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this many tokens of trained rows: prompts and answers, no padding. Unlike seconds "
        "they are the same on every machine.",
    )

    @model_validator(mode="after")
    def _one_experts_file(self) -> "TrainingRecipe":
        if self.experts_file is not None and self.lora is not None:
            raise ValueError("experts_file is for full fine-tuning (lora: null); with adapters write lora.experts_file")
        return self

    @model_validator(mode="after")
    def _quantized_weights_are_frozen(self) -> "TrainingRecipe":
        if self.model.quantization is not None and self.lora is None:
            raise ValueError(
                f"model.quantization: {self.model.quantization} is for training adapters: give lora, or leave it out "
                "to train all weights"
            )
        return self

    @model_validator(mode="after")
    def _whole_experts_in_parallel(self) -> "TrainingRecipe":
        if self.parallel is not None and self.experts_file is not None:
            raise ValueError(
                "parallel cannot be combined with an experts_file for all weights of the chosen experts; give it as "
                "lora.experts_file, which trains adapters on them, or leave one out"
            )
        return self

    @property
    def sequences_per_row(self) -> int:
        """How many sequences a row of a batch is, such as the two answers of a pair."""
        return 1

    @property
    def trains_router(self) -> bool:
        """Whether full fine-tuning trains the routers of the experts."""
        return True

    @property
    def set_for_experts(self) -> list[str]:
        """The keys in use that only a model with routed experts can honour."""
        return []

    @property
    def any_processes(self) -> bool:
        """Whether a run with `parallel` resumes on another number of processes."""
        return True

    @property
    def uses_reference(self) -> bool:
        """Whether training compares the model with a frozen copy of what it was."""
        return False

    @property
    def chosen_experts_file(self) -> str | None:
        """The file that names the routed experts to train, with adapters or without."""
        return self.lora.experts_file if self.lora else self.experts_file


class SupervisedRecipe(TrainingRecipe):
    """The keys common to the recipes of sft and reward."""

    eval_data: list[DataSource] = Field(
        default_factory=list, description="Held-out rows for evaluation in training; may be empty."
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this many consecutive evaluations without a new best value, by "
        "training.metric_for_best_model (by default the held-out loss).",
    )
    format: FormatSection = Field(
        default_factory=lambda: FormatSection(), description="What is trained and what happens to long rows."
    )

    @model_validator(mode="after")
    def _shares_weights_by_parallel(self) -> "SupervisedRecipe":
        if self.training.get("fsdp"):
            raise ValueError("training.fsdp: write parallel: {fsdp: N} instead, which also saves and resumes")
        return self

    held_out_apart: ClassVar[bool] = False  # whether each source of eval_data is evaluated on its own

    @property
    def reasoning(self) -> Reasoning:
        return self.format.reasoning

    def refusal(self) -> Refuse:
        """Returns why a row cannot be used; a new function for each list, since it may remember earlier rows."""
        raise NotImplementedError

    def row_lists(self) -> list[RowList]:
        trained = RowList("data", "data", self.data, self.refusal())
        apart = self.held_out_apart and len(self.eval_data) > 1
        held_out = RowList("eval_data", "eval_data", self.eval_data, self.refusal(), apart=apart)
        return [trained, held_out] if self.eval_data else [trained]
