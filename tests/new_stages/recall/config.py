"""A new stage that trains: texts, learned by heart. No torch."""

from typing import Literal

from pydantic import Field

from conversations.answers.usable_rows import Row
from conversations.sections import RowList, TrainingRecipe
from conversations.stage import SMOKE_TRAINING, Shrink, Stage, Training


def no_text(row: Row) -> str | None:
    return None if "text" in row else "has no text to learn by heart"


class RecallRecipe(TrainingRecipe):
    """Texts, learned by heart."""

    stage: Literal["recall"] = Field(description="Which stage this is.")

    def row_lists(self) -> list[RowList]:
        return [RowList("data", "data", self.data, no_text)]


STAGE = Stage(
    name="recall",
    recipe=RecallRecipe,
    help="learn texts by heart",
    title="texts by heart",
    run="recall.stage:run",
    training=Training(
        config="SFTConfig",
        planned_config="recall.stage:planned_config",
        rehearsal="recall.stage:rehearsal",
    ),
    encode="recall.stage:encoder",
    marks_tokens=True,
    writes=("metrics.jsonl",),
    smoke=(Shrink("training", {**SMOKE_TRAINING, "max_length": 16}),),
)
