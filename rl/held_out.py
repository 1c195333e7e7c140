"""Evaluation of the policy on held-out prompts while it trains: avg@n and pass@k."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import speed_metrics

from conversations.answers.repeated import pass_at_k, sizes_of_k
from conversations.rewards.base import Reward
from conversations.row import Row
from deepseek_v2_modeling.inference import evaluation_mode
from deepseek_v2_modeling.training import in_step
from rl.rollouts.acting import ActingPolicy
from rl.rollouts.groups import JudgedAnswer, is_right, judge_answers, verifiers_of


def held_out_metrics(
    groups: Sequence[Sequence[JudgedAnswer]], names: Sequence[str], weights: Sequence[float], verifiers: Sequence[int]
) -> dict[str, float]:
    """The metrics of n answers to each prompt: the mean reward and its terms, avg@n, pass@k, length and the share that
    was cut off. A value that a reward did not give is left out; it is not right."""
    answers = [answer for group in groups for answer in group]
    totals = [_weighted(answer, weights) for answer in answers]
    metrics = {"reward": _mean(totals)}
    metrics |= {f"rewards/{name}/mean": _mean([a.values[place] for a in answers]) for place, name in enumerate(names)}
    if verifiers:
        n = len(groups[0])
        right = [sum(is_right(a, verifiers) for a in group) for group in groups]
        metrics[f"avg@{n}"] = sum(right) / len(answers)
        metrics |= {f"pass@{k}": _mean([pass_at_k(n, count, k) for count in right]) for k in sizes_of_k(n)}
    metrics["completions/mean_length"] = _mean([float(len(answer.ids)) for answer in answers])
    metrics["completions/clipped_ratio"] = _mean([float(not answer.finished) for answer in answers])
    return metrics


def _weighted(answer: JudgedAnswer, weights: Sequence[float]) -> float:
    parts = [weight * value for weight, value in zip(weights, answer.values, strict=True) if not math.isnan(value)]
    return sum(parts) if parts else math.nan


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


class HeldOutPrompts(ActingPolicy):
    """The part of `PolicyTrainer` that evaluates: `num_generations_eval` answers to each row of eval_dataset, sampled
    as in training, but always from the same random numbers, and judged by the recipe's rewards."""

    # Of many types in transformers and TRL.
    args: Any
    accelerator: Any
    model: Any
    eval_dataset: Any
    num_generations_eval: Any
    rewards: list[Reward]
    eos_token_ids: list[int]

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        began = time.time()
        rows = list(self.eval_dataset if eval_dataset is None else eval_dataset)
        with evaluation_mode(self.model):
            groups = gather_object(
                self._answered(rows[self.accelerator.process_index :: self.accelerator.num_processes])
            )
            names, weights = self.reward_func_names, [reward.weight for reward in self.rewards]
            found = held_out_metrics(groups, names, weights, verifiers_of(self.rewards))
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            metrics |= speed_metrics(metric_key_prefix, began, num_samples=len(rows))
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _answered(self, rows: Sequence[Row]) -> list[list[JudgedAnswer]]:
        """The answers to each row. Training's random numbers go on as if there had been none."""
        n = self.num_generations_eval
        at_once = max(1, self.args.per_device_eval_batch_size // n)
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        groups: list[list[JudgedAnswer]] = []
        with torch.random.fork_rng(devices=devices), in_step(self.model):
            torch.manual_seed(self.args.seed)
            for start in range(0, len(rows), at_once):
                asked = [row for row in rows[start : start + at_once] for _ in range(n)]
                answers = judge_answers(self.rewards, asked, self.sampled_answers(asked, n), self.eos_token_ids)
                groups += [answers[place : place + n] for place in range(0, len(answers), n)]
        return groups
