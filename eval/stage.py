"""Evaluation: generates answers to held-out prompts, judges them, and records every answer."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from conversations import render_conversation
from conversations.answers.combining import COMBINE
from conversations.answers.intervals import mean_interval
from conversations.answers.judging import is_pair, judge
from conversations.answers.many import Asked, verify_all
from conversations.answers.prompts import prompt_of, prompt_text
from conversations.answers.rules import MEASURED, check_reference, find_rule
from conversations.answers.usable_rows import not_judged
from conversations.answers.verdict import Verdict
from conversations.errors import ToolkitError
from conversations.generation.generating import Generated, generate_texts, padding_of, print_obeyed, seed_of
from conversations.generation.sample_files import Place, Sample, SampleFiles
from conversations.rewards.base import Answer
from conversations.rewards.judge import JudgeReward
from conversations.rewards.terms import judge_reward
from conversations.row import JUDGED, PAIR, RANKED, VERDICTS, Row
from conversations.stage import Work
from deepseek_v2_modeling.inference import score_heads, token_losses
from deepseek_v2_modeling.training import append_lines, read_lines, write_lines
from eval.agreement import agreement, remark
from eval.config import UNSAMPLED_METRICS, EvalRecipe, EvalTask, decoding_name

Numbered = Sequence[tuple[int, Row]]  # rows with their number in the task, from 0
UNSAMPLED = "value"
LOSS = "loss"
PLACE = ("task", "decoding", "row")  # keys that identify a sample
CHUNK_BATCHES = 4  # batches of answers to generate before judging and writing them


VerdictsOn = Callable[[Numbered, Sequence[Generated]], list[Verdict]]


@dataclass(frozen=True)
class Subject:
    """The model under evaluation.

    seed: of sampling, the same in all processes; each row derives its own seed from it.
    kept: samples of the interrupted evaluation that this one resumes.
    generated: the answers so far, by everything that they depend on, so that tasks on the same rows judge the same
        answers.
    """

    model: Any
    tokenizer: Any
    seed: int
    run_dir: Path
    kept: Mapping[Place, Sample] = field(default_factory=dict)
    generated: dict[tuple[Any, ...], Generated] = field(default_factory=dict)

    @property
    def pad_token_id(self) -> int:
        return padding_of(self.tokenizer)


def run(recipe: EvalRecipe, work: Work) -> dict[str, dict[str, Any]]:
    """Run `evaluate` with the data and model that `dsv2` has loaded; returns its results."""
    return evaluate(
        recipe,
        model=work.model,
        tokenizer=work.tokenizer,
        rows_by_task=dict(work.rows),
        run_dir=work.run_dir,
        resume=work.resume,
    )


def evaluate(
    recipe: EvalRecipe,
    *,
    model: Any,
    tokenizer: Any,
    rows_by_task: dict[str, Sequence[Row]],
    run_dir: Path,
    resume: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure a model on every task; samples.jsonl records each answer with its verdict.

    The rows of a task are divided among the processes, and every process returns the figures over all rows. A sampled
    answer depends on the recipe's seed and its row number, not on the number of processes or the batch.

    Args:
        model: with a score head if the metric is pair_accuracy or reward, else a language model; it is not trained.
        rows_by_task: canonical rows, by task name.
        resume: reuse the answers that an interrupted evaluation of the same recipe left in run_dir, and judge them
            again. Otherwise they are deleted.

    Returns:
        Task name -> {"n": rows, "greedy": ..., "greedy_interval": ..., "greedy_truncated": ..., "t1": ..., ...}: for
        each temperature a value, its 95 % confidence interval and the fraction of answers truncated at max_new_tokens.
        For pair_accuracy {"n": rows, "value": ..., "value_interval": ...}, for loss {"n": rows, "loss": ...} in nats,
        and for reward the result of `agreement`.

    Raises:
        ToolkitError: rows that do not suit the metric (no reference, no pair, no question).
    """
    # torch.distributed may already be initialised; on CPUs, PartialState must not look for GPUs.
    state = PartialState() if torch.cuda.is_available() else PartialState(cpu=True)
    model.to(state.device)
    if state.is_main_process and any(task.metric not in UNSAMPLED_METRICS for task in recipe.tasks):
        print_obeyed("eval", model)
    for task in recipe.tasks:
        check_rows(task, rows_by_task[task.name])
    files = SampleFiles(run_dir, PLACE)
    kept = files.open(state, resume)
    if resume and state.is_main_process:
        answers = sum("completion" in sample for sample in kept.values())
        print(f"eval: {answers:,} answers of the interrupted evaluation are reused", file=sys.stderr, flush=True)
    subject = Subject(model, tokenizer, recipe.seed, run_dir, kept)
    return {task.name: _measure(task, rows_by_task[task.name], subject, state, files) for task in recipe.tasks}


def check_rows(task: EvalTask, rows: Sequence[Row]) -> None:
    """Raise ToolkitError for the first row that does not suit the task's metric, before anything is generated."""
    rows = list(rows)[: task.limit]
    if not rows:
        raise ToolkitError(f"task {task.name} has no rows")
    for number, row in enumerate(rows, 1):
        try:
            CHECKS[task.metric](task, row, number)
        except ToolkitError as error:
            raise ToolkitError(f"task {task.name}: {error}") from None


def _measure(
    task: EvalTask, rows: Sequence[Row], subject: Subject, state: PartialState, files: SampleFiles
) -> dict[str, Any]:
    """Measure one task. Each process writes its samples as they are generated; the first process finally sorts them."""
    began = time.monotonic()
    rows = list(rows)[: task.limit]
    numbered = list(enumerate(rows))[state.process_index :: state.num_processes]
    samples: list[Sample] = []
    for chunk in METRICS[task.metric](task, numbered, subject):
        named = [{"task": task.name, **sample} for sample in chunk]
        new = (sample for sample in named if files.place(sample) not in subject.kept)
        append_lines(files.of_process(state.process_index), new)
        samples += named
    samples = sorted(gather_object(samples), key=lambda sample: (sample["decoding"], sample["row"]))
    results = agreement(samples) if task.metric == "reward" else figures(samples, len(rows))
    if state.is_main_process:
        others = [sample for sample in read_lines(files.path) if sample.get("task") != task.name]
        write_lines(files.path, [*others, *samples])
        files.remove_parts()
        seconds = time.monotonic() - began
        print(f"eval: {task.name}, {len(rows):,} rows, {seconds:.1f} s{remark(results)}", file=sys.stderr, flush=True)
    state.wait_for_everyone()  # the next task must not append to the files before they are sorted
    return results


def figures(samples: Sequence[Sample], rows: int) -> dict[str, Any]:
    """For each decoding method the mean value, weighted if samples have weights, with its interval unless it is a loss,
    and the fraction of truncated answers."""
    values: dict[str, Any] = {"n": rows}
    for decoding in dict.fromkeys(sample["decoding"] for sample in samples):
        decoded = [sample for sample in samples if sample["decoding"] == decoding]
        weights = [sample.get("weight", 1) for sample in decoded]
        total = sum(weights) or 1
        values[decoding] = sum(w * sample["value"] for w, sample in zip(weights, decoded, strict=True)) / total
        if decoding != LOSS:
            interval = mean_interval([sample["value"] for sample in decoded], [sample["prompt"] for sample in decoded])
            values[f"{decoding}_interval"] = [*interval]
        if any("truncated" in sample for sample in decoded):
            values[f"{decoding}_truncated"] = sum(sample["truncated"] for sample in decoded) / len(decoded)
    return values


def _judged_answers(
    task: EvalTask, rows: Numbered, subject: Subject, verdicts_on: VerdictsOn
) -> Iterator[list[Sample]]:
    """Yield judged answers to every row at every temperature, a few batches at a time."""
    size = CHUNK_BATCHES * task.batch_size
    for temperature in task.temperatures:
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            answers = _generate(task, chunk, subject, temperature)
            yield [
                _sample(number, row, decoding_name(temperature), answer, verdict)
                for (number, row), answer, verdict in zip(chunk, answers, verdicts_on(chunk, answers), strict=True)
            ]


def _by_rule(rule: str, settings: Mapping[str, Any]) -> VerdictsOn:
    compares = find_rule(rule).needs_reference
    measured = [key for key in MEASURED if key in find_rule(rule).settings]

    def verdicts_on(rows: Numbered, answers: Sequence[Generated]) -> list[Verdict]:
        inputs = [
            Asked(
                answer.text,
                prompt_of(row, number + 1),
                row["reference"] if compares else None,
                {**{key: getattr(answer, key) for key in measured}, **settings},
            )
            for (number, row), answer in zip(rows, answers, strict=True)
        ]
        return [_scored(verdict) for verdict in verify_all(rule, inputs)]

    return verdicts_on


def _by_judge(reward: JudgeReward) -> VerdictsOn:
    def verdicts_on(rows: Numbered, answers: Sequence[Generated]) -> list[Verdict]:
        to_judge = [
            Answer(prompt_of(row, number + 1), answer.text, answer.finished, row.get("reference"), answer.tokens)
            for (number, row), answer in zip(rows, answers, strict=True)
        ]
        values = reward.judge(to_judge)
        return [Verdict(value, reason or "") for value, reason in zip(values, reward.reasons, strict=True)]

    return verdicts_on


def _scored(verdict: Verdict | ToolkitError) -> Verdict:
    """The verdict, with a score of 0 if there is none: a check that timed out counts as a wrong answer."""
    if isinstance(verdict, ToolkitError):
        raise verdict
    return verdict if verdict.score is not None else Verdict(0.0, verdict.reason)


def _generate(task: EvalTask, rows: Numbered, subject: Subject, temperature: float) -> list[Generated]:
    """One answer per row: reused from this run or the interrupted one if possible, otherwise generated."""
    prompts = [
        render_conversation(prompt_of(row, number + 1), subject.tokenizer, add_generation_prompt=True)["input_ids"]
        for number, row in rows
    ]
    generated = subject.generated
    keys = [(temperature, task.max_new_tokens, number, *ids) for (number, _), ids in zip(rows, prompts, strict=True)]
    for key, (number, _) in zip(keys, rows, strict=True):
        sample = subject.kept.get((task.name, decoding_name(temperature), number))
        if sample and "tokens" in sample:
            generated[key] = Generated(sample["completion"], not sample["truncated"], sample["tokens"])
    new = [place for place, key in enumerate(keys) if key not in generated]
    answers = generate_texts(
        subject.model,
        subject.tokenizer,
        [prompts[place] for place in new],
        [seed_of(subject.seed, rows[place][0], f"{temperature:g}") for place in new],
        temperature=temperature,
        max_new_tokens=task.max_new_tokens,
        batch_size=task.batch_size,
    )
    generated |= {keys[place]: answer for place, answer in zip(new, answers, strict=True)}
    return [generated[key] for key in keys]


def _sample(number: int, row: Row, decoding: str, answer: Generated, verdict: Verdict) -> Sample:
    copied = {key: row[key] for key in ("reference", "meta") if row.get(key) is not None}
    prompt = prompt_text(prompt_of(row, number + 1))
    return {
        "row": number,
        "decoding": decoding,
        "prompt": prompt,
        "completion": answer.text,
        "truncated": not answer.finished,
        "tokens": answer.tokens,
        "value": verdict.score,
        "reason": verdict.reason,
        **copied,
    }


# --- the fields that each metric needs in a row


def _needs_reference(task: EvalTask, row: Row, number: int) -> None:
    prompt_of(row, number)
    if not find_rule(task.rule).needs_reference:
        return
    if row.get("reference") is None:
        raise ToolkitError(
            f"row {number} has no reference to compare answers with; map the column that holds it: "
            "columns: {reference: NAME}"
        )
    try:
        check_reference(task.rule, row["reference"])
    except ToolkitError as error:
        raise ToolkitError(f"row {number}: {error}") from None


def _needs_pair(task: EvalTask, row: Row, number: int) -> None:
    if not is_pair(row):
        raise ToolkitError(f"row {number} is not a pair of chosen and rejected answers")


def _needs_verdict(task: EvalTask, row: Row, number: int) -> None:
    if why := not_judged(row):
        raise ToolkitError(f"row {number} {why}")


def _needs_messages(task: EvalTask, row: Row, number: int) -> None:
    if "messages" not in row:
        raise ToolkitError(f"row {number} is not a conversation with messages")


CHECKS: dict[str, Callable[[EvalTask, Row, int], object]] = {
    "exact_match": _needs_reference,
    "refusal": lambda task, row, number: prompt_of(row, number),
    "format": lambda task, row, number: prompt_of(row, number),
    "judge": lambda task, row, number: prompt_of(row, number),
    "pair_accuracy": _needs_pair,
    "reward": _needs_verdict,
    "loss": _needs_messages,
}


# --- the metrics: each yields lists of samples


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


def pair_accuracy(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """1 if the reward model scores the chosen answer higher than the rejected one."""

    def scorer(conversations: Sequence[tuple[list[Row], list[Row]]]) -> list[float]:
        ids = [render_conversation([*p, *a], subject.tokenizer)["input_ids"] for p, a in conversations]
        return _scores(task, subject, ids)

    verdicts = judge(scorer, [row for _, row in rows])
    yield [
        {
            "row": number,
            "decoding": UNSAMPLED,
            "prompt": prompt_text(row["prompt"]),
            "chosen": prompt_text(row["chosen"]),
            "rejected": prompt_text(row["rejected"]),
            "scores": list(verdict.scores),
            "value": verdict.value,
            **({"meta": row["meta"]} if row.get("meta") else {}),
        }
        for (number, row), verdict in zip(rows, verdicts, strict=True)
    ]


def reward(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """The scores and lengths in tokens of a row's answers, with the row's verdict (see eval/agreement.py)."""
    answers = [(place, answer) for place, (_, row) in enumerate(rows) for answer in _answers_of(row)]
    prompts = [
        len(render_conversation(row["prompt"], subject.tokenizer, add_generation_prompt=True)["input_ids"])
        for _, row in rows
    ]
    ids = [
        render_conversation([*rows[place][1]["prompt"], *answer], subject.tokenizer)["input_ids"]
        for place, answer in answers
    ]
    scores = _scores(task, subject, ids)
    scored: list[list[tuple[float, int, str]]] = [[] for _ in rows]
    for (place, answer), tokens, score in zip(answers, ids, scores, strict=True):
        scored[place].append((score, len(tokens) - prompts[place], prompt_text(answer)))
    yield [_scored_sample(number, row, judged) for (number, row), judged in zip(rows, scored, strict=True)]


def _scores(task: EvalTask, subject: Subject, ids: Sequence[Sequence[int]]) -> list[float]:
    heads = score_heads(subject.model, ids, pad_token_id=subject.pad_token_id, batch_size=2 * task.batch_size)
    return [COMBINE[task.combine](scores) for scores in heads]


def _answers_of(row: Row) -> list[list[Row]]:
    """All answers of a row, the right ones first."""
    lists = [row[key] for key in RANKED[1:] if key in row]
    return [answer for listed in lists for answer in listed] or [
        row[key] for key in (*PAIR[1:], JUDGED[1]) if key in row
    ]


def _scored_sample(number: int, row: Row, scored: Sequence[tuple[float, int, str]]) -> Sample:
    scores, lengths, answers = (list(column) for column in zip(*scored, strict=True))
    verdict = {key: row[key] for key in VERDICTS if key in row} or {"right": len(row.get(RANKED[1], [None]))}
    return {
        "row": number,
        "decoding": UNSAMPLED,
        "prompt": prompt_text(row["prompt"]),
        "answers": answers,
        "scores": scores,
        "lengths": lengths,
        **verdict,
        **({"meta": row["meta"]} if row.get("meta") else {}),
    }


def loss(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """The mean cross-entropy over a row's trained assistant tokens, in nats; `weight` is their number."""
    rendered = [render_conversation(row["messages"], subject.tokenizer) for _, row in rows]
    losses = token_losses(
        subject.model,
        [r["input_ids"] for r in rendered],
        [r["assistant_mask"] for r in rendered],
        pad_token_id=subject.pad_token_id,
        batch_size=task.batch_size,
    )
    yield [
        {"row": number, "decoding": LOSS, "value": total / max(1, tokens), "weight": tokens}
        for (number, _), (total, tokens) in zip(rows, losses, strict=True)
    ]


METRICS: dict[str, Callable[[EvalTask, Numbered, Subject], Iterator[list[Sample]]]] = {
    "exact_match": exact_match,
    "refusal": refusal,
    "format": format_share,
    "judge": judge_score,
    "pair_accuracy": pair_accuracy,
    "reward": reward,
    "loss": loss,
}
