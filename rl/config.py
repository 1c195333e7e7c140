"""Recipe schema and stage definition of reinforcement learning (GRPO). Imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from conversations.rewards.entry import RewardedRecipe
from conversations.run_files import METRICS, SAMPLES
from conversations.sections import RowList, Section, TrainingRecipe
from conversations.stage import SMOKE_TRAINING, Shrink, Stage, Training


class DynamicSampling(Section):
    """Other prompts in the place of those whose answers all get one reward (DAPO)."""

    max_rounds: int = Field(ge=1, le=100, description="How often at most such prompts of a rollout are replaced.")


class RlRecipe(TrainingRecipe, RewardedRecipe):
    """Group-relative policy optimisation; `training` feeds trl.GRPOConfig."""

    stage: Literal["rl"] = Field(description="Which stage this is.")
    dynamic_sampling: DynamicSampling | None = Field(
        default=None,
        description="Draw other prompts for groups whose answers all have one reward; null trains on the rest alone.",
    )
    train_router: bool = Field(
        default=False,
        description="Train the routers too, in full fine-tuning or by router in lora.targets. Frozen ones change the "
        "experts of fewer tokens between rollout and update.",
    )

    @property
    def trains_router(self) -> bool:
        return self.train_router

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
    def _one_change_of_the_head(self) -> "RlRecipe":
        if self.training.get("cast_lm_head_to_fp32") and self.lora and "lm_head" in self.lora.targets:
            raise ValueError(
                "training.cast_lm_head_to_fp32 cannot be combined with lm_head in lora.targets; leave one out"
            )
        return self

    def row_lists(self) -> list[RowList]:
        return [RowList("data", "data", self.data, self.judged_refusal(), answer="training.max_completion_length")]


STAGE = Stage(
    name="rl",
    recipe=RlRecipe,
    help="reinforcement learning (GRPO)",
    title="reinforcement learning",
    run="rl.stage:run",
    training=Training(
        config="GRPOConfig",
        planned_config="rl.stage:planned_config",
        rehearsal="rl.stage:rehearsal",
        rehearsal_training={
            "per_device_train_batch_size": 2,
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
    signs=("reward", "kl"),
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
