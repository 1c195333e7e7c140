"""Evaluation: measures a model on every task of a recipe, and records every answer."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from conversations.environments.episodes import try_reset
from conversations.errors import ToolkitError
from conversations.generation.generating import print_obeyed
from conversations.generation.sample_files import Sample, SampleFiles
from conversations.row import Row
from conversations.stage import OtherModel, Work
from deepseek_v2_modeling.training import append_lines, read_lines, write_lines
from eval.agreement import agreement, remark
from eval.config import UNSAMPLED_METRICS, AnyTask, EvalRecipe, EvalTask
from eval.figures import figures_of_metric
from eval.harness.benchmarks import Benchmarks
from eval.metrics import CHECKS, METRICS
from eval.subject import Subject

PLACE = ("task", "decoding", "row")  # keys that identify a sample


def run(recipe: EvalRecipe, work: Work) -> dict[str, dict[str, Any]]:
    """Run `evaluate` with the data and model that `dsv2` has loaded; returns its results."""
    return evaluate(
        recipe,
        model=work.model,
        tokenizer=work.tokenizer,
        rows_by_task=dict(work.rows),
        run_dir=work.run_dir,
        resume=work.resume,
        others=work.others,
    )


def evaluate(
    recipe: EvalRecipe,
    *,
    model: Any,
    tokenizer: Any,
    rows_by_task: dict[str, Sequence[Row]],
    run_dir: Path,
    resume: bool = False,
    others: Mapping[str, OtherModel] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure a model on every task; samples.jsonl records each answer with its verdict.

    The rows of a task are divided among the processes, and every process returns the figures over all rows. A sampled
    answer depends on the recipe's seed and its row number, not on the number of processes or the batch.

    Args:
        model: with a score head if the metric is pair_accuracy or reward, else a language model; it is not trained.
        rows_by_task: canonical rows, by task name, of the tasks with a metric.
        resume: reuse the answers that an interrupted evaluation of the same recipe left in run_dir, and judge them
            again. Otherwise they are deleted.
        others: the reward models of open-ended tasks, by their keys in the recipe.

    Returns:
        Task name -> {"n": rows, "greedy": ..., "greedy_interval": ..., "t1": ..., ...}: for each decoding what
        eval.figures.figures_of_metric says; "value" is the decoding of pair_accuracy, "loss" that of loss, in nats. For
        reward the result of `agreement`, for a task of lm-eval that of eval.harness.figures.figures_of, and for an
        open-ended one that of eval.open_ended.measuring.figures_of. One that fails has {"n": 0, "error": why}; the
        others are measured all the same.

    Raises:
        ToolkitError: rows that do not suit the metric (no reference, no pair, no question).
    """
    # torch.distributed may already be initialised; on CPUs, PartialState must not look for GPUs.
    state = PartialState() if torch.cuda.is_available() else PartialState(cpu=True)
    model.to(state.device)
    if state.is_main_process and any(generates(task) for task in recipe.tasks):
        print_obeyed("eval", model)
    for task in recipe.tasks:
        if isinstance(task, EvalTask):
            check_rows(task, rows_by_task[task.name])
    files = SampleFiles(run_dir, PLACE)
    kept = files.open(state, resume)
    if resume and state.is_main_process:
        answers = sum("completion" in sample for sample in kept.values())
        print(f"eval: {answers:,} answers of the interrupted evaluation are reused", file=sys.stderr, flush=True)
    subject = Subject(model, tokenizer, recipe.seed, run_dir, kept)
    keys = {f"tasks.{index}.reward.model": task.name for index, task in enumerate(recipe.tasks)}
    rewards = {keys[key]: other for key, other in (others or {}).items()}
    benchmarks = Benchmarks(recipe, model, tokenizer, state, run_dir, resume, rewards)
    results: dict[str, dict[str, Any]] = {}
    for task in recipe.tasks:
        began = time.monotonic()
        if isinstance(task, EvalTask):
            results[task.name], samples = _measure(task, rows_by_task[task.name], subject, state, files)
        else:
            results[task.name], samples = benchmarks.measure(task)
        if state.is_main_process:
            _record(task.name, samples, files)
            _report(task.name, results[task.name], time.monotonic() - began)
        state.wait_for_everyone()  # the next task must not append to the files before they are sorted
    subject.close()
    benchmarks.close(done=not any("error" in figures for figures in results.values()))
    return results


def generates(task: AnyTask) -> bool:
    """Whether a task generates answers, as far as the recipe says."""
    return not isinstance(task, EvalTask) or task.metric not in UNSAMPLED_METRICS


def check_list(recipe: EvalRecipe, name: str, rows: Sequence[Row]) -> None:
    """Raise ToolkitError if the environment of the task of this name cannot begin with its rows, or judges none."""
    task = next(task for task in recipe.metric_tasks.values() if task.name == name)
    if task.environment is None:
        return
    environment = task.environment.load()
    if task.metric == "environment" and not environment.rewards:
        raise ToolkitError(f"task {name}: the environment {environment.written} has no get_reward; use another metric")
    try_reset(environment, rows[0])


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
) -> tuple[dict[str, Any], list[Sample]]:
    """(figures, samples) of one task, over all processes; of one that fails {"n": 0, "error": why} and the samples so
    far. Each process writes its samples as they are generated."""
    rows = list(rows)[: task.limit]
    numbered = list(enumerate(rows))[state.process_index :: state.num_processes]
    samples: list[Sample] = []
    faults: list[str] = []
    try:
        for chunk in METRICS[task.metric](task, numbered, subject):
            named = [{"task": task.name, **sample} for sample in chunk]
            new = (sample for sample in named if files.place(sample) not in subject.kept)
            append_lines(files.of_process(state.process_index), new)
            samples += named
    except ToolkitError as error:  # with a ModelError, such as NaN, no other metric would fare better
        faults.append(str(error))
    samples = sorted(gather_object(samples), key=lambda sample: (sample["decoding"], sample["row"]))
    if faults := gather_object(faults):
        return {"n": 0, "error": faults[0]}, samples
    return agreement(samples) if task.metric == "reward" else figures_of_metric(samples, len(rows)), samples


def _record(name: str, samples: Sequence[Sample], files: SampleFiles) -> None:
    """Write a task's samples in order, after those of other tasks."""
    others = [sample for sample in read_lines(files.path) if sample.get("task") != name]
    write_lines(files.path, [*others, *samples])
    files.remove_parts()


def _report(name: str, results: Mapping[str, Any], seconds: float) -> None:
    done = f"failed: {results['error']}" if "error" in results else f"{results['n']:,} rows, {seconds:.1f} s"
    print(f"eval: {name}, {done}{remark(results)}", file=sys.stderr, flush=True)
