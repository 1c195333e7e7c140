"""Evaluation: lets a model answer held-out prompts, judges what it said, and keeps every answer."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from conversations import render_conversation
from conversations.errors import ToolkitError
from conversations.judging import Row, is_pair, judge
from conversations.prompts import answer_text, prompt_of, prompt_text
from conversations.verifiers import REFUSAL_PATTERNS, VERIFIERS, format_check, refusal_check
from deepseek_v2_modeling.inference import generate_answers, score_sequences, token_losses
from deepseek_v2_modeling.run_files import SAMPLES_FILE, append_lines, cut_file
from eval.config import EvalRecipe, EvalTask

Sample = dict[str, Any]
Numbered = Sequence[tuple[int, Row]]  # rows with their number in the task, from 0
UNSAMPLED = "value"


@dataclass(frozen=True)
class Subject:
    """The model under evaluation. seed: of sampling, another one in each process.

    said: its answers so far, by all that they depend on, so that tasks on the same rows judge the same answers.
    """

    model: Any
    tokenizer: Any
    seed: int
    said: dict[tuple[Any, ...], list[str]] = field(default_factory=dict)

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def evaluate(
    recipe: EvalRecipe,
    *,
    model: Any,
    tokenizer: Any,
    rows_by_task: dict[str, Sequence[Row]],
    run_dir: Path,
) -> dict[str, dict[str, Any]]:
    """Measures a model on every task; each answer, with its verdict, goes to samples.jsonl.

    Several processes share the rows of a task and all return the figures of all of them.

    Args:
        model: with a score head where the metric is pair_accuracy, else a language model; frozen.
        rows_by_task: canonical rows, by the task's name.

    Returns:
        Task name -> {"n": rows, "greedy": ..., "t1": ...}, one value for each temperature, or
        {"n": rows, "value": ...} where nothing is sampled.

    Raises:
        ToolkitError: rows that do not fit the metric (no reference, no pair, no question).
    """
    # torch.distributed is up already when the caller waited for the others; on CPUs this must not look for GPUs.
    state = PartialState() if torch.cuda.is_available() else PartialState(cpu=True)
    model.to(state.device)
    subject = Subject(model, tokenizer, recipe.seed + state.process_index)
    if state.is_main_process:
        cut_file(run_dir / SAMPLES_FILE, 0)
    results = {}
    for task in recipe.tasks:
        began = time.monotonic()
        rows = list(rows_by_task[task.name])[: task.limit]
        if not rows:
            raise ToolkitError(f"task {task.name} has no rows")
        numbered = list(enumerate(rows))[state.process_index :: state.num_processes]
        samples = METRICS[task.metric](task, numbered, subject)
        samples = sorted(gather_object(samples), key=lambda sample: (sample["decoding"], sample["row"]))
        results[task.name] = figures(samples, len(rows))
        if state.is_main_process:
            append_lines(run_dir / SAMPLES_FILE, ({"task": task.name, **sample} for sample in samples))
            seconds = time.monotonic() - began
            print(f"eval: {task.name}, {len(rows):,} rows, {seconds:.1f} s", file=sys.stderr, flush=True)
    return results


def figures(samples: Sequence[Sample], rows: int) -> dict[str, Any]:
    """The mean value of each way of decoding, weighted where samples have a weight."""
    found: dict[str, Any] = {"n": rows}
    for decoding in dict.fromkeys(sample["decoding"] for sample in samples):
        of_it = [sample for sample in samples if sample["decoding"] == decoding]
        weights = [sample.get("weight", 1) for sample in of_it]
        total = sum(weights) or 1
        found[decoding] = sum(w * sample["value"] for w, sample in zip(weights, of_it, strict=True)) / total
    return found


def decoding_name(temperature: float) -> str:
    """What a temperature is called in the results: greedy, t1, t0.7."""
    return "greedy" if temperature == 0 else f"t{temperature:g}"


def _answers(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[tuple[str, int, Row, str]]:
    """(way of decoding, number, row, answer) for every row at every temperature."""
    prompts = [
        render_conversation(prompt_of(row, number + 1), subject.tokenizer, add_generation_prompt=True)["input_ids"]
        for number, row in rows
    ]
    for temperature in task.temperatures:
        asked = (temperature, task.max_new_tokens, task.batch_size, *map(tuple, prompts))
        if asked not in subject.said:
            subject.said[asked] = _generated(task, prompts, temperature, subject)
        for (number, row), text in zip(rows, subject.said[asked], strict=True):
            yield decoding_name(temperature), number, row, text


def _generated(task: EvalTask, prompts: list[list[int]], temperature: float, subject: Subject) -> list[str]:
    answers = generate_answers(
        subject.model,
        prompts,
        pad_token_id=subject.pad_token_id,
        eos_token_id=subject.tokenizer.eos_token_id,
        max_new_tokens=task.max_new_tokens,
        temperature=temperature,
        batch_size=task.batch_size,
        seed=subject.seed,
    )
    return [answer_text(text) for text in subject.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _said(decoding: str, number: int, row: Row, text: str, value: float) -> Sample:
    kept = {key: row[key] for key in ("reference", "meta") if row.get(key) is not None}
    prompt = prompt_text(prompt_of(row, number + 1))
    return {"row": number, "decoding": decoding, "prompt": prompt, "completion": text, "value": value, **kept}


def exact_match(task: EvalTask, rows: Numbered, subject: Subject) -> list[Sample]:
    """1 where the rule finds the reference in the answer."""
    for number, row in rows:
        if row.get("reference") is None:
            raise ToolkitError(
                f"task {task.name}: row {number + 1} has no reference to compare answers with; map the column that "
                "holds it: columns: {reference: NAME}"
            )
    matches = VERIFIERS[task.rule]
    return [
        _said(d, n, row, text, float(matches(text, row["reference"])))
        for d, n, row, text in _answers(task, rows, subject)
    ]


def refusal(task: EvalTask, rows: Numbered, subject: Subject) -> list[Sample]:
    """1 where a sentence of the answer matches a refusal pattern."""
    refuses = refusal_check(task.patterns or REFUSAL_PATTERNS)
    return [_said(d, n, row, text, float(refuses(text))) for d, n, row, text in _answers(task, rows, subject)]


def format_share(task: EvalTask, rows: Numbered, subject: Subject) -> list[Sample]:
    """1 where the answer is well formed and, as a whole, matches one of the task's patterns, if it has any."""
    formed = format_check(task.patterns)
    return [_said(d, n, row, text, float(formed(text))) for d, n, row, text in _answers(task, rows, subject)]


def pair_accuracy(task: EvalTask, rows: Numbered, subject: Subject) -> list[Sample]:
    """1 where the reward model scores chosen higher than rejected."""
    for number, row in rows:
        if not is_pair(row):
            raise ToolkitError(f"task {task.name}: row {number + 1} is no pair of chosen and rejected answers")

    def scorer(conversations: Sequence[tuple[list[Row], list[Row]]]) -> list[float]:
        ids = [render_conversation([*p, *a], subject.tokenizer)["input_ids"] for p, a in conversations]
        return score_sequences(subject.model, ids, pad_token_id=subject.pad_token_id, batch_size=2 * task.batch_size)

    verdicts = judge(scorer, [row for _, row in rows])
    return [
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


def loss(task: EvalTask, rows: Numbered, subject: Subject) -> list[Sample]:
    """Mean cross-entropy of the assistant's tokens, in nats; `weight` is their number."""
    for number, row in rows:
        if "messages" not in row:
            raise ToolkitError(f"task {task.name}: row {number + 1} is no conversation with messages")
    rendered = [render_conversation(row["messages"], subject.tokenizer) for _, row in rows]
    losses = token_losses(
        subject.model,
        [r["input_ids"] for r in rendered],
        [r["assistant_mask"] for r in rendered],
        pad_token_id=subject.pad_token_id,
        batch_size=task.batch_size,
    )
    return [
        {"row": number, "decoding": UNSAMPLED, "value": total / max(1, tokens), "weight": tokens}
        for (number, _), (total, tokens) in zip(rows, losses, strict=True)
    ]


METRICS: dict[str, Callable[[EvalTask, Numbered, Subject], list[Sample]]] = {
    "exact_match": exact_match,
    "refusal": refusal,
    "format": format_share,
    "pair_accuracy": pair_accuracy,
    "loss": loss,
}
