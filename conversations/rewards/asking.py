"""Verdicts of a language model behind an endpoint: points for an answer by a rubric, or which of two is better.

Every request and verdict is stored in the run directory; a resumed run repeats no request.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conversations.answers.judge_prompts import Scale, pair_messages, point_messages, read_better, read_points
from conversations.answers.verdict import shown
from conversations.errors import ToolkitError
from conversations.rewards.endpoint import Endpoint, EndpointSettings, NoReply
from conversations.run_files import JUDGED_LINES
from deepseek_v2_modeling.training import append_lines, read_lines

Messages = list[dict[str, str]]
Line = dict[str, Any]  # a line of judge.jsonl
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Judged:
    """A verdict and its reason. value: from 0 to 1, NaN if the judge gave none, None if there is nothing to judge.
    orders: of a comparison, the value with the answer as the first and as the second."""

    value: float | None
    reason: str
    orders: tuple[float, float] | None = None


class Judge:
    """Asks a language model; the same question once only.

    Args:
        scale: the lowest and the highest points.
        mode: what it is asked for; verdicts of another mode are not used again.
        concurrency: maximum number of concurrent requests.
        run_dir: where verdicts are stored; None keeps them in memory only.
        processes: the number of processes that ask, which share the rate and the budget; by default all of the run.

    Raises:
        ToolkitError: the named key is not set, or must not be sent to this address.
    """

    def __init__(
        self,
        endpoint: EndpointSettings,
        rubric: str,
        *,
        scale: Scale,
        mode: str,
        concurrency: int = 8,
        run_dir: Path | None = None,
        processes: int | None = None,
    ):
        self.rubric, self.scale, self.mode = rubric, scale, mode
        self.settings, self.concurrency = endpoint, concurrency
        self.lock = threading.Lock()
        self.file = None if run_dir is None else run_dir / _own_file()
        self.lines: list[Line] = []  # used if there is no file
        stored = self._stored_lines()
        self.verdicts = {line["key"]: line for line in stored if line["value"] is not None}
        processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
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

    def ask_all(self, questions: Mapping[Key, Callable[[], Judged]], stop: bool) -> dict[Key, Judged]:
        """Ask all questions, up to `concurrency` at a time, and return {key: verdict}.

        Raises:
            ToolkitError: with `stop`, at the first question that the judge does not answer.
        """
        verdicts: dict[Key, Judged] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            key_of = {pool.submit(question): key for key, question in questions.items()}
            for future in as_completed(key_of):
                verdict = verdicts[key_of[future]] = future.result()
                if stop and verdict.value is not None and math.isnan(verdict.value):
                    pool.shutdown(cancel_futures=True)  # the run ends here: make no further paid requests
                    raise ToolkitError(verdict.reason)
        return verdicts

    def points(self, prompt: str, answer: str, reference: str | None = None) -> Judged:
        """(points - lowest) / (highest - lowest). reference: a correct answer that the judge is shown."""
        try:
            value, reply = self._verdict(
                self._hash([prompt, answer, reference]),
                lambda: point_messages(self.rubric, self.scale, prompt, answer, reference),
                lambda reply: read_points(reply, self.scale),
            )
        except NoReply as error:
            return Judged(math.nan, str(error.args[0]))
        return Judged(value, shown(reply, 300))

    def compared(
        self,
        prompt: str,
        answer: str,
        opponent: str,
        reference: str | None = None,
        *,
        whole: bool = False,
        called: str = "the other",
    ) -> Judged:
        """1 if the answer is better than its opponent, 0 if it is worse. Both orders are asked, because judges tend to
        prefer a position; the value is the mean of the two.

        reference: a correct answer that the judge is shown. whole: both are conversations, whose last turn counts.
        called: the opponent's name in the reason.
        """
        values = []
        shown_too = [] if reference is None else [reference]
        try:
            for order, texts in (("AB", (answer, opponent)), ("BA", (opponent, answer))):
                value, _ = self._verdict(
                    self._hash([order, prompt, answer, opponent, *shown_too]),
                    lambda texts=texts: pair_messages(self.rubric, prompt, *texts, reference, whole),
                    read_better,
                    {"order": order, "pair": self._hash([prompt, answer, opponent, *shown_too])},
                )
                values.append(value if order == "AB" else 1 - value)
        except NoReply as error:
            return Judged(math.nan, str(error.args[0]))
        return Judged(sum(values) / 2, _reason(values, called), (values[0], values[1]))

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

    def _hash(self, texts: Sequence[str | None]) -> str:
        """A hash of everything that a verdict depends on: the judge's settings and these texts."""
        settings = self.settings
        judge = [settings.base_url, settings.model, settings.parameters, self.rubric, self.scale, self.mode]
        return hashlib.sha256(json.dumps([*judge, *texts], sort_keys=True).encode()).hexdigest()


def _reason(values: Sequence[float], called: str) -> str:
    first, second = ({0.0: "worse than", 0.5: "as good as", 1.0: "better than"}[value] for value in values)
    if first == second:
        return f"{first} {called} in both orders"
    return f"{first} {called} as the first, {second} it as the second: the orders disagree"


def both_orders(lines: Iterable[Line]) -> list[tuple[float, float]]:
    """For each pair that was compared in both orders: the value of its first answer in (order AB, order BA)."""
    values: dict[str, dict[str, float]] = {}
    for line in lines:
        if "order" in line and line["value"] is not None:
            first = line["value"] if line["order"] == "AB" else 1 - line["value"]
            values.setdefault(line["pair"], {})[line["order"]] = first
    return [(by_order["AB"], by_order["BA"]) for by_order in values.values() if len(by_order) == 2]


def _process() -> int:
    """The rank of this process in the run."""
    return int(os.environ.get("RANK", "0"))


def _own_file(process: int | str | None = None) -> str:
    """The file of a process: judge.jsonl for the first, judge.1.jsonl for the second; "*" gives a glob for all."""
    process = _process() if process is None else process
    stem, suffix = JUDGED_LINES.rsplit(".", 1)
    return JUDGED_LINES if process == 0 else f"{stem}{'' if process == '*' else '.'}{process}.{suffix}"
