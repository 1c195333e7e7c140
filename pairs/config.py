"""Recipe schema and stage definition of preference data: a model's answers, judged by rewards. Imports no torch."""

from typing import Literal

from pydantic import Field

from conversations.rewards.entry import RewardedRecipe
from conversations.run_files import RESULTS, SAMPLES
from conversations.sections import DataSource, RowList
from conversations.stage import Shrink, Stage

PAIRS = "pairs.jsonl"  # for a reward model or DPO
SCORED = "scored.jsonl"  # for a point-wise reward model or KTO
BEST = "best.jsonl"  # rejection sampling, for SFT


class PairsRecipe(RewardedRecipe):
    """Preference data from a model's own answers (paper, section 4.2): several judged answers to each prompt,
    paired."""

    stage: Literal["pairs"] = Field(description="Which stage this is.")
    data: list[DataSource] = Field(min_length=1, description="Prompts, with references if a rule needs them.")
    limit: int | None = Field(default=None, ge=1, description="Use only this many rows, the first ones; null uses all.")
    num_generations: int = Field(default=8, ge=2, le=256, description="Answers sampled for each prompt.")
    temperature: float = Field(default=1.0, gt=0, le=10, description="Sampling temperature.")
    max_new_tokens: int = Field(default=512, ge=1, description="Maximum length of an answer, in tokens.")
    batch_size: int = Field(default=32, ge=1, description="Number of answers generated at once.")
    max_pairs_per_prompt: int = Field(default=4, ge=1, description="Maximum number of pairs per prompt.")
    min_margin: float = Field(
        default=0.0,
        ge=0,
        description="Minimum difference between the rewards of a pair; answers with equal rewards are never paired.",
    )
    balance_lengths: bool = Field(
        default=True,
        description="Leave out pairs until the chosen answer is the longer one as often as the shorter one, so that "
        "length does not reveal which answer is better.",
    )

    def row_lists(self) -> list[RowList]:
        return [
            RowList("data", "data", self.data, self.judged_refusal(), limit=self.limit, answer="max_new_tokens"),
        ]


STAGE = Stage(
    name="pairs",
    recipe=PairsRecipe,
    help="make preference data from a model's own answers",
    title="preference data",
    run="pairs.stage:run",
    check_rows="pairs.stage:check_rows",
    result=PAIRS,
    continues=SAMPLES,
    writes=(SAMPLES, RESULTS),
    smoke=(
        Shrink("", {"limit": 2, "num_generations": 2, "max_new_tokens": 16, "batch_size": 1}),
        Shrink("rewards", {"if_missing": "random"}, where="model"),
    ),
)
