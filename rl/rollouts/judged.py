"""Rollouts that are judged before TRL makes a batch of them: groups with equal rewards can be replaced or left out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object

from conversations.answers.prompts import prompt_text
from conversations.errors import ToolkitError
from conversations.rewards.base import Reward
from conversations.row import Row
from deepseek_v2_modeling.inference import record_answers
from deepseek_v2_modeling.training import in_step
from rl.config import Replay, RolloutCorrection
from rl.phases import PhaseClock
from rl.rollouts.acting import ActingPolicy
from rl.rollouts.curriculum import CurriculumPrompts
from rl.rollouts.groups import (
    NUMBER,
    JudgedAnswer,
    OtherPrompts,
    SampledAnswers,
    equal_groups,
    is_right,
    judge_answers,
    left_out,
    verifiers_of,
)

SUMMED = "sum_then_normalize"  # TRL's default for several rewards
# How these make one loss of the answers of an update depends on how many tokens are trained on in each micro-batch.
COUNTS_WHAT_IS_LEFT = ("bnpo",)


class JudgedRollouts(ActingPolicy):
    """The part of `PolicyTrainer` that samples and judges answers; `GRPOTrainer` is then given them as from a rollout
    function.

    answers: of this process, while TRL turns them into a batch. unread: [B] bool, which of them are not scored then.
    """

    # Of many types in transformers and TRL.
    args: Any
    accelerator: Any
    num_generations: Any
    clock: PhaseClock
    rewards: list[Reward]
    eos_token_ids: list[int]
    max_rounds: int
    other_prompts: OtherPrompts
    rollout_correction: RolloutCorrection | None
    routing_replay: Replay
    balances: bool
    answers: Sequence[JudgedAnswer] = ()
    unread: torch.Tensor | None = None

    def check_dynamic_sampling(self) -> None:
        """Raises ToolkitError for an engine to which all processes must turn together, as often as each other."""
        if self.max_rounds and self.args.use_vllm and self.accelerator.num_processes > 1:
            raise ToolkitError("dynamic_sampling with training.use_vllm needs a single process; leave one of them out")

    @property
    def leaves_out_equal_groups(self) -> bool:
        """Whether answers with an advantage of 0 add nothing to any part of the loss, so that they need not be read."""
        args = self.args
        entropy = args.entropy_coef or args.use_adaptive_entropy or args.top_entropy_quantile < 1
        if self.beta or entropy or self.balances or args.loss_type in COUNTS_WHAT_IS_LEFT:
            return False
        return args.multi_objective_aggregation == SUMMED

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        with self.clock.phase("rollout"):
            self.answers = self._sampled(inputs)
            self.count_calls([answer.episode for answer in self.answers if answer.episode])
            equal = self._equal(self.answers)
            self._metrics["train"]["groups/left_out"].append(float(equal.sum()) * self.leaves_out_equal_groups)
            equal = equal.repeat_interleave(self.num_generations)[self._own(len(inputs))]
            if self.leaves_out_equal_groups:
                lengths = torch.tensor([len(answer.ids) for answer in self.answers], device=equal.device)
                self.unread = left_out(equal, lengths, self.args.per_device_train_batch_size)
            try:
                output = super()._generate_and_score_completions([answer.row for answer in self.answers])
            finally:
                self.answers, unread, self.unread = (), self.unread, None
        if self.multi_objective_aggregation == SUMMED:
            output["advantages"] = output["advantages"].masked_fill(equal, 0)  # TRL's are rounding errors
        if unread is not None:
            for mask in ("prompt_mask", "completion_mask"):
                output[mask] = output[mask].masked_fill(unread.unsqueeze(1), 0)
        return output

    def given_answers(self, prompts: Any, trainer: Any) -> dict[str, Any]:
        """TRL's rollout function: the answers that were sampled and judged; NaN for the log-probabilities of tokens
        that tools wrote, 0 in env_mask."""
        logps = [answer.logps for answer in self.answers]
        given: dict[str, Any] = {
            "prompt_ids": [answer.prompt_ids for answer in self.answers],
            "completion_ids": [answer.ids for answer in self.answers],
            "logprobs": None if None in logps else logps,
        }
        episodes = [answer.episode for answer in self.answers if answer.episode]
        if episodes:
            pairs = zip(episodes, given["completion_ids"], strict=True)
            given["env_mask"] = [episode.own(len(ids)) for episode, ids in pairs]
        return given

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As TRL's, but the answers to a prompt stay side by side: TRL shuffles them over micro-batches. Prompts are
        in a random order as they come."""
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = split_rows(self._generate_and_score_completions(generation_batch), steps)
        return self._buffered_inputs[self._step % steps]

    def _own(self, rows: int) -> slice:
        """The places of this process's answers among those of all."""
        start = self.accelerator.process_index * rows
        return slice(start, start + rows)

    def _sampled(self, rows: Sequence[Row]) -> list[JudgedAnswer]:
        """An answer for each row, or for those that the curriculum and dynamic sampling take in their place."""
        rows = self._drawn(rows)
        answers = self._answer(rows)
        self._learn(answers)
        if self.max_rounds:
            self._replace_equal_groups(rows, answers)
        if isinstance(self.other_prompts, CurriculumPrompts):
            for name, value in self.other_prompts.figures().items():
                self._metrics["train"][f"curriculum/{name}"].append(value)
        return answers

    def _replace_equal_groups(self, rows: Sequence[Row], answers: list[JudgedAnswer]) -> None:
        """Sample groups with one reward for all again for other prompts, in at most `max_rounds` rounds."""
        taken: set[str] | None = None
        rounds = replaced = 0
        first = self._own(len(rows)).start
        while rounds < self.max_rounds and (equal := self._equal(answers).nonzero().flatten().tolist()):
            taken = set(gather_object([prompt_text(row["prompt"]) for row in rows])) if taken is None else taken
            others = self.other_prompts.replacements(equal, taken)
            if not others:
                break
            of_group = [(place, (first + place) // self.num_generations) for place in range(len(rows))]
            new = {place: others[group] for place, group in of_group if group in others}
            redrawn = self._answer(list(new.values()))
            self._learn(redrawn)
            for place, answer in zip(new, redrawn, strict=True):
                answers[place] = answer
            rounds, replaced = rounds + 1, replaced + len(others)
        left = float(self._equal(answers).sum())
        for name, value in (("rounds", rounds), ("replaced", replaced), ("still_equal", left)):
            self._metrics["train"][f"dynamic_sampling/{name}"].append(float(value))

    def _drawn(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows to answer instead of those that the data loader gave, if there is a curriculum."""
        if not isinstance(self.other_prompts, CurriculumPrompts):
            return rows
        groups = self.other_prompts.draw(len(rows) * self.accelerator.num_processes // self.num_generations)
        own = self._own(len(rows))
        return [groups[place // self.num_generations] for place in range(own.start, own.stop)]

    def _learn(self, answers: Sequence[JudgedAnswer]) -> None:
        """Tell the curriculum, if there is one, what became of answers; on all processes that of all."""
        if not isinstance(self.other_prompts, CurriculumPrompts):
            return
        verifiers = verifiers_of(self.rewards)
        self.other_prompts.learn(
            gather_object([(answer.row[NUMBER], is_right(answer, verifiers)) for answer in answers])
        )

    def _answer(self, rows: Sequence[Row]) -> list[JudgedAnswer]:
        """Sample an answer to each row's prompt and judge it."""
        with record_answers(prompts=self.routing_replay == "rollout") as record, in_step(self.model):
            sampled = self.sampled_answers(rows, self.num_generations) if rows else None
        if sampled is None:
            return []
        answers = self._judge(rows, sampled)
        logps = sampled.logps or record.logps
        if self.rollout_correction and not logps:
            raise ToolkitError(
                "rollout_correction needs the log-probabilities of the tokens that were sampled, which transformers' "
                "generate does not give: leave it out, or the fields of training that this sampling is for"
            )
        unknown = [None] * len(answers)
        columns = (logps or unknown, record.routes or unknown, record.prompt_routes or unknown)
        return [
            replace(answer, logps=of_tokens, routes=experts, prompt_routes=of_prompt)
            for answer, of_tokens, experts, of_prompt in zip(answers, *columns, strict=True)
        ]

    def _judge(self, rows: Sequence[Row], sampled: SampledAnswers) -> list[JudgedAnswer]:
        with self.clock.phase("rewards"):
            return judge_answers(self.rewards, rows, sampled, self.eos_token_ids)

    def _values(self, answers: Sequence[JudgedAnswer]) -> torch.Tensor:
        """[answers, rewards], NaN where a reward gave no score."""
        return torch.tensor([answer.values for answer in answers], device=self.accelerator.device)

    def _equal(self, answers: Sequence[JudgedAnswer]) -> torch.Tensor:
        """[groups of all processes] bool. Where each reward is normalised by itself, groups that are equal in all."""
        values = self.accelerator.gather(self._values(answers))
        weights = self.reward_weights.to(values.device)
        alone = values.shape[1] if self.multi_objective_aggregation != SUMMED else 1
        parts = zip(values.tensor_split(alone, 1), weights.tensor_split(alone), strict=True)
        return torch.stack([equal_groups(*part, self.num_generations) for part in parts]).all(0)


def split_rows(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """A batch of tensors [B, ...] as so many batches of B / parts rows, in order; numbers are in each."""
    size = len(batch["advantages"]) // parts
    return [
        {name: t if t.ndim == 0 else t[part * size : (part + 1) * size] for name, t in batch.items()}
        for part in range(parts)
    ]
