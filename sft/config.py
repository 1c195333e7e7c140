"""The recipe of supervised fine-tuning. No torch."""

from typing import Literal

from pydantic import Field

from conversations.sections import SupervisedRecipe


class SftRecipe(SupervisedRecipe):
    """Supervised fine-tuning on conversations; `training` feeds trl.SFTConfig."""

    stage: Literal["sft"] = Field(description="Which stage this is.")
