"""From lm-eval's logged samples to samples.jsonl and figures with intervals."""

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from conversations.answers.repeated import majority_score, pass_at_k, sizes_of_k
from eval.config import BenchmarkTask, decoding_name
from eval.figures import Figure, aggregated, share
from eval.judging import Judged

Sample = dict[str, Any]
Figures = dict[str, Any]
VALUE = "value"  # the decoding of a task that generates nothing
UNREAD = ("[invalid]", "")  # lm-eval's filters, where an answer holds nothing to read
_NAMED_AFTER_NOTHING = "none"  # lm-eval's filter of tasks without filters


@dataclass(frozen=True)
class Logged:
    """What lm-eval logged of one task.

    samples: of every row and filter. aggregations: by metric. decoding: how its answers were decoded, or `VALUE`.
    rolls: whether its rows are whole texts.
    """

    samples: Sequence[Mapping[str, Any]]
    aggregations: Mapping[str, Callable[[Sequence[Any]], float]]
    decoding: str = VALUE
    rolls: bool = False

    @property
    def filters(self) -> list[str]:
        return list(dict.fromkeys(sample["filter"] for sample in self.samples))

    @property
    def metrics(self) -> list[str]:
        """Those of the samples, in the order of the task's file."""
        found = self.samples[0]["metrics"]
        return sorted(found, key=lambda metric: [*self.aggregations, *found].index(metric))

    def of_filter(self, name: str) -> list[Mapping[str, Any]]:
        return [sample for sample in self.samples if sample["filter"] == name]


def logged(task: Any, samples: Sequence[Mapping[str, Any]], temperature: float) -> Logged:
    """`temperature`: of a task that generates."""
    generates = task.OUTPUT_TYPE == "generate_until"
    decoding = decoding_name(temperature) if generates else VALUE
    return Logged(samples, task.aggregation(), decoding, task.OUTPUT_TYPE == "loglikelihood_rolling")


# --- samples.jsonl


def sample_lines(entry: BenchmarkTask, logs: Mapping[str, Logged]) -> list[Sample]:
    """A line for each answer, of the first filter; rows are numbered through all tasks of the entry."""
    lines, number = [], 0
    for name, log in logs.items():
        for sample in log.of_filter(log.filters[0]):
            prompt = str(sample["arguments"][0][0])
            head = {"task": entry.name, "row": number, "decoding": log.decoding, "prompt": prompt}
            part = {"part": name} if len(logs) > 1 else {}
            lines += [{**head, **part, **line} for line in _lines_of(log, sample)]
            number += 1
    return lines


def _lines_of(log: Logged, sample: Mapping[str, Any]) -> list[Sample]:
    value = sample[log.metrics[0]]
    if log.decoding == VALUE:
        return [_likelihoods(sample, *_outcome(value, log.rolls))]
    read, replies = sample["filtered_resps"][0], sample["resps"][0]
    if isinstance(read, list) and read and isinstance(read[0], Judged):
        return [
            _judged_line(place, reply, judged, len(replies))
            for place, (reply, judged) in enumerate(zip(replies, read, strict=True))
        ]
    read = None if str(read) in UNREAD else str(read)
    return [
        {**_reply(replies[0]), "read": read, "value": _outcome(value, False)[0], "reference": str(sample["target"])}
    ]


def _reply(reply: Any) -> Sample:
    return {"completion": str(reply), "truncated": not reply.finished, "tokens": reply.tokens}


def _judged_line(place: int, reply: Any, judged: Judged, answers: int) -> Sample:
    numbered = {"answer": place} if answers > 1 else {}
    return {**numbered, **_reply(reply), **judged.shown}


def _likelihoods(sample: Mapping[str, Any], value: float | None, weight: float) -> Sample:
    responses = [response[0] for response in sample["resps"]]
    if not isinstance(responses[0], tuple):
        return {"logp": responses[0], "value": value, "weight": weight}
    logps = [logp for logp, _ in responses]
    line = {"logps": logps, "value": value, "reference": str(sample["target"])}
    if len(logps) > 1:
        line |= {"choices": [str(arguments[1]) for arguments in sample["arguments"]], "read": logps.index(max(logps))}
    return line


def _outcome(value: Any, rolls: bool) -> tuple[float | None, float]:
    """(value of a row, its weight), for paired comparisons; None where a metric has no value for a single row."""
    if rolls:  # (log-likelihood, bytes) -> bits per byte
        return -value[0] / value[1] / math.log(2), value[1]
    return (float(value), 1.0) if isinstance(value, (int, float)) else (None, 1.0)


# --- figures


def figures_of(entry: BenchmarkTask, logs: Mapping[str, Logged], lines: Sequence[Sample]) -> Figures:
    """{"n": rows, decoding: the first metric, "DECODING_interval", and of answers "DECODING_truncated" and
    "DECODING_unread", "details": the other metrics by name, each {value, interval, n}}."""
    first = next(iter(logs.values()))
    main, *others = [(metric, name) for name in first.filters for metric in first.metrics]
    figure = _figure(logs, *main)
    found: Figures = {
        "n": figure["n"],
        first.decoding: figure["value"],
        f"{first.decoding}_interval": figure["interval"],
    }
    if first.decoding != VALUE:
        found[f"{first.decoding}_truncated"] = fmean(line["truncated"] for line in lines)
        found[f"{first.decoding}_unread"] = fmean(line["read"] is None for line in lines)
    several = len(first.filters) > 1
    details = {_title(metric, name, several): _figure(logs, metric, name) for metric, name in others}
    details |= {name: _figure({name: log}, *main) for name, log in logs.items()} if len(logs) > 1 else {}
    details |= repeated_figures(lines, entry.pass_at) if entry.num_answers > 1 else {}
    if entry.against:
        rows = {line["row"] for line in lines if line.get("contaminated")}
        found["contaminated"] = len(rows)
        if len(rows) < figure["n"]:
            details["not_in_training_data"] = _figure(_without(logs, rows), *main)
    return {**found, **({"details": details} if details else {})}


def rows_of(logs: Mapping[str, Logged]) -> list[Any]:
    """The rows of all tasks, in the order of their numbers."""
    return [sample["doc"] for log in logs.values() for sample in log.of_filter(log.filters[0])]


def _without(logs: Mapping[str, Logged], rows: Collection[int]) -> dict[str, Logged]:
    """The same without some rows, which are numbered through all tasks."""
    kept, before = {}, 0
    for name, log in logs.items():
        samples = [
            sample
            for filtered in log.filters
            for number, sample in enumerate(log.of_filter(filtered), before)
            if number not in rows
        ]
        before += len(log.of_filter(log.filters[0]))
        kept[name] = replace(log, samples=samples)
    return kept


def _title(metric: str, name: str, several: bool) -> str:
    return f"{metric},{name}" if several and name != _NAMED_AFTER_NOTHING else metric


def _figure(logs: Mapping[str, Logged], metric: str, name: str) -> Figure:
    """A metric over the rows of all tasks, which are pooled."""
    samples = [sample for log in logs.values() for sample in log.of_filter(name) if metric in sample]
    values = [sample[metric] for sample in samples]
    clusters: list[Hashable] = [str(sample["arguments"][0][0]) for sample in samples]
    aggregate = next(iter(logs.values())).aggregations.get(metric, fmean)
    shares = all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values)
    if shares and aggregate.__name__ in ("mean", "fmean"):
        return share([float(value) for value in values], clusters)
    return aggregated(aggregate, values, clusters)


def repeated_figures(lines: Sequence[Sample], pass_at: Sequence[int] = ()) -> Figures:
    """avg@n, pass@k and cons@n of n answers to each row, with intervals over prompts."""
    rows: dict[int, list[Sample]] = {}
    for line in lines:
        rows.setdefault(line["row"], []).append(line)
    n = len(next(iter(rows.values())))
    prompts = [answers[0]["prompt"] for answers in rows.values()]
    right = [sum(answer["value"] >= 1 for answer in answers) for answers in rows.values()]
    scores = {f"avg@{n}": [fmean(answer["value"] for answer in answers) for answers in rows.values()]}
    scores |= {f"pass@{k}": [pass_at_k(n, count, k) for count in right] for k in pass_at or sizes_of_k(n)}
    scores[f"cons@{n}"] = [
        majority_score([answer["read"] for answer in answers], [answer["value"] for answer in answers])
        for answers in rows.values()
    ]
    return {name: share(values, prompts) for name, values in scores.items()}
