"""Recipe schema and stage definition of reinforcement learning: GRPO, and DPO and others on preferences. Imports no
torch."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from conversations.environments.entry import EnvironmentSection
from conversations.formats.reasoning import Reasoning
from conversations.rewards.entry import RewardedRecipe, RewardEntry
from conversations.run_files import METRICS, SAMPLES
from conversations.sections import DataSource, FormatSection, RowList, Section, TrainingRecipe
from conversations.stage import SMOKE_TRAINING, Shrink, Stage, Training
from rl.preferences.methods import METHODS, fault


class DynamicSampling(Section):
    """Other prompts in the place of those whose answers all get one reward (DAPO)."""

    max_rounds: int = Field(ge=1, le=100, description="How often at most such prompts of a rollout are replaced.")


class Curriculum(Section):
    """Which prompts are drawn more often."""

    by: Literal["pass_rate"] = Field(description="pass_rate: the share of right answers to the prompt so far.")
    target: float = Field(
        default=0.5, gt=0, lt=1, description="The pass rate of the prompts that are drawn most often."
    )


class RolloutCorrection(Section):
    """Importance weights against the difference between the rollout's probabilities and the policy's."""

    mode: Literal["token_truncate", "token_mask", "sequence_mask"] = Field(
        description="Each token's ratio, cut off at the cap (TIS); 0 outside [1/cap, cap] (IcePop); or so with the "
        "ratio of the whole answer.",
    )
    cap: float = Field(default=2.0, gt=1, description="The largest ratio.")


class RolloutSection(Section):
    """How answers are sampled."""

    cache_share: ClassVar[float] = 0.6  # of free memory goes to the cache; prefill and logits need some as well
    # This share of free memory must hold a merged copy and the cache of `few` answers (or of all, if fewer).
    merged_share: ClassVar[float] = 0.8
    few: ClassVar[int] = 64

    merge: Literal["auto"] | bool = Field(
        default="auto",
        description="Sample from a copy of the weights with the adapters merged in, which is faster; auto does so if "
        "free memory allows.",
    )
    max_cache_gb: float | None = Field(
        default=None,
        gt=0,
        description="Limit on the cache of the answers sampled side by side, per process; further answers wait. null "
        "takes 60 % of free memory.",
    )


Replay = Literal["off", "update", "rollout"]
# Keys of recipes that sample answers.
_FOR_SAMPLES = (
    *("rewards", "dynamic_sampling", "rollout", "rollout_correction", "environment", "routing_replay", "curriculum"),
)
_FOR_PREFERENCES = ("format",)


class RlRecipe(TrainingRecipe, RewardedRecipe):
    """Group-relative policy optimisation, or training on preferences without sampling; `training` feeds TRL's config of
    the method."""

    stage: Literal["rl"] = Field(description="Which stage this is.")
    compares_with_base: ClassVar[bool] = True
    rollout: RolloutSection = Field(default_factory=lambda: RolloutSection(), description="How answers are sampled.")
    dynamic_sampling: DynamicSampling | None = Field(
        default=None,
        description="Draw other prompts for groups whose answers all have one reward; null trains on the rest alone.",
    )
    curriculum: Curriculum | None = Field(
        default=None,
        description="Draw prompts by how often they are answered right; null takes each once an epoch.",
    )
    rollout_correction: RolloutCorrection | None = Field(
        default=None,
        description="Weigh what was sampled by how likely it is under the policy that is updated; null does not.",
    )
    environment: EnvironmentSection | None = Field(
        default=None, description="Tools that the model calls while it answers, in several turns; null for none."
    )
    routing_replay: Replay = Field(
        default="off",
        description="update: every update uses the experts by which the old log-probabilities were computed; rollout: "
        "both use those by which the tokens were sampled; off: each forward chooses.",
    )
    method: Literal["grpo", "dpo", "ipo", "kto", "simpo", "orpo"] = Field(
        default="grpo",
        description="grpo samples answers and scores them by rewards; the others train on preferences: pairs, and for "
        "kto labelled answers as well.",
    )
    rewards: list[RewardEntry] = Field(default_factory=list, description="The terms of the reward, for grpo.")
    eval_data: list[DataSource] = Field(
        default_factory=list, description="Held-out prompts, or preferences, for evaluation in training."
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this many consecutive evaluations without a new best value, by "
        "training.metric_for_best_model. Where it names none: the held-out loss, of grpo pass@1 or the reward.",
    )
    format: FormatSection = Field(
        default_factory=lambda: FormatSection(), description="What happens to long preferences; not for grpo."
    )
    train_router: bool = Field(
        default=False,
        description="Train the routers too, in full fine-tuning or by router in lora.targets. Frozen ones change the "
        "experts of fewer tokens between rollout and update.",
    )

    @property
    def trains_router(self) -> bool:
        return self.train_router

    @property
    def set_for_experts(self) -> list[str]:
        return [key for key in ("routing_replay", "train_router") if getattr(self, key) not in ("off", False)]

    @property
    def any_processes(self) -> bool:
        return self.method not in ("grpo", "kto")  # each process has a rollout of its own, or KL rows of its batches

    @property
    def uses_reference(self) -> bool:
        return self.method == "grpo" and bool(self.training.get("beta"))

    @property
    def sequences_per_row(self) -> int:
        return 1 if self.method == "grpo" or METHODS[self.method].single else 2

    @model_validator(mode="after")
    def _router_is_asked_for(self) -> "RlRecipe":
        named = self.lora is not None and "router" in self.lora.targets
        if named and not self.train_router:
            raise ValueError(
                "lora.targets names router, which RL trains only with train_router: true; add that, or leave it out"
            )
        if self.lora is not None and self.train_router and not named:
            raise ValueError(
                "train_router: true needs router among lora.targets; name it there, or leave train_router out"
            )
        if self.train_router and self.experts_file:
            raise ValueError("train_router: true cannot be combined with experts_file, which trains experts alone")
        return self

    @model_validator(mode="after")
    def _samples_from_its_weights(self) -> "RlRecipe":
        if self.model.quantization is not None and self.training.get("use_vllm"):
            raise ValueError(
                "training.use_vllm cannot be combined with model.quantization: vLLM would sample from other weights "
                "than those that are trained; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _one_change_of_the_head(self) -> "RlRecipe":
        if self.training.get("cast_lm_head_to_fp32") and self.lora and "lm_head" in self.lora.targets:
            raise ValueError(
                "training.cast_lm_head_to_fp32 cannot be combined with lm_head in lora.targets; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _curriculum_has_verdicts(self) -> "RlRecipe":
        from conversations.answers.rules import needs_reference

        if self.curriculum and not any(entry.rule and needs_reference(entry.rule) for entry in self.rewards):
            raise ValueError(
                "curriculum counts right answers, which only a rule with a reference tells (number, math, code, ...): "
                "give such a rule in rewards, or leave curriculum out"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_method(self) -> "RlRecipe":
        if self.method == "grpo":
            if not self.rewards and self.environment is None:
                raise ValueError("method: grpo needs rewards, by which answers are scored")
            for name in _FOR_PREFERENCES:
                if name in self.model_fields_set and getattr(self, name):
                    raise ValueError(f"{name} is for methods that train on preferences, not for grpo; leave it out")
            if self.environment is None and self.training.get("max_tool_calling_iterations") is not None:
                raise ValueError("training.max_tool_calling_iterations needs an environment, whose tools are called")
            return self
        for name in _FOR_SAMPLES:
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name}: for method: grpo; {self.method} trains on preferences, so leave it out")
        if self.format.too_long == "split":
            raise ValueError("format.too_long: split is for conversations; preferences need truncate or drop")
        if "train_on" in self.format.model_fields_set:
            raise ValueError("format.train_on plays no part in preferences, whose answers are trained; leave it out")
        if why := fault(self.method, self.training):
            raise ValueError(why)
        return self

    @property
    def reasoning(self) -> Reasoning:
        return "drop" if self.method == "grpo" else self.format.reasoning

    def row_lists(self) -> list[RowList]:
        if self.method != "grpo":
            method = METHODS[self.method]
            lists = {"data": self.data, **({"eval_data": self.eval_data} if self.eval_data else {})}
            return [RowList(name, name, entries, method.refusal()) for name, entries in lists.items()]
        lists = {"data": self.data, **({"eval_data": self.eval_data} if self.eval_data else {})}
        asked: dict[str, Any] = {"answer": "training.max_completion_length"}
        if self.environment is not None:
            asked["prompt"] = self.environment.prompts()
        return [RowList(name, name, rows, self.judged_refusal(), **asked) for name, rows in lists.items()]


_SAMPLING = Stage(
    name="rl",
    recipe=RlRecipe,
    help="reinforcement learning (GRPO), or DPO and others on preferences",
    title="reinforcement learning",
    run="rl.stage:run",
    training=Training(
        config="GRPOConfig",
        planned_config="rl.stage:planned_config",
        rehearsal="rl.stage:rehearsal",
        rehearsal_training={
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "num_generations": 2,
            "max_completion_length": 2,
            "steps_per_generation": 1,
            "generation_batch_size": None,
            "num_generations_eval": None,
        },
        row_uses=("num_generations", "num_iterations"),
    ),
    check_rows="rl.stage:check_rows",
    writes=(METRICS, SAMPLES),
    signs=("reward", "kl", "rewards/margins"),
    smoke=(
        Shrink(
            "training",
            {
                **SMOKE_TRAINING,
                "num_generations": 2,
                "max_completion_length": 16,
                # TRL requires all answers to a prompt in one generation batch: two batches of 1.
                "steps_per_generation": 2,
                "generation_batch_size": None,
                "num_generations_eval": None,
            },
        ),
        Shrink("rewards", {"if_missing": "random"}, where="model"),
    ),
)


def _on_preferences(name: str) -> Stage:
    """The stage as a method that samples nothing makes it."""
    method = METHODS[name]
    return replace(
        _SAMPLING,
        title=f"preferences ({name.upper()})",
        run="rl.preferences.stage:run",
        training=Training(
            config=method.config,
            planned_config="rl.preferences.stage:planned_config",
            rehearsal="rl.preferences.stage:rehearsal",
            rehearsal_training={"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2},
            evaluated=method.figures,
        ),
        encode="rl.preferences.data:encoder",
        check_rows=None,
        marks_tokens=True,
        writes=(METRICS, SAMPLES),
        smoke=(Shrink("training", {**SMOKE_TRAINING, "per_device_train_batch_size": 2, "max_length": 256}),),
    )


STAGE = replace(_SAMPLING, methods={name: _on_preferences(name) for name in METHODS})
