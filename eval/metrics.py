"""All metrics by name, and what each needs in a row."""

from collections.abc import Callable, Iterator

from conversations.answers.judging import is_pair
from conversations.answers.prompts import prompt_of
from conversations.answers.rules import check_reference, find_rule
from conversations.answers.usable_rows import not_judged
from conversations.errors import ToolkitError
from conversations.generation.sample_files import Sample
from conversations.row import Row
from eval.answer_metrics import environment_reward, exact_match, format_share, judge_score, refusal
from eval.config import EvalTask
from eval.score_metrics import loss, pair_accuracy, reward
from eval.subject import Numbered, Subject

METRICS: dict[str, Callable[[EvalTask, Numbered, Subject], Iterator[list[Sample]]]] = {
    "exact_match": exact_match,
    "refusal": refusal,
    "format": format_share,
    "judge": judge_score,
    "environment": environment_reward,
    "pair_accuracy": pair_accuracy,
    "reward": reward,
    "loss": loss,
}


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
    "environment": lambda task, row, number: prompt_of(row, number),
    "judge": lambda task, row, number: prompt_of(row, number),
    "pair_accuracy": _needs_pair,
    "reward": _needs_verdict,
    "loss": _needs_messages,
}
