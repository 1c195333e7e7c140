"""The recipe of a reward model. No torch."""

from typing import Literal

from pydantic import Field

from conversations.sections import FormatSection, TrainingRecipe


class RewardRecipe(TrainingRecipe):
    """A reward model from preferences; `training` feeds trl.RewardConfig."""

    stage: Literal["reward"] = Field(description="Which stage this is.")
    format: FormatSection = Field(
        default_factory=FormatSection, description="What happens to long rows; train_on plays no part."
    )
    loss: Literal["pairwise", "pointwise"] = Field(
        "pairwise", description="Pairs of chosen and rejected, or single answers with a label or score."
    )
