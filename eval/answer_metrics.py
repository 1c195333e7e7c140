"""Metrics of a model's answers: each yields lists of samples, a few batches at a time."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from conversations.answers.many import Asked
from conversations.answers.prompts import prompt_of, prompt_text
from conversations.answers.rules import MEASURED, find_rule
from conversations.errors import ToolkitError
from conversations.generation.generating import Generated
from conversations.generation.sample_files import Sample
from conversations.rewards.base import Answer
from conversations.rewards.judge import JudgeReward
from conversations.rewards.terms import judge_reward
from conversations.row import Row
from eval.config import EvalTask, decoding_name
from eval.judging import READS, judged_by
from eval.subject import Numbered, Subject, answers_to, rendered_prompt

CHUNK_BATCHES = 4  # batches of answers to generate before judging and writing them
# The verdicts as keys of samples: value, reason, and what a rule that looks for an answer has read.
VerdictsOn = Callable[[Numbered, Sequence[Generated]], list[dict[str, Any]]]


def exact_match(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """The score of the task's rule for each answer, for example 1 if the answer matches the reference."""
    return _judged_answers(task, rows, subject, _by_rule(task.rule, task.settings))


def refusal(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """1 if a sentence of the answer matches a refusal pattern."""
    return _judged_answers(task, rows, subject, _by_rule("refusal", {"patterns": task.patterns}))


def format_share(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """1 if the answer is well formed and, if the task has patterns, matches one of them as a whole."""
    settings = {"patterns": task.patterns, "finished": True}  # truncation is reported separately
    return _judged_answers(task, rows, subject, _by_rule("format", settings))


def judge_score(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """The verdict of a language model, from 0 to 1."""
    assert task.judge is not None
    reward = judge_reward(task.judge, subject.run_dir)
    yield from _judged_answers(task, rows, subject, _by_judge(reward))
    print(f"eval: {task.name}: {reward.summary()}", file=sys.stderr, flush=True)


def environment_reward(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """What the environment itself gives for the answer; 0 if it gives none."""
    return _judged_answers(task, rows, subject, _by_environment)


def _judged_answers(
    task: EvalTask, rows: Numbered, subject: Subject, verdicts_on: VerdictsOn
) -> Iterator[list[Sample]]:
    """Yield judged answers to every row at every temperature, a few batches at a time."""
    size = CHUNK_BATCHES * task.batch_size
    for temperature in task.temperatures:
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            answers = answers_to(task, chunk, subject, temperature)
            yield [
                _sample(number, row, decoding_name(temperature), answer, verdict)
                | rendered_prompt(task, row, number, subject)
                for (number, row), answer, verdict in zip(chunk, answers, verdicts_on(chunk, answers), strict=True)
            ]


def _by_rule(rule: str, settings: Mapping[str, Any]) -> VerdictsOn:
    compares = find_rule(rule).needs_reference
    measured = [key for key in MEASURED if key in find_rule(rule).settings]
    shown = ("read", "value", "reason") if rule in READS else ("value", "reason")

    def verdicts_on(rows: Numbered, answers: Sequence[Generated]) -> list[dict[str, Any]]:
        inputs = [
            Asked(
                answer.text,
                prompt_of(row, number + 1),
                row["reference"] if compares else None,
                {**{key: getattr(answer, key) for key in measured}, **settings},
            )
            for (number, row), answer in zip(rows, answers, strict=True)
        ]
        return [{key: judged.shown[key] for key in shown} for judged in judged_by(rule, inputs)]

    return verdicts_on


def _by_judge(reward: JudgeReward) -> VerdictsOn:
    def verdicts_on(rows: Numbered, answers: Sequence[Generated]) -> list[dict[str, Any]]:
        to_judge = [
            Answer(prompt_of(row, number + 1), answer.text, answer.finished, row.get("reference"), answer.tokens)
            for (number, row), answer in zip(rows, answers, strict=True)
        ]
        values = reward.judge(to_judge)
        return [{"value": value, "reason": reason} for value, reason in zip(values, reward.reasons, strict=True)]

    return verdicts_on


def _by_environment(rows: Numbered, answers: Sequence[Generated]) -> list[dict[str, Any]]:
    outside = next((a.reward for a in answers if a.reward is not None and not 0 <= a.reward <= 1), None)
    if outside is not None:
        raise ToolkitError(f"the metric environment takes rewards from 0 to 1, and get_reward gave {outside:g}")
    none = {"value": 0.0, "reason": "the environment gave no reward"}
    return [none if answer.reward is None else {"value": answer.reward, "reason": "get_reward"} for answer in answers]


def _sample(number: int, row: Row, decoding: str, answer: Generated, verdict: Mapping[str, Any]) -> Sample:
    copied = {key: row[key] for key in ("reference", "meta") if row.get(key) is not None}
    prompt = prompt_text(prompt_of(row, number + 1))
    return {
        "row": number,
        "decoding": decoding,
        "prompt": prompt,
        "completion": answer.text,
        "truncated": not answer.finished,
        "tokens": answer.tokens,
        **verdict,
        **({} if answer.turns is None else {"turns": answer.turns, "environment_reward": answer.reward}),
        **copied,
    }
