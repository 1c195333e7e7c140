"""An open-ended task in a recipe: answers that a judge or a reward model values. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from conversations.rewards.entry import RewardEntry
from conversations.run_files import SAMPLES
from conversations.sections import Section
from eval.benchmark import NEXT_TURN

OPEN_ENDED = "open_ended"
POINTS, WIN_RATE = "points", "win_rate"  # names of the measured value, without a baseline and with one


class OpenTask(Section):
    """Questions of one or more turns without a right answer, as in MT-Bench and AlpacaEval."""

    task: Literal["open_ended"] = Field(description="Questions whose answers a judge or a reward model values.")
    name: str = Field(default=OPEN_ENDED, pattern=r"^[a-z][a-z0-9_]*$", description="Name of the task in the results.")
    path: str = Field(
        min_length=1,
        description="The questions: rows with `turns` (MT-Bench; perhaps `question_id`, `category`, `reference`) or "
        "`instruction` (AlpacaEval).",
    )
    references: str | None = Field(
        default=None,
        min_length=1,
        description="Correct answers to some of the questions, which the judge is shown: rows with `question_id` and "
        "`choices`, as FastChat writes answers; they count instead of `reference` of the questions.",
    )
    reward: RewardEntry = Field(
        description="What values an answer, as in the rewards of rl: a language model (`judge`) or a reward model "
        "(`model`)."
    )
    baseline: str | None = Field(
        default=None,
        min_length=1,
        description="Answers to compare with: the directory of an evaluation that has this task, or a file with "
        "`question_id` and `choices` (FastChat) or `instruction` and `output` (AlpacaEval). null values each answer by "
        "itself.",
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=10,
        description="Sampling temperature, 0 is greedy; null is MT-Bench's: 0.7 for the categories writing and "
        "roleplay, 0.1 for stem and humanities, 0 for all others.",
    )
    limit: int | None = Field(
        default=None, ge=1, le=10**9, description="Use only this many questions, the first ones; null uses all."
    )
    max_new_tokens: int = Field(default=1024, ge=1, description="Maximum length of an answer, in tokens.")
    batch_size: int = Field(default=32, ge=1, description="Number of answers generated side by side.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=lambda: [NEXT_TURN],
        description="Strings before which an answer ends; by default the template's next turn, into which a base model "
        "runs on.",
    )

    @property
    def decoding(self) -> str:
        """The name of the measured value, which stands where that of other tasks says how answers are decoded."""
        return POINTS if self.baseline is None else WIN_RATE

    @property
    def values(self) -> list[str]:
        return [self.decoding]

    @model_validator(mode="after")
    def _can_be_valued(self) -> "OpenTask":
        reward = self.reward
        if reward.model is None and reward.judge is None:
            raise ValueError("reward: open-ended answers need a judge or a model (a reward model)")
        if reward.judge is not None and reward.judge.mode != "pointwise":
            raise ValueError("reward.judge.mode: leave it out; with `baseline` answers are compared, else valued alone")
        if reward.on_error == "zero":
            raise ValueError("reward.on_error: zero would count an answer as bad that nobody has judged; use skip")
        if reward.weight != 1:
            raise ValueError("reward.weight has no effect on a single reward; leave it out")
        if self.references is not None and reward.judge is None:
            raise ValueError("references are for a judge; a reward model reads none; leave them out")
        return self

    def files(self) -> dict[str, str]:
        """The files that it reads, by key."""
        named = {"path": self.path, "references": self.references, "baseline": self.baseline}
        if self.baseline is not None and Path(self.baseline).is_dir():
            named["baseline"] = str(Path(self.baseline) / SAMPLES)
        return {key: path for key, path in named.items() if path is not None}
