"""Recipe schema and stage definition of supervised fine-tuning. Imports no torch."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from conversations.answers.usable_rows import no_answer
from conversations.row import Refuse
from conversations.run_files import METRICS, SAMPLES
from conversations.sections import SupervisedRecipe
from conversations.stage import SMOKE_TRAINING, Shrink, Stage, Training


class SftRecipe(SupervisedRecipe):
    """Supervised fine-tuning on conversations; `training` feeds trl.SFTConfig."""

    stage: Literal["sft"] = Field(description="Which stage this is.")
    held_out_apart: ClassVar[bool] = True

    def refusal(self) -> Refuse:
        return no_answer

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


STAGE = Stage(
    name="sft",
    recipe=SftRecipe,
    help="supervised fine-tuning",
    title="supervised fine-tuning",
    run="sft.stage:run",
    training=Training(
        config="SFTConfig",
        planned_config="sft.stage:planned_config",
        rehearsal="sft.stage:rehearsal",
        evaluated=("loss", "mean_token_accuracy", "entropy"),
    ),
    encode="sft.data:encoder",
    marks_tokens=True,
    writes=(METRICS, SAMPLES),
    signs=("loss", "eval_loss"),
    smoke=(
        Shrink("", {"parallel": None}),
        Shrink("training", {**SMOKE_TRAINING, "max_length": 256}),
    ),
)
