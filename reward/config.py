"""Recipe schema and stage definition of reward models. Imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from conversations.answers.usable_rows import no_pair, other_verdict
from conversations.row import Refuse
from conversations.run_files import METRICS
from conversations.sections import SupervisedRecipe
from conversations.stage import SMOKE_TRAINING, Shrink, Stage, Training

CENTER_REWARDS = 0.01  # the value that TRL recommends


class RewardRecipe(SupervisedRecipe):
    """Training of a reward model; `training` feeds trl.RewardConfig, with center_rewards_coefficient 0.01 by default.
    `format.train_on` has no effect."""

    stage: Literal["reward"] = Field(description="Which stage this is.")
    loss: Literal["pairwise", "pointwise"] = Field(
        default="pairwise", description="Pairs of chosen and rejected, or single answers with a label or score."
    )
    heads: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Number of score heads on one backbone, each trained on its own bootstrap sample of the rows; in "
        "rl, `combine` says how their scores are combined.",
    )
    sft_coefficient: float = Field(
        default=0.0,
        ge=0,
        description="Weight of an additional language-model loss on the chosen answer, computed with the frozen head "
        "of the chat model that the reward model starts from (GRM, Yang et al. 2024).",
    )
    prefix_coefficient: float = Field(
        default=0.0,
        ge=0,
        description="Weight of an additional pairwise loss at every token from the first in which two answers differ, "
        "as in DeepSpeed-Chat.",
    )

    @model_validator(mode="after")
    def _pairs_for_what_compares(self) -> "RewardRecipe":
        for name in ("sft_coefficient", "prefix_coefficient"):
            if getattr(self, name) and self.loss != "pairwise":
                raise ValueError(f"{name} is for loss: pairwise; here single answers are judged")
        if self.training.get("center_rewards_coefficient") and self.loss != "pairwise":
            raise ValueError("training.center_rewards_coefficient is for loss: pairwise; leave it out")
        return self

    @property
    def score_heads(self) -> int:
        return self.heads

    @property
    def sequences_per_row(self) -> int:
        return 2 if self.loss == "pairwise" else 1

    @property
    def reads_lm_head(self) -> bool:
        return self.sft_coefficient > 0

    def refusal(self) -> Refuse:
        return other_verdict() if self.loss == "pointwise" else no_pair


STAGE = Stage(
    name="reward",
    recipe=RewardRecipe,
    help="train a reward model",
    title="reward model",
    run="reward.stage:run",
    training=Training(
        config="RewardConfig",
        head="score",
        planned_config="reward.stage:planned_config",
        rehearsal="reward.stage:rehearsal",
    ),
    encode="reward.data:encoder",
    writes=(METRICS,),
    signs=("margin", "eval_margin"),
    smoke=(
        Shrink("", {"parallel": None}),
        Shrink("training", {**SMOKE_TRAINING, "max_length": 256}),
    ),
)
