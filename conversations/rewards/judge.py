"""A language model behind an endpoint as a reward: it scores answers by a rubric, or compares them with a reference or
with one another.

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
Line = dict[str, Any]  # a line of judge.jsonl
Mode = Literal["pointwise", "pairwise", "group"]


@dataclass(frozen=True)
class Judged:
    """A verdict and its reason. value: from 0 to 1, NaN if the judge gave none, None if there is nothing to judge."""

    value: float | None
    reason: str


class JudgeReward(Reward):
    """A judge's score from 0 to 1, by mode:

    pointwise   (points - lowest) / (highest - lowest) on the scale
    pairwise    comparison with the reference: 1 if the answer is better, 0 if it is worse
    group       the mean of such comparisons with the other answers to its prompt in the same batch; 0.5 if there are
                none

    Two answers are compared in both orders, since judges tend to prefer a position; the value is the mean of the two.

    Args:
        scale: the lowest and the highest points.
        opponents: the number of other answers that each answer of a group is compared with; None for all.
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
        self.lines: list[Line] = []  # used if there is no file
        stored = self._stored_lines()
        self.verdicts = {line["key"]: line for line in stored if line["value"] is not None}
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        self.endpoint = Endpoint(endpoint, sum(line["requests"] for line in stored), _process(), processes)

    def _stored_lines(self) -> list[Line]:
        """The stored requests and verdicts of this judge, from all processes."""
        if self.file is None:
            return self.lines
        files = [read_lines(path) for path in sorted(self.file.parent.glob(_own_file("*")))]
        return [line for lines in files for line in lines if line.get("judge") == self._hash([])]

    def summary(self) -> str:
        """The number of requests, and how often the two orders of a comparison agree, over all processes."""
        lines = self._stored_lines()
        requests = f"{sum(line['requests'] for line in lines):,} requests to {self.settings.model}"
        agree = [forward == reverse for forward, reverse in both_orders(lines)]
        return f"{requests}; both orders agree on {sum(agree):,} of {len(agree):,} comparisons" if agree else requests

    def judge(self, answers: Sequence[Answer]) -> Values:
        """Each distinct answer to a prompt is judged once."""
        if self.mode == "group":
            verdicts = self._group_verdicts(answers)
            judged = [verdicts[prompt_text(answer.prompt), answer.text] for answer in answers]
        else:
            verdict_of = self._ask_all({self._key(answer): partial(self._judged, answer) for answer in answers})
            judged = [verdict_of[self._key(answer)] for answer in answers]
        self.reasons = [verdict.reason for verdict in judged]
        return [verdict.value for verdict in judged]

    def _ask_all(self, questions: Mapping[Any, Callable[[], Judged]]) -> dict[Any, Judged]:
        """Ask all questions, up to `concurrency` at a time, and return {key: verdict}."""
        verdicts: dict[Any, Judged] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            key_of = {pool.submit(question): key for key, question in questions.items()}
            for future in as_completed(key_of):
                verdict = verdicts[key_of[future]] = future.result()
                if self.on_error == "error" and verdict.value is not None and math.isnan(verdict.value):
                    pool.shutdown(cancel_futures=True)  # the run ends here: make no further paid requests
                    raise ToolkitError(verdict.reason)
        return verdicts

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

    def _group_verdicts(self, answers: Sequence[Answer]) -> dict[tuple[str, str], Judged]:
        """{(prompt, text): verdict}, from comparisons of each answer with others to the same prompt."""
        groups: dict[str, dict[str, None]] = {}
        for answer in answers:
            groups.setdefault(prompt_text(answer.prompt), {})[answer.text] = None
        pairs = {(prompt, *pair) for prompt, texts in groups.items() for pair in meetings([*texts], self.opponents)}
        verdicts = self._ask_all({pair: partial(self._compared, *pair) for pair in sorted(pairs)})
        comparisons: dict[tuple[str, str], list[Judged]] = {
            (prompt, text): [] for prompt in groups for text in groups[prompt]
        }
        for (prompt, first, second), verdict in verdicts.items():
            assert verdict.value is not None
            comparisons[prompt, first].append(verdict)
            comparisons[prompt, second].append(Judged(1 - verdict.value, verdict.reason))
        return {place: standing(judged) for place, judged in comparisons.items()}

    def _compared(self, prompt: str, answer: str, opponent: str) -> Judged:
        """Compare in both orders, because judges tend to prefer a position; the value is the mean of the two."""
        values = []
        try:
            for order, texts in (("AB", (answer, opponent)), ("BA", (opponent, answer))):
                value, _ = self._verdict(
                    self._hash([order, prompt, answer, opponent]),
                    lambda texts=texts: pair_messages(self.rubric, prompt, *texts),
                    read_better,
                    {"order": order, "pair": self._hash([prompt, answer, opponent])},
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
    """For each pair that was compared in both orders: the value of its first answer in (order AB, order BA)."""
    values: dict[str, dict[str, float]] = {}
    for line in lines:
        if "order" in line and line["value"] is not None:
            first = line["value"] if line["order"] == "AB" else 1 - line["value"]
            values.setdefault(line["pair"], {})[line["order"]] = first
    return [(by_order["AB"], by_order["BA"]) for by_order in values.values() if len(by_order) == 2]


def meetings(texts: Sequence[str], opponents: int | None) -> set[tuple[str, str]]:
    """The pairs of texts to compare, each in one order: all pairs, or each text with its successors on a circle, so
    that each has `opponents` others (one more if that number is odd)."""
    count = len(texts)
    steps = count // 2 if opponents is None else min(count // 2, -(-opponents // 2))
    pairs = {(texts[i], texts[(i + step) % count]) for i in range(count) for step in range(1, steps + 1)}
    return {(min(pair), max(pair)) for pair in pairs}


def standing(comparisons: Sequence[Judged]) -> Judged:
    """The mean of an answer's comparisons that succeeded; NaN if all of them failed."""
    if not comparisons:
        return Judged(0.5, "no other answer to compare with")
    values = [verdict.value for verdict in comparisons if verdict.value is not None and not math.isnan(verdict.value)]
    if not values:
        return Judged(math.nan, comparisons[0].reason)
    better, worse = sum(value > 0.5 for value in values), sum(value < 0.5 for value in values)
    missing = f", {len(comparisons) - len(values)} not compared" if len(values) < len(comparisons) else ""
    equal = len(values) - better - worse
    return Judged(
        sum(values) / len(values),
        f"better than {better} of {len(comparisons)} others, worse than {worse}, as good as {equal}{missing}",
    )


def _process() -> int:
    """The rank of this process in the run."""
    return int(os.environ.get("RANK", "0"))


def _own_file(process: int | str | None = None) -> str:
    """The file of a process: judge.jsonl for the first, judge.1.jsonl for the second; "*" gives a glob for all."""
    process = _process() if process is None else process
    stem, suffix = JUDGED_LINES.rsplit(".", 1)
    return JUDGED_LINES if process == 0 else f"{stem}{'' if process == '*' else '.'}{process}.{suffix}"
