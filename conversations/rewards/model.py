"""A reward model as a reward."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conversations import render_conversation
from conversations.answers.combining import COMBINE, Combine
from conversations.answers.prompts import prompt_text
from conversations.answers.reward_stats import RewardStats
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer, OnError, Reward, Values
from deepseek_v2_modeling.inference import score_heads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_STD = 1e-6


class RewardModelReward(Reward):
    """A reward model's score of the conversation that ends with the answer, normalised, then clipped. A truncated
    answer is scored without an end token.

    Args:
        model: a DeepseekV2ForSequenceClassification in evaluation mode, with one label for each head.
        tokenizer: the reward model's own.
        stats: the mean and standard deviation to normalise with; None leaves the scores as they are.
        clip: clip to [-clip, clip]; None does not clip.
        combine: how the normalised scores of several heads are combined.
        device: where the model runs whatever the stage's device is; None for that one.

    Raises:
        ToolkitError: the statistics are for a different number of heads.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        stats: RewardStats | None = None,
        clip: float | None = None,
        combine: Combine = "mean",
        weight: float = 1.0,
        on_error: OnError = "error",
        batch_size: int = 128,
        device: str | None = None,
    ):
        super().__init__(name, weight, on_error)
        self.model = model
        self.tokenizer: Any = tokenizer
        self.stats = stats
        self.clip = clip
        self.combine: Combine = combine
        heads = model.config.num_labels
        self.head_stats = [None] * heads if stats is None else stats.by_head
        if len(self.head_stats) != heads:
            raise ToolkitError(
                f"the reward model {name} has {heads} heads and statistics of {len(self.head_stats)}; train it again"
            )
        self.batch_size, self.device = batch_size, device

    def move(self, device: Any) -> None:
        """To the device of the stage, or to its own if it has one."""
        self.model.to(self.device or device)

    def judge(self, answers: Sequence[Answer]) -> Values:
        """Scores each distinct conversation once, since a trained policy often repeats its answers.

        Raises:
            ToolkitError: a conversation is longer than the reward model's positions.
        """
        places = {_key(answer): i for i, answer in enumerate(answers)}
        ids = [self._ids(answers[i]) for i in places.values()]
        longest, positions = max(map(len, ids), default=0), self.model.config.max_position_embeddings
        if longest > positions:
            raise ToolkitError(
                f"a conversation of {longest:,} tokens is longer than the {positions:,} positions of the reward model "
                "(max_position_embeddings); allow shorter answers, leave out long prompts, or train a reward model on "
                "a base with more positions"
            )
        scores = score_heads(self.model, ids, pad_token_id=self.tokenizer.pad_token_id, batch_size=self.batch_size)
        by_place = {place: self._value(heads) for place, heads in zip(places, scores, strict=True)}
        return [by_place[_key(answer)] for answer in answers]

    def _value(self, heads: Sequence[float]) -> float:
        """Normalise each head before combining them, because heads differ in scale and offset; then clip."""
        scores = [normalised(score, stats, None) for score, stats in zip(heads, self.head_stats, strict=True)]
        return normalised(COMBINE[self.combine](scores), None, self.clip)

    def _ids(self, answer: Answer) -> list[int]:
        turns = [*answer.prompt, {"role": "assistant", "content": answer.text}]
        ids = render_conversation(turns, self.tokenizer)["input_ids"]
        return ids if answer.finished else ids[:-1]


def _key(answer: Answer) -> tuple[str, str, bool]:
    """Everything that a reward model's score of an answer depends on."""
    return prompt_text(answer.prompt), answer.text, answer.finished


def normalised(score: float, stats: RewardStats | None, clip: float | None) -> float:
    """(score - mean) / std, clipped to [-clip, clip]. NaN stays NaN."""
    if stats is not None:
        score = (score - stats.mean) / max(stats.std, MIN_STD)
    return score if clip is None or math.isnan(score) else max(-clip, min(clip, score))
