"""The recipe of reinforcement learning (GRPO). No torch."""

from typing import Literal

from pydantic import Field, model_validator

from conversations.sections import Section, TrainingRecipe


class RewardEntry(Section):
    """One term of the reward, r = sum of weight * value: a reward model or a named rule."""

    model: str | None = Field(default=None, description="Run or directory of a reward model.")
    if_missing: Literal["error", "random"] = Field(
        default="error", description="Without such a model: stop, or (for trials) score at random in its place."
    )
    rule: str | None = Field(default=None, description="Name of a rule of rl/rewards.py, such as math or number.")
    weight: float = Field(default=1.0, description="Coefficient of this term; may be negative, not zero.")
    normalize: bool = Field(
        default=True, description="A model's scores: subtract the mean and divide by the spread of its training pairs."
    )
    clip: float | None = Field(
        default=None, gt=0, description="A model's scores: cut to [-clip, clip] after normalising."
    )
    on_error: Literal["error", "zero", "skip"] = Field(
        default="error", description="When the reward cannot be had: stop, count 0, or leave the completion out."
    )

    @model_validator(mode="after")
    def _model_or_rule(self) -> "RewardEntry":
        if (self.model is None) == (self.rule is None):
            raise ValueError("needs either model or rule")
        if self.rule is not None and self.clip is not None:
            raise ValueError("clip belongs to a reward model, not to a rule")
        if self.weight == 0:
            raise ValueError("weight is 0: leave the reward out instead")
        return self


class RlRecipe(TrainingRecipe):
    """Group-relative policy optimisation; `training` feeds trl.GRPOConfig."""

    stage: Literal["rl"] = Field(description="Which stage this is.")
    rewards: list[RewardEntry] = Field(min_length=1, description="The terms of the reward.")

    @model_validator(mode="after")
    def _one_change_of_the_head(self) -> "RlRecipe":
        if self.training.get("cast_lm_head_to_fp32") and self.lora and "lm_head" in self.lora.targets:
            raise ValueError("training.cast_lm_head_to_fp32 does not go with lm_head in lora.targets; leave one out")
        return self
