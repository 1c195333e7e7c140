"""Reinforcement learning with GRPO: samples answers to prompts, scores them with rewards, and trains the policy."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig

from conversations.answers.prompts import prompt_row
from conversations.answers.rules import needs_reference
from conversations.environments.episodes import try_reset
from conversations.environments.loading import Environment
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer, Reward, Values
from conversations.rewards.entry import RewardEntry
from conversations.rewards.model import RewardModelReward
from conversations.rewards.terms import check_references, check_rewards, opened_rewards
from conversations.row import Row
from conversations.stage import Work
from deepseek_v2_modeling.training import RunLimits, training_arguments
from rl.config import RlRecipe
from rl.rollouts.acting import EnvironmentReward, check_environment, check_generation, engine_of, not_applied
from rl.rollouts.groups import NUMBER
from rl.rollouts.vllm_engine import check_vllm
from rl.sharding import check_sharding
from rl.trainer import PolicyTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGED_AT_END = ("reward", "kl", "entropy", "completions/mean_length")


def run(recipe: RlRecipe, work: Work) -> dict[str, Any]:
    """Run `train` with the data and models that `dsv2` has loaded; returns its results."""
    environment = environment_of(recipe)
    with opened_rewards(recipe.rewards, work.others, work.run_dir) as rewards:
        return train(
            recipe,
            model=work.model,
            tokenizer=work.tokenizer,
            rows=work.rows["data"],
            eval_rows=work.rows.get("eval_data"),
            rewards=rewards,
            environment=environment,
            run_dir=work.run_dir,
            resume_from=work.resume_from,
        )


def train(
    recipe: RlRecipe,
    *,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Row],
    rewards: Sequence[Reward],
    run_dir: Path,
    eval_rows: Iterable[Row] | None = None,
    environment: Environment | None = None,
    resume_from: Path | None,
) -> dict[str, Any]:
    """Train `model` with GRPO; writes metrics.jsonl, samples.jsonl, checkpoints and final/ into `run_dir`.

    Args:
        rows: canonical rows; the prompt is everything before the last answer, and `reference` is passed to the rewards.
        rewards: the terms of the reward, with their weights.
        eval_rows: held-out rows of the same kind, for avg@n and pass@k while training.
        environment: in which the model answers, whose own reward is one more term.
        resume_from: a checkpoint of the same run to resume from.

    Returns:
        Optimizer steps, seconds, tokens, the last logged values of the reward, its terms, KL, entropy (nats) and mean
        answer length (tokens), those of held-out prompts, and the warnings that were printed.

    Raises:
        ToolkitError: a row has no question, or a reward is unavailable or gives no scores.
        StopRequested: a signal ended training early, after writing a checkpoint.
    """
    given: dict[str, Any] = {"rows": rows, "eval_rows": eval_rows, "run_dir": run_dir}
    if environment is not None and environment.rewards:
        rewards = [*rewards, EnvironmentReward(environment.name)]
    given |= {"rewards": rewards, "environment": environment}
    trainer = build_trainer(recipe, model=model, tokenizer=tokenizer, **given)
    for reward in rewards:
        if isinstance(reward, RewardModelReward):
            reward.move(trainer.accelerator.device)
    if trainer.is_world_process_zero():
        data: Any = trainer.train_dataset
        terms = " + ".join(f"{reward.weight:g} {reward.name}" for reward in rewards)
        print(f"rl: {len(data):,} prompts; reward = {terms}", file=sys.stderr)
        if recipe.eval_data and trainer.args.eval_strategy == "no" and not trainer.args.eval_on_start:
            print("rl: eval_data is not evaluated, because training.eval_strategy is no", file=sys.stderr)
        if trainer.replays_nothing:
            print(
                "rl: routing_replay: update has nothing to replay, with one update on each rollout; it is for "
                "training.num_iterations, or training.steps_per_generation above training.gradient_accumulation_steps",
                file=sys.stderr,
            )
    output = trainer.train(resume_from)
    trainer.finish(recipe.model.dtype)
    if trainer.players is not None:
        trainer.players.close()
    for reward in rewards:
        if trainer.is_world_process_zero() and (summary := reward.summary()):
            print(f"rl: {reward.name}: {summary}", file=sys.stderr)
    totals = {"steps": output.global_step, "seconds": trainer.seconds, "tokens": trainer.tokens}
    said = list(trainer.warnings.said.values())
    return {**totals, **last_logged(trainer.state.log_history), **({"warnings": said} if said else {})}


def build_trainer(
    recipe: RlRecipe,
    *,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Row],
    rewards: Sequence[Reward],
    run_dir: Path,
    eval_rows: Iterable[Row] | None = None,
    environment: Environment | None = None,
) -> PolicyTrainer:
    """The trainer that `train` runs; raises ToolkitError if the rows do not suit the recipe."""
    datasets.disable_progress_bars()
    data = prompt_dataset(rows)
    held_out = prompt_dataset(eval_rows) if eval_rows else None
    for prompts in (data, held_out) if held_out is not None else (data,):
        check_references(rewards, [{"reference": reference} for reference in prompts["reference"]])
    limits = run_limits(recipe)
    arguments = grpo_config(recipe, run_dir, limits, rewards)
    check_prompts(recipe, arguments, len(data))
    check_curriculum(recipe, data["reference"])
    return PolicyTrainer(
        model,
        arguments,
        rewards,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        limits=limits,
        max_rounds=recipe.dynamic_sampling.max_rounds if recipe.dynamic_sampling else 0,
        rollout=recipe.rollout,
        rollout_correction=recipe.rollout_correction,
        environment=environment,
        routing_replay=recipe.routing_replay,
        curriculum=recipe.curriculum,
    )


class Indifferent(Reward):
    """Gives all answers the same score, for a rehearsal; the recipe's own rewards are checked separately."""

    def __init__(self, name: str, entry: RewardEntry | None = None):
        super().__init__(name, 1.0 if entry is None else entry.weight)
        self.verifies = bool(entry and entry.rule and needs_reference(entry.rule))

    def judge(self, answers: Sequence[Answer]) -> Values:
        return [1.0] * len(answers)


def rehearsal(recipe: RlRecipe, model: Any, tokenizer: "PreTrainedTokenizerBase", run_dir: Path) -> PolicyTrainer:
    """The trainer of a run on two toy rows, used to check a recipe. vLLM is checked with the rows: it needs a model on
    disk."""
    check_sampling(recipe)
    recipe = recipe.model_copy(update={"training": {**recipe.training, "use_vllm": False}})
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": messages, "reference": "1"}] * 2
    rewards = [Indifferent(str(index), entry) for index, entry in enumerate(recipe.rewards)]
    rewards = rewards or [Indifferent("0")]  # in place of the environment's own
    given: dict[str, Any] = {"rows": rows, "eval_rows": rows if recipe.eval_data else None, "rewards": rewards}
    return build_trainer(recipe, model=model, tokenizer=tokenizer, **given, run_dir=run_dir)


def run_limits(recipe: RlRecipe) -> RunLimits:
    """The conditions under which the recipe's run stops early."""
    return RunLimits(recipe.on_nan, recipe.max_seconds, recipe.max_tokens, recipe.early_stopping_patience)


def check_rows(recipe: RlRecipe, name: str, rows: Sequence[Row]) -> None:
    """Raise ToolkitError if the rows of `data` as a whole cannot be used: too few prompts, or no references for a
    reward."""
    if name != "data":
        return
    check_rewards(recipe.rewards, rows)
    check_sampling(recipe)
    check_vllm(planned_config(recipe))
    if (environment := environment_of(recipe)) and rows:
        try_reset(environment, rows[0])
    check_curriculum(recipe, [row.get("reference") for row in rows])
    check_prompts(recipe, planned_config(recipe), len(rows))


def check_sampling(recipe: RlRecipe) -> None:
    """Raise ToolkitError if answers cannot be sampled as the recipe asks."""
    arguments = planned_config(recipe)
    check_generation(arguments)
    other_loops = filter(None, (engine_of(arguments), *not_applied(arguments)))
    check_sharding(arguments, recipe.parallel is not None, other_loops)
    if recipe.environment is not None:
        check_environment(arguments)


def environment_of(recipe: RlRecipe) -> Environment | None:
    """The environment of a recipe.

    Raises:
        ToolkitError: it cannot be loaded, or neither it nor the recipe has a reward.
    """
    if recipe.environment is None:
        return None
    environment = recipe.environment.load()
    if not recipe.rewards and not environment.rewards:
        raise ToolkitError(
            f"rewards: there are none, and the environment {environment.written} has no get_reward; give one of the two"
        )
    return environment


def check_prompts(recipe: RlRecipe, arguments: GRPOConfig, prompts: int) -> None:
    """Raise ToolkitError if there are fewer prompts than one rollout needs: TRL would silently train on nothing."""
    assert arguments.generation_batch_size and arguments.num_generations
    needed = arguments.generation_batch_size // arguments.num_generations
    if prompts < needed:
        raise ToolkitError(
            f"data: {prompts:,} prompts are fewer than the {needed:,} that one rollout takes "
            f"({arguments.generation_batch_size:,} answers, {arguments.num_generations} to a prompt); lower "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps, or give more rows"
        )
    for name in ("dynamic_sampling", "curriculum"):
        if getattr(recipe, name) and prompts == needed:
            raise ToolkitError(
                f"{name}: each rollout takes all {prompts:,} prompts, so that there are no others to draw; give more "
                "rows, or leave it out"
            )


def check_curriculum(recipe: RlRecipe, references: Sequence[str | None]) -> None:
    """Raise ToolkitError if a curriculum could not tell right answers to some prompts from wrong ones."""
    missing = sum(reference is None for reference in references)
    if recipe.curriculum and missing:
        raise ToolkitError(
            f"curriculum: {missing:,} of the {len(references):,} rows have no reference, by which right answers are "
            "counted; give them one (data.0.columns: {reference: NAME}), or leave the curriculum out"
        )


def prompt_dataset(rows: Iterable[Row]) -> Dataset:
    """A data set with the columns prompt (messages), reference (text or null) and number (of the row, from 0).

    Raises:
        ToolkitError: there are no rows, or a row has no question.
    """
    entries = [{**prompt_row(row, number), NUMBER: number - 1} for number, row in enumerate(rows, 1)]
    if not entries:
        raise ToolkitError("data: there are no prompts to train on")
    return Dataset.from_list(entries)


def grpo_config(
    recipe: RlRecipe, run_dir: Path, limits: RunLimits, rewards: Sequence[Reward | RewardEntry]
) -> GRPOConfig:
    """TRL's config: the recipe's `training` plus the fields that the toolkit sets."""
    judged = any(entry.rule and needs_reference(entry.rule) for entry in recipe.rewards)
    by = {"metric_for_best_model": "pass@1" if judged else "reward"} if recipe.eval_data else {}
    arguments = training_arguments(
        {"disable_dropout": True, **by, **recipe.training},
        run_dir=run_dir,
        seed=recipe.seed,
        dtype=recipe.model.dtype,
        limits=limits,
        has_eval=bool(recipe.eval_data),
    )
    return GRPOConfig(**arguments, reward_weights=[reward.weight for reward in rewards])


def planned_config(recipe: RlRecipe) -> GRPOConfig:
    """The TRL config that the recipe's run will use."""
    return grpo_config(recipe, Path(recipe.output_dir), run_limits(recipe), recipe.rewards)


def last_logged(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last logged value of each metric that summarizes the run."""
    last: dict[str, float] = {}
    for line in history:
        kept = (*LOGGED_AT_END, "eval_reward")
        last |= {key: line[key] for key in line if key in kept or key.endswith("/mean") or "@" in key}
    return last
