"""Samples answers, also of several turns in an environment, with all that a rollout and an evaluation need of them."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from conversations.environments.episodes import Episode, Players
from conversations.environments.loading import Environment
from conversations.errors import ToolkitError
from conversations.generation.decoding import FIELDS
from conversations.rewards.base import Answer, Reward, Values
from conversations.row import Row
from deepseek_v2_modeling.inference import AfterTurn
from rl.rollouts.groups import NUMBER, SampledAnswers

# training.generation_kwargs that our own loop applies.
APPLIED = FIELDS | {"do_sample", "temperature", "eos_token_id", "max_new_tokens"}


class EnvironmentReward(Reward):
    """What the environment itself gives for an answer (`get_reward`)."""

    def __call__(self, prompts: list[list[Row]], completions: list[list[Row]], **columns: Any) -> Values:
        self.given: Sequence[float | None] = columns["environment_rewards"]
        return super().__call__(prompts, completions, **columns)

    def judge(self, answers: Sequence[Answer]) -> Values:
        return list(self.given)


def engine_of(args: GRPOConfig) -> str | None:
    """Another engine that the recipe asks for."""
    engines = ("use_vllm", "use_transformers_continuous_batching")
    return next((name for name in engines if getattr(args, name)), None)


def not_applied(args: GRPOConfig) -> list[str]:
    """Fields of `training` that only transformers' generate applies."""
    unknown = [f"generation_kwargs.{name}" for name in args.generation_kwargs or {} if name not in APPLIED]
    return unknown + (["cache_implementation"] if args.cache_implementation is not None else [])


def check_generation(args: GRPOConfig) -> None:
    """Raises ToolkitError for a field that transformers' generate would ignore without a word; vLLM has its own."""
    known = () if args.use_vllm else vars(GenerationConfig())
    for name in args.generation_kwargs or {}:
        if known and name not in known:
            near = get_close_matches(name, known, 1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise ToolkitError(f"training.generation_kwargs has {name!r}, which no generation config has{guess}")


def check_environment(args: GRPOConfig) -> None:
    """Raises ToolkitError if answers would not be sampled by our own loop, which alone keeps the cache over turns."""
    for name in filter(None, (engine_of(args), *not_applied(args))):
        raise ToolkitError(
            f"environment needs rollouts by the toolkit's own loop, which training.{name} rules out; leave one of the "
            "two out"
        )


class ActingPolicy(GRPOTrainer if TYPE_CHECKING else object):
    """The part of `PolicyTrainer` that samples answers to rows.

    after_turn: of the episodes that are being sampled.
    """

    # Of many types in transformers and TRL.
    args: Any
    accelerator: Any
    model: Any
    players: Players | None = None
    after_turn: AfterTurn | None = None

    def act_in(self, environment: Environment | None) -> None:
        """Sample answers in this environment from now on."""
        if environment is not None:
            self.players = Players(environment, self._tokenizer, self.args.max_tool_calling_iterations)

    def sampled_answers(self, rows: Sequence[Row], n: int) -> SampledAnswers:
        """An answer to each row, n of which follow each other to one prompt."""
        if self.players is not None:
            return self._acted(self.players, rows, n)
        prompt_ids = self._tokenize_prompts([row["prompt"] for row in rows])[0]
        ids, logps = self._generate_single_turn(prompt_ids, None, {}, n)
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return SampledAnswers(prompt_ids, ids, [[{"role": "assistant", "content": text}] for text in texts], logps)

    def _acted(self, players: Players, rows: Sequence[Row], n: int) -> SampledAnswers:
        episodes = players.begin([{key: value for key, value in row.items() if key != NUMBER} for row in rows])
        prompt_ids = self._tokenize_prompts(episodes.prompts)[0]
        self._check_room(max(map(len, prompt_ids)))
        self.after_turn = episodes.after_turn
        try:
            ids, logps = self._generate_single_turn(prompt_ids, None, {}, n)
        finally:
            self.after_turn = None
        episodes.finish(ids)
        completions = [episode.turns for episode in episodes.episodes]
        return SampledAnswers(prompt_ids, ids, completions, logps, episodes.episodes, episodes.rewards())

    def _check_room(self, longest: int) -> None:
        """Raises ToolkitError for a prompt that is too long with what `reset` has added to it."""
        positions, answer = self.model.config.max_position_embeddings, self.args.max_completion_length
        if longest + answer > positions:
            raise ToolkitError(
                f"environment: with what its reset adds, a prompt has {longest:,} tokens, and an answer of {answer:,} "
                f"(training.max_completion_length) exceeds the {positions:,} positions of the model; shorten one"
            )

    def count_calls(self, episodes: Sequence[Episode]) -> None:
        """Metrics of a rollout of all processes: calls an answer, the share of calls that failed, and that of answers
        whose last results found no room. The first two by TRL's names."""
        if not episodes:
            return
        numbers = [[episode.calls, episode.failures, episode.no_room, 1] for episode in episodes]
        sums = self.accelerator.gather(torch.tensor(numbers, dtype=torch.float32, device=self.accelerator.device))
        calls, failures, no_room, answers = sums.sum(0).tolist()
        metrics = self._metrics["train"]
        metrics["tools/call_frequency"].append(calls / answers)
        metrics["tools/failure_frequency"].append(failures / calls if calls else 0.0)
        metrics["tools/no_room"].append(no_room / answers)
