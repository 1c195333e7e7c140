"""Evaluation of a policy on held-out prompts while it trains, and warnings about what goes wrong."""

import copy
import json
from itertools import combinations
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations.rewards.rule import RuleReward
from recipes.cli import main
from rl import run_warnings
from rl.config import RlRecipe
from rl.held_out import held_out_metrics, pass_at_k, sizes_of_k
from rl.rollouts.groups import JudgedAnswer
from rl.run_warnings import WINDOW, Warnings
from rl.stage import planned_config, train
from rl.trainer import PolicyTrainer

from ..helpers.broken_recipes import RECIPES, make_world
from ..helpers.rl import Vowels
from ..helpers.stages import (
    SECTIONS,
    assert_same_weights,
    byte_tokenizer,
    chat_model,
    conversations,
    lines,
    stopped_after,
)


class AnyDigit(RuleReward):
    """A verifier that a random model satisfies now and then."""

    def judge(self, answers):
        self.reasons = [None] * len(answers)
        return [float(any(letter.isdigit() for letter in answer.text)) for answer in answers]


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(drawn: tuple[int, int, int]) -> None:
    n, right, k = drawn
    answers = [place < right for place in range(n)]
    assert pass_at_k(n, right, k) == pytest.approx(fmean(any(chosen) for chosen in combinations(answers, k)))


def test_k_goes_up_to_n() -> None:
    assert [sizes_of_k(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_metrics_of_known_answers() -> None:
    def answer(right: float, other: float, finished: bool = True) -> JudgedAnswer:
        return JudgedAnswer({}, [0], [1] * 4, finished, [right, other], [None, None])

    nan = float("nan")
    groups = [[answer(1, 2), answer(0, 4)], [answer(1, nan, False), answer(1, 0)]]
    found = held_out_metrics(groups, ["number", "own"], [1.0, 0.5], [0])
    assert found == {
        "reward": pytest.approx((2 + 2 + 1 + 1) / 4), "rewards/number/mean": 0.75, "rewards/own/mean": 2.0,
        "avg@2": 0.75, "pass@1": 0.75, "pass@2": 1.0, "completions/mean_length": 4.0, "completions/clipped_ratio": 0.25,
    }  # fmt: skip
    assert not any("@" in name for name in held_out_metrics(groups, ["a", "b"], [1.0, 0.5], []))


def recipe(folder: Path, evaluates: bool = True, **changes: Any) -> RlRecipe:
    training = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "max_steps": 4,
        "learning_rate": 1e-2, "save_steps": 2, **changes.pop("training", {}),
    }  # fmt: skip
    held_out = {"eval_data": [{"path": "unused"}]} if evaluates else {}
    training = ({"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2} if evaluates else {}) | training
    sections = {**SECTIONS, "rewards": [{"rule": "number"}], "output_dir": str(folder), **held_out}
    return RlRecipe(**{**sections, "stage": "rl", "training": training, **changes})


def run(folder: Path, model: Any, evaluates: bool = True, resume_from: Path | None = None, **changes: Any) -> Any:
    return train(
        recipe(folder, evaluates, **changes),
        model=model,
        tokenizer=byte_tokenizer(),
        rows=conversations(16),
        eval_rows=conversations(5) if evaluates else None,
        rewards=[AnyDigit("number"), Vowels("vowels", 0.1)],
        run_dir=folder,
        resume_from=resume_from,
    )


def test_evaluation_changes_nothing_in_training(tmp_path: Path) -> None:
    start = chat_model()
    plain, evaluated, resumed = (copy.deepcopy(start) for _ in range(3))
    run(tmp_path / "plain", plain, evaluates=False)
    metrics = run(tmp_path / "evaluated", evaluated)
    assert_same_weights(plain, evaluated)
    logged = lines(tmp_path / "evaluated" / "metrics.jsonl")
    found = [line for line in logged if "eval_avg@2" in line]
    assert [line["step"] for line in found] == [1, 2, 3, 4] and metrics["eval_avg@2"] == found[-1]["eval_avg@2"]
    for line in found:
        assert line["eval_pass@1"] == pytest.approx(line["eval_avg@2"]) and line["eval_pass@2"] >= line["eval_pass@1"]
        parts = line["eval_rewards/number/mean"] + 0.1 * line["eval_rewards/vowels/mean"]
        assert line["eval_reward"] == pytest.approx(parts) and "reward" not in line
    checkpoint = stopped_after(tmp_path / "evaluated" / "checkpoint-2", tmp_path / "resumed")
    run(tmp_path / "resumed", resumed, resume_from=checkpoint)
    assert_same_weights(evaluated, resumed)
    again = [line for line in lines(tmp_path / "resumed" / "metrics.jsonl") if "eval_avg@2" in line]
    timed = ("eval_runtime", "eval_samples_per_second")
    assert [{k: v for k, v in line.items() if k not in timed} for line in again] == [
        {k: v for k, v in line.items() if k not in timed} for line in found
    ]


@pytest.mark.parametrize(("strategy", "on_start"), [("no", False), ("no", True), ("steps", False)])
def test_held_out_prompts_without_evaluations_are_named(
    strategy: str, on_start: bool, tmp_path: Path, capsys: Any
) -> None:
    training = {"max_steps": 1, "eval_strategy": strategy, "eval_on_start": on_start}
    metrics = run(tmp_path, chat_model(), training=training)
    told = "eval_data is not evaluated" in capsys.readouterr().err
    assert told == ("eval_reward" not in metrics) == (strategy == "no" and not on_start)


@pytest.mark.parametrize(("size", "batches"), [(2, [2] * 5), (4, [4, 4, 2])])
def test_held_out_prompts_are_answered_in_batches_of_evaluations_size(
    size: int, batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = PolicyTrainer.sampled_answers

    def spy(self: Any, rows: Any, n: int) -> Any:
        seen.extend([len(rows)] * (n == 2))  # training has 4 answers to a prompt
        return real(self, rows, n)

    monkeypatch.setattr(PolicyTrainer, "sampled_answers", spy)
    run(tmp_path, chat_model(), training={"max_steps": 1, "per_device_eval_batch_size": size})
    assert seen == batches


def test_the_best_checkpoint_is_that_of_held_out_prompts(tmp_path: Path) -> None:
    settings = {"load_best_model_at_end": True, "save_steps": 1}
    assert planned_config(recipe(tmp_path, training=settings)).metric_for_best_model == "pass@1"
    assert planned_config(recipe(tmp_path, rewards=[{"rule": "format"}])).metric_for_best_model == "reward"
    run(tmp_path, model := chat_model(), training={**settings, "metric_for_best_model": "rewards/vowels/mean"})
    found = {line["step"]: line for line in lines(tmp_path / "metrics.jsonl") if "eval_avg@2" in line}
    best = max(found, key=lambda step: (found[step]["eval_rewards/vowels/mean"], -step))
    kept = type(model).from_pretrained(tmp_path / f"checkpoint-{best}", dtype=model.dtype)
    assert_same_weights(model, kept)


def test_evaluation_needs_held_out_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make_world(tmp_path)
    (tmp_path / "rl.json").write_text(json.dumps(RECIPES["rl"]))
    assert main(["check", "rl.json", "training.eval_strategy=steps"]) == 2
    assert "there is no eval_data" in capsys.readouterr().err
    words = ["eval_data=[{path: bare.jsonl}]", "rewards=[{rule: number}]"]
    assert main(["check", "rl.json", *words]) == 2
    assert "bare.jsonl:1: has no reference" in capsys.readouterr().err


# --- warnings ---------------------------------------------------------------------------------------------------------

HEALTHY = {
    "loss": 0.1, "reward": 0.5, "entropy": 1.0, "kl": 0.01, "completions/clipped_ratio": 0.2,
    "frac_reward_zero_std": 0.4, "expert_load/dead": 0.0,
}  # fmt: skip
SICK = {
    "collapsed": {"entropy": 0.05}, "runaway": {"kl": 3.0}, "truncated": {"completions/clipped_ratio": 1.0},
    "equal": {"frac_reward_zero_std": 1.0}, "dead": {"expert_load/dead": 2.0},
}  # fmt: skip


def watched(*logs: dict[str, Any]) -> dict[str, str]:
    """What is said of a run with this log, each entry a step later."""
    callback = Warnings()
    for step, line in enumerate(logs, 1):
        callback.on_log(None, SimpleNamespace(global_step=step, is_world_process_zero=True), None, logs=line)
    return callback.said


@pytest.mark.parametrize("cause", SICK)
def test_a_warning_names_its_cause(cause: str, capsys: Any) -> None:
    before = [HEALTHY] * WINDOW
    assert watched(*before, *[{**HEALTHY, **SICK[cause]}] * (WINDOW - 1), HEALTHY) == {}
    capsys.readouterr()
    assert set(watched(*before, *[{**HEALTHY, **SICK[cause]}] * (WINDOW + 3))) == {cause}
    told = capsys.readouterr().err
    assert told.count("rl: warning at step") == 1  # once only
    assert {name.__name__ for name in run_warnings.CAUSES} == {*SICK, "hacked"}


def test_a_resumed_run_keeps_what_was_said_and_does_not_say_it_again(capsys: Any) -> None:
    log = [*[HEALTHY] * WINDOW, *[{**HEALTHY, **SICK["truncated"]}] * WINDOW]
    said = watched(*log, HEALTHY)
    capsys.readouterr()
    resumed = Warnings()
    history = [{**line, "step": step} for step, line in enumerate(log, 1)]
    resumed.on_train_begin(None, SimpleNamespace(log_history=history), None)
    state = SimpleNamespace(global_step=len(log) + 1, is_world_process_zero=True)
    resumed.on_log(None, state, None, logs={**HEALTHY, **SICK["truncated"]})
    resumed.on_log(None, state, None, logs=HEALTHY)
    assert set(said) == {"truncated"} and resumed.said == said
    assert "warning" not in capsys.readouterr().err


def test_a_reward_that_rises_while_right_answers_fall_is_named() -> None:
    good, bad = ({"eval_avg@4": value} for value in (0.8, 0.6))
    low, high = [{**HEALTHY, "reward": 0.3}] * WINDOW, [{**HEALTHY, "reward": 0.9}] * WINDOW
    assert set(watched(*low, good, *high, bad)) == {"hacked"}
    assert watched(*high, good, *low, bad) == {}  # both fall
    assert watched(*low, bad, *high, good) == {}  # both rise
    assert watched(*low, good, *high, {"eval_avg@4": 0.78}) == {}  # noise
