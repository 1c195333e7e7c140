"""The `rewards` section of a recipe, for stages that judge a model's answers (rl, pairs). Imports no torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from conversations.answers.combining import Combine
from conversations.answers.usable_rows import first_of, no_question, unreadable_reference
from conversations.rewards.endpoint import EndpointSettings
from conversations.row import Refuse, Row
from conversations.sections import ModelUse, Section, StageRecipe

_MAP_REFERENCE = (
    "name the columns of the prompt and of the correct answer, such as data.0.columns: "
    "{prompt: question, reference: answer} (a nested one: reference: reward_model.ground_truth)"
)


class JudgeSettings(Section):
    """A language model behind an OpenAI-compatible endpoint that judges answers by a rubric."""

    base_url: str = Field(
        pattern=r"^https?://\S+$", description="URL of the endpoint, without /chat/completions: https://HOST/v1."
    )
    model: str = Field(min_length=1, description="The judge's name at the endpoint.")
    rubric: str = Field(description="Text file that defines a good answer; relative to the current folder.")
    scale: list[float] = Field(
        default_factory=lambda: [1.0, 10.0],
        min_length=2,
        max_length=2,
        description="The lowest and the highest points.",
    )
    mode: Literal["pointwise", "pairwise", "group"] = Field(
        default="pointwise",
        description="Points for each answer, or comparisons in both orders: with the reference (pairwise) or with the "
        "other answers to the prompt (group).",
    )
    opponents: int | None = Field(
        default=None,
        ge=1,
        description="With mode group: number of other answers that each answer is compared with; null for all.",
    )
    key_variable: str = Field(
        default="OPENAI_API_KEY",
        pattern=r"^[A-Za-z_]\w*$",
        description="Environment variable that holds the API key; the key itself is never written to disk.",
    )
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"temperature": 0},
        description="Further fields of each request, such as {max_tokens: 512}.",
    )
    timeout: float = Field(default=60.0, gt=0, le=3600, description="Timeout of a request, in seconds.")
    retries: int = Field(default=5, ge=0, le=100, description="Retries of a request that failed.")
    concurrency: int = Field(default=8, ge=1, le=256, description="Maximum number of concurrent requests.")
    per_minute: int | None = Field(
        default=None, ge=1, description="Maximum requests per minute, shared equally by all processes."
    )
    max_requests: int | None = Field(
        default=None,
        ge=1,
        description="Maximum requests in the whole run, including those made before it was resumed; the processes "
        "share what is left equally.",
    )

    @model_validator(mode="after")
    def _can_be_asked(self) -> "JudgeSettings":
        low, high = self.scale
        if not low < high:
            raise ValueError(f"scale must rise, such as [1, 10], not [{low:g}, {high:g}]")
        if self.opponents is not None and self.mode != "group":
            raise ValueError("opponents belongs to mode: group; leave it out")
        if owned := sorted({"model", "messages", "stream", "n"} & set(self.parameters)):
            raise ValueError(f"parameters cannot set {owned[0]}; leave it out")
        self.rubric_text()
        return self

    def endpoint(self) -> EndpointSettings:
        """The settings of the judge's endpoint."""
        return EndpointSettings(
            self.base_url,
            self.model,
            self.key_variable,
            self.timeout,
            self.retries,
            self.per_minute,
            self.max_requests,
            self.parameters,
        )

    def rubric_text(self) -> str:
        """The contents of the rubric file; raises ValueError if it cannot be read or is empty."""
        try:
            text = Path(self.rubric).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"rubric {self.rubric} cannot be read, from the current folder: {error}") from None
        if not text:
            raise ValueError(f"rubric {self.rubric} is empty")
        return text


class RewardEntry(Section):
    """One term of the reward, r = sum of weight * value: a reward model, a rule, a Python function or a judge."""

    model: str | None = Field(default=None, description="Run or directory of a reward model.")
    if_missing: Literal["error", "random"] = Field(
        default="error", description="If the model does not exist: stop, or use random scores instead (for trials)."
    )
    rule: str | None = Field(default=None, description="Name of a rule, such as math or number.")
    python: str | None = Field(
        default=None,
        description='Your own function, "FILE.py:FUNCTION", with the signature of TRL\'s reward functions.',
    )
    judge: JudgeSettings | None = Field(default=None, description="A language model that judges answers.")
    timeout: float = Field(default=10.0, gt=0, description="With python: time limit for a call, in seconds.")
    workers: int = Field(default=1, ge=1, le=1024, description="With python: number of processes that run it.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="The rule's own settings, such as {partial: true} of code (docs/rules.md)."
    )
    weight: float = Field(default=1.0, description="Coefficient of this term; may be negative, not zero.")
    normalize: bool = Field(
        default=True,
        description="With model: subtract the mean of its scores on its training pairs and divide by their standard "
        "deviation.",
    )
    clip: float | None = Field(
        default=None, gt=0, description="With model: clip scores to [-clip, clip] after normalising."
    )
    combine: Combine = Field(
        default="mean",
        description="With a model that has several heads: the mean of their scores, the minimum, or the mean minus the "
        "standard deviation (each head's score is normalised first).",
    )
    device: str | None = Field(
        default=None,
        min_length=1,
        description="With model: the device that it runs on, such as cuda:1 or cpu; null is that of training, where "
        "reward models can share its base weights.",
    )
    on_error: Literal["error", "zero", "skip"] = Field(
        default="error", description="When the reward cannot be computed: stop, count 0, or leave the completion out."
    )

    @model_validator(mode="after")
    def _model_or_rule(self) -> "RewardEntry":
        if [self.model, self.rule, self.python, self.judge].count(None) != 3:
            raise ValueError("needs one of model, rule and python, or a judge")
        if self.model is None and self.clip is not None:
            raise ValueError("clip belongs to a reward model, not to a rule")
        if self.model is None and self.combine != "mean":
            raise ValueError("combine belongs to a reward model, not to a rule or a function")
        if self.model is None and self.device is not None:
            raise ValueError("device belongs to a reward model; leave it out")
        if self.python is None and (self.timeout, self.workers) != (10.0, 1):
            raise ValueError("timeout and workers belong to a function of your own (python); leave them out")
        if self.weight == 0:
            raise ValueError("weight is 0: leave the reward out instead")
        if self.rule is not None:
            from conversations.answers.rules import check_rule

            check_rule(self.rule, self.settings)
        elif self.settings:
            raise ValueError("settings belong to a rule; leave them out")
        if self.python is not None:
            from conversations.answers.own_function import place_of

            place_of(self.python)
        return self

    def judges_like(self, other: "RewardEntry") -> bool:
        """Whether both entries give every answer the same value."""
        source = (self.rule, self.settings, self.model, self.python, self.judge)
        same_source = source == (other.rule, other.settings, other.model, other.python, other.judge)
        own, others = ((entry.normalize, entry.clip, entry.combine) for entry in (self, other))
        return same_source and (self.model is None or own == others)


def model_use(entry: RewardEntry, key: str) -> ModelUse:
    """How a stage uses the reward model of an entry, which stands at `key` of its recipe."""
    assert entry.model is not None
    return ModelUse(
        kind="reward model",
        key=f"{key}.model",
        path=entry.model,
        head="score",
        remedy="train it with: dsv2 reward RECIPE, or set if_missing: random",
        stand_in=entry.if_missing == "random",
        stats=entry.normalize,
        device=entry.device,
    )


class RewardedRecipe(StageRecipe):
    """The keys that recipes of stages that judge answers have in common."""

    rewards: list[RewardEntry] = Field(min_length=1, description="The terms of the reward.")

    @model_validator(mode="after")
    def _no_reward_twice(self) -> "RewardedRecipe":
        for index, entry in enumerate(self.rewards):
            for earlier, other in enumerate(self.rewards[:index]):
                if entry.judges_like(other):
                    raise ValueError(
                        f"rewards.{index} is the same as rewards.{earlier}, so it would count twice; remove it, and "
                        "set the weight of the other instead"
                    )
        return self

    def other_models(self) -> list[ModelUse]:
        return [
            model_use(entry, f"rewards.{index}") for index, entry in enumerate(self.rewards) if entry.model is not None
        ]

    def judged_refusal(self) -> Refuse:
        """A filter that refuses rows without a question and rows that no reward can score."""
        from conversations.answers.rules import check_machine, needs_reference

        for entry in self.rewards:
            if entry.rule:
                check_machine(entry.rule, entry.settings)
        referring = [entry.rule for entry in self.rewards if entry.rule and needs_reference(entry.rule)]

        def unjudged(row: Row) -> str | None:
            if "reference" in row or len(referring) < len(self.rewards):
                return None
            return f"has no reference, which every reward needs ({', '.join(referring)}); {_MAP_REFERENCE}"

        strict_rules = [entry.rule for entry in self.rewards if entry.rule in referring and entry.on_error == "error"]
        return first_of(no_question, unjudged, unreadable_reference(strict_rules))
