"""A new stage that trains nothing: the loss of each row, as a file of lines. No torch."""

from typing import Literal

from pydantic import Field

from conversations.sections import DataSource, RowList, StageRecipe
from conversations.stage import Shrink, Stage


class TallyRecipe(StageRecipe):
    """The loss of each row."""

    stage: Literal["tally"] = Field(description="Which stage this is.")
    data: list[DataSource] = Field(min_length=1, description="What to look at.")
    limit: int = Field(default=100, ge=1, description="Rows that are looked at.")
    size: dict[str, int] = Field(default_factory=lambda: {"batch": 4}, description="How many rows at once.")

    def row_lists(self) -> list[RowList]:
        return [RowList("data", "data", self.data, lambda row: None, limit=self.limit)]


STAGE = Stage(
    name="tally",
    recipe=TallyRecipe,
    help="the loss of each row",
    title="tally",
    run="tally.stage:run",
    encode="tally.stage:encoder",
    marks_tokens=True,
    result="tally.jsonl",
    smoke=(Shrink("size", {"batch": 1}),),
)
