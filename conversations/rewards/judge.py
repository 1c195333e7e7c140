"""A language model behind an endpoint as a reward: it scores answers by a rubric, or compares them with the reference
or with one another.

Every request and verdict is stored in the run directory; a resumed run repeats no request.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from conversations.answers.judge_prompts import pair_messages, point_messages, read_better, read_points
from conversations.answers.prompts import prompt_text
from conversations.answers.verdict import shown
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer, OnError, Reward, Values
from conversations.rewards.endpoint import Endpoint, EndpointSettings, NoReply
from conversations.run_files import JUDGED_LINES
from deepseek_v2_modeling.training import append_lines, read_lines

Messages = list[dict[str, str]]
Line = dict[str, Any]  # of judge.jsonl
Mode = Literal["pointwise", "pairwise", "group"]


@dataclass(frozen=True)
class Judged:
    """A verdict and its reason. value: from 0 to 1, NaN if the judge gave none, None if there is nothing to judge."""

    value: float | None
    reason: str


class JudgeReward(Reward):
    """A judge's score from 0 to 1, by mode:

    pointwise   (points - lowest) / (highest - lowest) on the scale
    pairwise    how the answer does beside the reference: 1 where it is better, 0 where it is worse
    group       the same beside the other answers to its prompt that are judged with it, the mean over them; 0.5 for an
                answer without another

    Two answers are compared in both orders, since a judge may prefer whatever stands first: a disagreement is worth a
    half.

    Args:
        scale: the lowest and the highest points.
        opponents: the number of others that each answer of a group is compared with; None for all.
        concurrency: maximum number of concurrent requests.
        run_dir: where verdicts are stored; None keeps them in memory only.

    Raises:
        ToolkitError: the named key is not set, or must not be sent to this address.
    """

    gives_reasons = True

    def __init__(
        self,
        endpoint: EndpointSettings,
        rubric: str,
        weight: float = 1.0,
        on_error: OnError = "error",
        *,
        scale: tuple[float, float] = (1.0, 10.0),
        mode: Mode = "pointwise",
        opponents: int | None = None,
        concurrency: int = 8,
        run_dir: Path | None = None,
    ):
        super().__init__("judge", weight, on_error)
        self.rubric, self.scale, self.mode, self.opponents = rubric, scale, mode, opponents
        self.needs_reference = mode == "pairwise"
        self.settings, self.concurrency = endpoint, concurrency
        self.lock = threading.Lock()
        self.file = None if run_dir is None else run_dir / _own_file()
        self.lines: list[Line] = []  # where there is no file
        kept = self._kept()
        self.verdicts = {line["key"]: line for line in kept if line["value"] is not None}
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        self.endpoint = Endpoint(endpoint, sum(line["requests"] for line in kept), _process(), processes)

    def _kept(self) -> list[Line]:
        """The stored requests and verdicts of this judge, from all processes."""
        if self.file is None:
            return self.lines
        files = [read_lines(path) for path in sorted(self.file.parent.glob(_own_file("*")))]
        return [line for lines in files for line in lines if line.get("judge") == self._hash([])]

    def summary(self) -> str:
        """The number of requests, and how often the two orders of a comparison agree, of all processes."""
        kept = self._kept()
        asked = f"{sum(line['requests'] for line in kept):,} requests to {self.settings.model}"
        agree = [one == other for one, other in both_orders(kept)]
        return f"{asked}; both orders agree on {sum(agree):,} of {len(agree):,} comparisons" if agree else asked

    def judge(self, answers: Sequence[Answer]) -> Values:
        """Each distinct answer to a prompt is judged once."""
        if self.mode == "group":
            verdicts = self._standings(answers)
            judged = [verdicts[prompt_text(answer.prompt), answer.text] for answer in answers]
        else:
            found = self._all({self._key(answer): partial(self._judged, answer) for answer in answers})
            judged = [found[self._key(answer)] for answer in answers]
        self.reasons = [verdict.reason for verdict in judged]
        return [verdict.value for verdict in judged]

    def _all(self, questions: Mapping[Any, Callable[[], Judged]]) -> dict[Any, Judged]:
        """Answer all questions, several at a time."""
        found: dict[Any, Judged] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(question): key for key, question in questions.items()}
            for done in as_completed(asked):
                verdict = found[asked[done]] = done.result()
                if self.on_error == "error" and verdict.value is not None and math.isnan(verdict.value):
                    pool.shutdown(cancel_futures=True)  # the run ends here: make no further paid requests
                    raise ToolkitError(verdict.reason)
        return found

    def _judged(self, answer: Answer) -> Judged:
        prompt = prompt_text(answer.prompt)
        if self.mode == "pairwise":
            if answer.reference is None:
                return Judged(None, "no reference to compare with")
            return self._compared(prompt, answer.text, answer.reference)
        try:
            value, reply = self._verdict(
                self._key(answer),
                lambda: point_messages(self.rubric, self.scale, prompt, answer.text),
                lambda reply: read_points(reply, self.scale),
            )
        except NoReply as error:
            return Judged(math.nan, str(error.args[0]))
        return Judged(value, shown(reply, 300))

    def _standings(self, answers: Sequence[Answer]) -> dict[tuple[str, str], Judged]:
        """By prompt and text: how each answer does beside others to the same prompt."""
        groups: dict[str, dict[str, None]] = {}
        for answer in answers:
            groups.setdefault(prompt_text(answer.prompt), {})[answer.text] = None
        pairs = {(prompt, *pair) for prompt, texts in groups.items() for pair in meetings([*texts], self.opponents)}
        found = self._all({pair: partial(self._compared, *pair) for pair in sorted(pairs)})
        met: dict[tuple[str, str], list[Judged]] = {(prompt, text): [] for prompt in groups for text in groups[prompt]}
        for (prompt, one, other), verdict in found.items():
            assert verdict.value is not None
            met[prompt, one].append(verdict)
            met[prompt, other].append(Judged(1 - verdict.value, verdict.reason))
        return {place: standing(verdicts) for place, verdicts in met.items()}

    def _compared(self, prompt: str, answer: str, other: str) -> Judged:
        """Compare in both orders, because judges tend to prefer a position; the value is the mean of the two."""
        values = []
        try:
            for order, texts in (("AB", (answer, other)), ("BA", (other, answer))):
                value, _ = self._verdict(
                    self._hash([order, prompt, answer, other]),
                    lambda texts=texts: pair_messages(self.rubric, prompt, *texts),
                    read_better,
                    {"order": order, "pair": self._hash([prompt, answer, other])},
                )
                values.append(value if order == "AB" else 1 - value)
        except NoReply as error:
            return Judged(math.nan, str(error.args[0]))
        agree = values[0] == values[1]
        first, second = ({0.0: "worse than", 0.5: "as good as", 1.0: "better than"}[value] for value in values)
        reason = f"{first} the reference as the first, {second} it as the second: the orders disagree"
        return Judged(sum(values) / 2, f"{first} the reference in both orders" if agree else reason)

    def _verdict(
        self, key: str, messages: Callable[[], Messages], read: Callable[[str], float], stored_with: Line | None = None
    ) -> tuple[float, str]:
        """(value, reply) from the stored verdicts, or else from the endpoint, whose verdict is then stored."""
        stored = self.verdicts.get(key)
        if stored:
            return stored["value"], stored["reply"]
        sent = messages()
        line: Line = {
            "key": key,
            **(stored_with or {}),
            "judge": self._hash([]),
            "process": _process(),
            "model": self.settings.model,
            "messages": sent,
        }
        try:
            value, reply, requests = self.endpoint.ask(sent, read)
        except NoReply as error:
            self._store({**line, "value": None, "error": error.args[0], "requests": error.args[1]})
            raise
        self._store({**line, "value": value, "reply": reply, "requests": requests})
        return value, reply

    def _store(self, line: Line) -> None:
        with self.lock:
            if line["value"] is not None:
                self.verdicts[line["key"]] = line
            if self.file is None:
                self.lines.append(line)
            else:
                append_lines(self.file, [line])

    def _key(self, answer: Answer) -> str:
        return self._hash([prompt_text(answer.prompt), answer.text, answer.reference if self.needs_reference else None])

    def _hash(self, texts: Sequence[str | None]) -> str:
        """A hash of everything that a verdict depends on: the judge's settings and these texts."""
        settings = self.settings
        judge = [settings.base_url, settings.model, settings.parameters, self.rubric, self.scale, self.mode]
        return hashlib.sha256(json.dumps([*judge, *texts], sort_keys=True).encode()).hexdigest()


def both_orders(lines: Iterable[Line]) -> list[tuple[float, float]]:
    """How the first of two answers does in each of the two orders, of the pairs that were compared in both."""
    values: dict[str, dict[str, float]] = {}
    for line in lines:
        if "order" in line and line["value"] is not None:
            first = line["value"] if line["order"] == "AB" else 1 - line["value"]
            values.setdefault(line["pair"], {})[line["order"]] = first
    return [(found["AB"], found["BA"]) for found in values.values() if len(found) == 2]


def meetings(texts: Sequence[str], opponents: int | None) -> set[tuple[str, str]]:
    """Pairs of distinct texts, each in one order: all of them, or each text with the next ones around a circle, so that
    each has `opponents` others (one more where that is odd)."""
    count = len(texts)
    steps = count // 2 if opponents is None else min(count // 2, -(-opponents // 2))
    found = {(texts[i], texts[(i + step) % count]) for i in range(count) for step in range(1, steps + 1)}
    return {(min(pair), max(pair)) for pair in found}


def standing(met: Sequence[Judged]) -> Judged:
    """The mean of an answer's comparisons that could be had; NaN where none of several could."""
    if not met:
        return Judged(0.5, "no other answer to compare with")
    values = [verdict.value for verdict in met if verdict.value is not None and not math.isnan(verdict.value)]
    if not values:
        return Judged(math.nan, met[0].reason)
    better, worse = sum(value > 0.5 for value in values), sum(value < 0.5 for value in values)
    missing = f", {len(met) - len(values)} not compared" if len(values) < len(met) else ""
    equal = len(values) - better - worse
    return Judged(
        sum(values) / len(values),
        f"better than {better} of {len(met)} others, worse than {worse}, as good as {equal}{missing}",
    )


def _process() -> int:
    """The rank of this process in the run."""
    return int(os.environ.get("RANK", "0"))


def _own_file(process: int | str | None = None) -> str:
    """The file of a process: judge.jsonl for the first, judge.1.jsonl for the second; "*" gives a glob for all."""
    process = _process() if process is None else process
    stem, suffix = JUDGED_LINES.rsplit(".", 1)
    return JUDGED_LINES if process == 0 else f"{stem}{'' if process == '*' else '.'}{process}.{suffix}"
