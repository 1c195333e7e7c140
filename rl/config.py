"""Recipe schema and stage definition of reinforcement learning (GRPO). Imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from conversations.rewards.entry import RewardedRecipe
from conversations.run_files import METRICS, SAMPLES
from conversations.sections import RowList, TrainingRecipe
from conversations.stage import SMOKE_TRAINING, Shrink, Stage, Training


class RlRecipe(TrainingRecipe, RewardedRecipe):
    """Group-relative policy optimisation; `training` feeds trl.GRPOConfig."""

    stage: Literal["rl"] = Field(description="Which stage this is.")

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
