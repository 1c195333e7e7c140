"""Which rows a stage can use. A row that it cannot is a bad row, told before any weight is loaded."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from conversations.answers.prompts import split_prompt
from conversations.answers.rules import check_reference, needs_reference
from conversations.errors import ToolkitError
from conversations.formats.reasoning import Reasoning
from conversations.row import Row

Refuse = Callable[[Row], str | None]
_MAP_REFERENCE = (
    "name the columns of the prompt and of the right answer, such as data.0.columns: "
    "{prompt: question, reference: answer} (a nested one: reference: reward_model.ground_truth)"
)


def refusal_of(recipe: Any, task: Any = None) -> Refuse:
    """A function that says why a canonical row is of no use to the recipe; None where it is.

    task: of an evaluation.
    """
    if recipe.stage == "reward":
        return _one_kind_of_verdict() if recipe.loss == "pointwise" else _no_pair
    if recipe.stage == "rl":
        return _no_use_for(recipe.rewards)
    if task is not None and task.metric == "exact_match":
        return _first_of(_no_reference, _unreadable([task.rule]))
    return _BY_USE[task.metric if task else recipe.stage]


def _first_of(*refusals: Refuse) -> Refuse:
    return lambda row: next((why for refuse in refusals if (why := refuse(row))), None)


def _no_use_for(rewards: Sequence[Any]) -> Refuse:
    """Of the rewards of a recipe of rl: a row must ask something, and one of them must have something to say."""
    rules = [entry.rule for entry in rewards if entry.rule and needs_reference(entry.rule)]

    def unjudged(row: Row) -> str | None:
        if "reference" in row or len(rules) < len(rewards):
            return None
        return f"has no reference, which every reward needs ({', '.join(rules)}); {_MAP_REFERENCE}"

    strict = [entry.rule for entry in rewards if entry.rule in rules and entry.on_error == "error"]
    return _first_of(_no_question, unjudged, _unreadable(strict))


def _unreadable(rules: Sequence[str]) -> Refuse:
    """Why one of the rules cannot read a row's reference, before any answer is judged."""

    @cache
    def fault(reference: str) -> str | None:
        for rule in rules:
            try:
                check_reference(rule, reference)
            except ToolkitError as error:
                return f"cannot be judged by the rule {rule}: {error}"
        return None

    return lambda row: fault(row["reference"]) if row.get("reference") is not None else None


def _one_kind_of_verdict() -> Refuse:
    """Labels and scores are trained differently: what the first row has, all must have."""
    kinds: list[str] = []

    def refuse(row: Row) -> str | None:
        if why := _no_verdict(row):
            return why
        kind = "label" if "label" in row else "score"
        kinds.append(kind)
        if kind != kinds[0]:
            return f"has a {kind}, and rows before it have a {kinds[0]}; train on one kind at a time"
        return None

    return refuse


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
    "refusal": _no_question,
    "format": _no_question,
    "pair_accuracy": _no_judged_pair,
    "loss": _no_conversation,
}
