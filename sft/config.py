"""The recipe of supervised fine-tuning. No torch."""

from typing import Literal

from pydantic import Field

from conversations.sections import FormatSection, TrainingRecipe


class SftRecipe(TrainingRecipe):
    """Supervised fine-tuning on conversations; `training` feeds trl.SFTConfig."""

    stage: Literal["sft"] = Field(description="Which stage this is.")
    format: FormatSection = Field(
        default_factory=FormatSection, description="What is trained and what happens to long rows."
    )
