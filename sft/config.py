"""The recipe of supervised fine-tuning. No torch."""

from typing import Literal

from pydantic import Field, model_validator

from conversations.sections import SupervisedRecipe


class SftRecipe(SupervisedRecipe):
    """Supervised fine-tuning on conversations; `training` feeds trl.SFTConfig."""

    stage: Literal["sft"] = Field(description="Which stage this is.")

    @model_validator(mode="after")
    def _packed_documents_stay_apart(self) -> "SftRecipe":
        training = self.training
        if training.get("packing_strategy") == "wrapped":
            raise ValueError("training.packing_strategy wrapped cuts conversations anywhere; use bfd, the default")
        if training.get("eval_packing") and not training.get("packing"):
            raise ValueError("training.eval_packing needs training.packing: true; without it the packs are one text")
        if training.get("packing") and training.get("max_length", 0) is None:
            raise ValueError("training.packing needs training.max_length, the size of a pack")
        return self
