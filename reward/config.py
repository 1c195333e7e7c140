"""The recipe of a reward model. No torch."""

from typing import Literal

from pydantic import Field

from conversations.answers.usable_rows import no_pair, other_verdict
from conversations.row import Refuse
from conversations.run_files import METRICS
from conversations.sections import SupervisedRecipe
from conversations.stage import SMOKE_TRAINING, Shrink, Stage, Training


class RewardRecipe(SupervisedRecipe):
    """A reward model from preferences; `training` feeds trl.RewardConfig. `format.train_on` plays no part."""

    stage: Literal["reward"] = Field(description="Which stage this is.")
    loss: Literal["pairwise", "pointwise"] = Field(
        default="pairwise", description="Pairs of chosen and rejected, or single answers with a label or score."
    )

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
    smoke=(Shrink("training", {**SMOKE_TRAINING, "max_length": 256}),),
)
