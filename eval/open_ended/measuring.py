"""An open-ended task, from its questions to samples and figures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from conversations.answers.prompts import prompt_text
from conversations.errors import ToolkitError
from conversations.stage import OtherModel
from eval.figures import Figure, aggregated, share
from eval.harness.crew import Crew
from eval.open_ended.conversing import Exchange, check_positions, converse, temperature_of
from eval.open_ended.entry import OpenTask
from eval.open_ended.questions import read_questions
from eval.open_ended.verdicts import Verdict, verdicts_on
from eval.open_ended.win_rates import length_controlled

Sample = dict[str, Any]
Figures = dict[str, Any]


def measure(
    task: OpenTask, crew: Crew, seed: int, other: OtherModel | None, run_dir: Path
) -> tuple[Figures, list[Sample]]:
    """(figures, samples) of a task. other: its reward model, if it has one. run_dir: where verdicts are stored.

    Raises:
        ToolkitError: the questions cannot be used, or the judge does not answer.
    """
    questions = read_questions(task)
    check_positions(task, questions, crew.tokenizer, crew.model.config.max_position_embeddings)
    exchanges = converse(task, questions, crew, seed)
    verdicts = verdicts_on(task, exchanges, other, run_dir, crew.state.device)
    lines = [_line(task, *both) for both in zip(exchanges, verdicts, strict=True)]
    return figures_of(task, lines), lines


def _line(task: OpenTask, exchange: Exchange, verdict: Verdict) -> Sample:
    question, answer = exchange.question, exchange.answer
    optional = {
        "category": question.category,
        "reference": question.reference(exchange.turn),
        "baseline": exchange.opponent[-1]["content"] if task.baseline is not None else None,
    }
    return {
        "task": task.name,
        "row": exchange.number,
        "decoding": task.decoding,
        "question": question.key,
        "turn": exchange.turn + 1,
        "prompt": prompt_text(exchange.prompt),
        "completion": answer.text,
        "truncated": not answer.finished,
        "tokens": answer.tokens,
        "temperature": temperature_of(task, question),
        **verdict.shown,
        **{key: value for key, value in optional.items() if value is not None},
    }


def figures_of(task: OpenTask, lines: Sequence[Sample]) -> Figures:
    """{"n": questions, NAME: the mean value, "NAME_interval", "NAME_truncated", "NAME_unread" (the share that the judge
    did not answer), "details": of each turn, and against a baseline "length_controlled" and, by a judge,
    "orders_agree"; "by_kind": of each category}. NAME is points (or scores), or win_rate.

    Raises:
        ToolkitError: no answer was judged.
    """
    judged = [line for line in lines if line["value"] is not None]
    if not judged:
        raise ToolkitError(f"no answer was judged; the first: {lines[0]['reason']}")
    shares = task.baseline is not None
    main = _mean(judged, shares)
    figures: Figures = {
        "n": len({line["row"] for line in lines}),
        task.decoding: main["value"],
        f"{task.decoding}_interval": main["interval"],
        f"{task.decoding}_truncated": fmean(line["truncated"] for line in lines),
        f"{task.decoding}_unread": 1 - len(judged) / len(lines),
    }
    details = _by(judged, lambda line: f"turn_{line['turn']}", shares)
    details = details if len(details) > 1 else {}
    if task.baseline is not None:
        sizes = [(len(line["completion"]), len(line["baseline"])) for line in judged]
        values, rows = [line["value"] for line in judged], [line["row"] for line in judged]
        details["length_controlled"] = length_controlled(values, sizes, rows)
    if compared := [line for line in judged if "orders" in line]:
        agree = [{**line, "value": float(line["orders"][0] == line["orders"][1])} for line in compared]
        details["orders_agree"] = _mean(agree, True)
    kinds = _by([line for line in judged if "category" in line], lambda line: line["category"], shares)
    return {**figures, **({"details": details} if details else {}), **({"by_kind": kinds} if kinds else {})}


def _by(lines: Sequence[Sample], name: Callable[[Sample], str], shares: bool) -> dict[str, Figure]:
    """The mean of each group, in the order in which they come."""
    groups: dict[str, list[Sample]] = {}
    for line in lines:
        groups.setdefault(name(line), []).append(line)
    return {key: _mean(group, shares) for key, group in groups.items()}


def _mean(lines: Sequence[Mapping[str, Any]], shares: bool) -> Figure:
    """The mean value; the turns of a question are one cluster. shares: values are 0 to 1."""
    values, rows = [float(line["value"]) for line in lines], [line["row"] for line in lines]
    return share(values, rows) if shares else aggregated(fmean, values, rows)
