"""The recipe of a reward model. No torch."""

from typing import Literal

from pydantic import Field

from conversations.sections import SupervisedRecipe


class RewardRecipe(SupervisedRecipe):
    """A reward model from preferences; `training` feeds trl.RewardConfig. `format.train_on` plays no part."""

    stage: Literal["reward"] = Field(description="Which stage this is.")
    loss: Literal["pairwise", "pointwise"] = Field(
        default="pairwise", description="Pairs of chosen and rejected, or single answers with a label or score."
    )
