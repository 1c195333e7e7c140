"""Which rows a stage can use. A row that it cannot is a bad row, told before any weight is loaded."""

from collections.abc import Callable
from typing import Any

from conversations.prompts import split_prompt
from conversations.reasoning import Reasoning

Row = dict[str, Any]


def refusal_of(recipe: Any, metric: str | None = None) -> Callable[[Row], str | None]:
    """A function that says why a canonical row is of no use to the recipe; None where it is.

    metric: of an evaluation's task.
    """
    if recipe.stage == "reward":
        return _no_verdict if recipe.loss == "pointwise" else _no_pair
    return _BY_USE[metric or recipe.stage]


def reasoning_of(recipe: Any) -> Reasoning:
    """What becomes of reasoning beside an answer. Prompts leave it out: a model is not shown its old reasoning."""
    return recipe.format.reasoning if hasattr(recipe, "format") else "drop"


def _no_answer(row: Row) -> str | None:
    if "text" in row:
        return None
    if "messages" not in row:
        return f"is {_kind(row)}, where a conversation or plain text is needed; for preferences use dsv2 reward"
    answered = any(message["role"] == "assistant" for message in row["messages"])
    return None if answered else "has no answer to train on; for prompts use dsv2 rl or dsv2 eval"


def _no_pair(row: Row) -> str | None:
    return None if "chosen" in row else f"is {_kind(row)}, where a pair of chosen and rejected is needed"


def _no_verdict(row: Row) -> str | None:
    judged = "completion" in row
    return None if judged else f"is {_kind(row)}, where an answer with a label or a score is needed (loss: pointwise)"


def _no_question(row: Row) -> str | None:
    if "text" in row:
        return "is plain text, which asks nothing"
    return None if split_prompt(row.get("prompt") or row["messages"])[0] else "has no question before its answer"


def _no_reference(row: Row) -> str | None:
    return _no_question(row) or (None if "reference" in row else "has no reference to compare an answer with")


def _no_judged_pair(row: Row) -> str | None:
    return None if "chosen" in row else _no_verdict(row)


def _no_conversation(row: Row) -> str | None:
    return "is plain text, where a conversation is needed" if "text" in row else _no_answer(row)


def _kind(row: Row) -> str:
    kinds = {"text": "plain text", "messages": "a conversation", "chosen": "a pair", "completion": "a judged answer"}
    return next(name for key, name in kinds.items() if key in row)


_BY_USE = {
    "sft": _no_answer,
    "rl": _no_question,
    "refusal": _no_question,
    "format": _no_question,
    "exact_match": _no_reference,
    "pair_accuracy": _no_judged_pair,
    "loss": _no_conversation,
}
