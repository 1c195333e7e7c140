"""What `dsv2 check` and a run say of lm-eval's tasks and open-ended ones before any weight is loaded."""

from collections.abc import Callable
from typing import Any

from conversations.errors import ToolkitError
from conversations.reading.records import raw_rows
from conversations.tally import counted
from eval.config import BenchmarkTask, EvalRecipe, OpenTask
from eval.harness.loading import Built, one_line


def check(
    recipe: EvalRecipe, tokenizer: Any, positions: int | None, is_coming: Callable[[str], bool] = lambda path: False
) -> list[str]:
    """A line for each task that is not a metric.

    Args:
        tokenizer, positions: the model's, None if they are not known.
        is_coming: whether an earlier stage of a chain has yet to write a path.

    Raises:
        ToolkitError: an unknown task, a missing file or column, data that a run could not load, a prompt that is too
            long, or a judge that cannot be asked.
    """
    lines = _check_benchmarks(recipe, tokenizer, positions)
    open_ended = [task for task in recipe.tasks if isinstance(task, OpenTask)]
    return [*lines, *(_check_open(task, tokenizer, positions, is_coming) for task in open_ended)]


def _check_open(task: OpenTask, tokenizer: Any, positions: int | None, is_coming: Callable[[str], bool]) -> str:
    from eval.open_ended.conversing import check_positions
    from eval.open_ended.questions import read_questions

    if task.reward.judge is not None:
        task.reward.judge.endpoint().key()
    try:
        later = task.baseline is not None and is_coming(task.baseline)
        questions = read_questions(task.model_copy(update={"baseline": None}) if later else task)
        if tokenizer is not None and positions is not None:
            check_positions(task, questions, tokenizer, positions)
    except ToolkitError as error:
        raise ToolkitError(f"task {task.name}: {error}") from None
    compared = "valued one by one" if task.baseline is None else f"compared with {task.baseline}"
    by = "a reward model" if task.reward.judge is None else task.reward.judge.model
    return f"{task.name}: {counted(len(questions), 'question')}, {compared} by {by}"


def _check_benchmarks(recipe: EvalRecipe, tokenizer: Any, positions: int | None) -> list[str]:
    entries = [task for task in recipe.tasks if isinstance(task, BenchmarkTask)]
    if not entries:
        return []
    from eval.harness.benchmarks import chat_of, need_lm_eval
    from eval.harness.loading import build, check_tokens
    from eval.harness.running import described, quiet_lm_eval

    need_lm_eval()
    chat, lines = chat_of(recipe), []
    with quiet_lm_eval():
        for entry in entries:
            built = build(entry, chat)
            for path in entry.against:
                next(raw_rows(path), None)
            rows = sum(len(task.eval_docs) for task in built.tasks.values())
            used = min(rows, entry.limit or rows)
            if tokenizer is not None:
                check_tokens(built, tokenizer)
            if tokenizer is not None and positions is not None:
                _check_lengths(built, tokenizer, positions, chat)
            lines.append(f"{entry.name}: {used:,} rows, {', '.join(described(built, chat))}")
    return lines


def _check_lengths(built: Built, tokenizer: Any, positions: int, chat: bool) -> None:
    """Raise ToolkitError for the first request that is too long, if the entry refuses such."""
    from eval.harness.lm import ToolkitLM

    entry = built.entry
    lm = ToolkitLM(tokenizer, positions, too_long=entry.too_long, overrides=entry.generation, stop=entry.stop)
    template = lm.apply_chat_template if chat else None
    for task in built.tasks.values():
        try:
            task.build_all_requests(
                limit=entry.limit, apply_chat_template=chat, fewshot_as_multiturn=chat, chat_template=template
            )
        except Exception as error:  # the task's own code
            raise ToolkitError(f"task {entry.name}: its rows do not fit the task: {one_line(error)}") from error
        for request in task.instances:
            try:
                lm.check_fit(request)
            except ToolkitError as error:
                raise ToolkitError(f"task {entry.name}: row {request.doc_id + 1}: {error}") from None
