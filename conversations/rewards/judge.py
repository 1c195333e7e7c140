"""A language model behind an endpoint as a reward: it scores answers by a rubric, or compares them with the reference.

Every request and verdict is kept in the run directory; a run that resumes asks nothing again.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations.answers.judge_prompts import pair_messages, point_messages, read_better, read_points
from conversations.answers.prompts import prompt_text
from conversations.answers.verdict import shown
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer, OnError, Reward, Values
from conversations.rewards.endpoint import Endpoint, EndpointSettings, NoReply
from conversations.run_files import JUDGED_LINES
from deepseek_v2_modeling.training import append_lines, read_lines

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Judged:
    """A verdict, from 0 to 1, and why. value: NaN where none could be had, None where there is nothing to judge."""

    value: float | None
    reason: str


class JudgeReward(Reward):
    """The score of a judge, from 0 to 1: (points - lowest) / (highest - lowest) on the scale; or, `pairwise`, how the
    answer does beside the reference, asked in both orders: 1 where it is better in both, 0 in neither, else between.

    Args:
        scale: the lowest and the highest points.
        concurrency: requests at once.
        run_dir: where verdicts are kept; None keeps them in memory.

    Raises:
        ToolkitError: no key where one is named, or an address to which it must not be sent.
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
        pairwise: bool = False,
        concurrency: int = 8,
        run_dir: Path | None = None,
    ):
        super().__init__("judge", weight, on_error)
        self.rubric, self.scale, self.pairwise, self.needs_reference = rubric, scale, pairwise, pairwise
        self.settings, self.concurrency = endpoint, concurrency
        self.lock = threading.Lock()
        self.file = None if run_dir is None else run_dir / _own_file()
        files = {} if run_dir is None else {path: read_lines(path) for path in sorted(run_dir.glob(_own_file("*")))}
        kept = [line for lines in files.values() for line in lines if line.get("judge") == self._hash([])]
        self.known = {line["key"]: line for line in kept if line["value"] is not None}
        mine = [line for line in kept if line["process"] == _process()]
        self.endpoint = Endpoint(endpoint, sum(line["requests"] for line in mine))
        self.compared = self.agreed = 0

    def summary(self) -> str:
        """What was asked so far."""
        asked = f"{self.endpoint.spent:,} requests to {self.settings.model}"
        if not self.compared:
            return asked
        return f"{asked}; both orders agree on {self.agreed:,} of {self.compared:,} comparisons"

    def judge(self, answers: Sequence[Answer]) -> Values:
        """Each distinct answer to a prompt is judged once."""
        keys = [self._key(answer) for answer in answers]
        distinct = dict(zip(keys, answers, strict=True))
        found: dict[str, Judged] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self._judged, answer): key for key, answer in distinct.items()}
            for done in as_completed(asked):
                verdict = found[asked[done]] = done.result()
                if self.on_error == "error" and verdict.value is not None and math.isnan(verdict.value):
                    pool.shutdown(cancel_futures=True)  # what is asked now would be paid for nothing
                    raise ToolkitError(verdict.reason)
        self.reasons = [found[key].reason for key in keys]
        return [found[key].value for key in keys]

    def _judged(self, answer: Answer) -> Judged:
        if self.pairwise and answer.reference is None:
            return Judged(None, "no reference to compare with")
        prompt = prompt_text(answer.prompt)
        try:
            if self.pairwise:
                return self._compared(prompt, answer.text, answer.reference or "")
            value, reply = self._asked(
                self._key(answer),
                lambda: point_messages(self.rubric, self.scale, prompt, answer.text),
                lambda reply: read_points(reply, self.scale),
            )
        except NoReply as error:
            return Judged(math.nan, str(error.args[0]))
        return Judged(value, shown(reply, 300))

    def _compared(self, prompt: str, answer: str, other: str) -> Judged:
        """A judge may prefer whatever stands first: both orders are asked, and a disagreement is worth a half."""
        values = []
        for order, texts in (("AB", (answer, other)), ("BA", (other, answer))):
            value, _ = self._asked(
                self._hash([order, prompt, answer, other]),
                lambda texts=texts: pair_messages(self.rubric, prompt, *texts),
                read_better,
            )
            values.append(value if order == "AB" else 1 - value)
        agree = values[0] == values[1]
        with self.lock:
            self.compared, self.agreed = self.compared + 1, self.agreed + agree
        first, second = ({0.0: "worse than", 0.5: "as good as", 1.0: "better than"}[value] for value in values)
        reason = f"{first} the reference as the first, {second} it as the second: the orders disagree"
        return Judged(sum(values) / 2, f"{first} the reference in both orders" if agree else reason)

    def _asked(self, key: str, messages: Callable[[], Messages], read: Callable[[str], float]) -> tuple[float, str]:
        known = self.known.get(key)
        if known:
            return known["value"], known["reply"]
        sent = messages()
        line: dict[str, Any] = {
            "key": key,
            "judge": self._hash([]),
            "process": _process(),
            "model": self.settings.model,
            "messages": sent,
        }
        try:
            value, reply, requests = self.endpoint.ask(sent, read)
        except NoReply as error:
            self._keep({**line, "value": None, "error": error.args[0], "requests": error.args[1]})
            raise
        self._keep({**line, "value": value, "reply": reply, "requests": requests})
        return value, reply

    def _keep(self, line: dict[str, Any]) -> None:
        with self.lock:
            if line["value"] is not None:
                self.known[line["key"]] = line
            if self.file is not None:
                append_lines(self.file, [line])

    def _key(self, answer: Answer) -> str:
        return self._hash([prompt_text(answer.prompt), answer.text, answer.reference if self.pairwise else None])

    def _hash(self, texts: Sequence[str | None]) -> str:
        """What a verdict depends on."""
        settings = self.settings
        judge = [settings.base_url, settings.model, settings.parameters, self.rubric, self.scale, self.pairwise]
        return hashlib.sha256(json.dumps([*judge, *texts], sort_keys=True).encode()).hexdigest()


def _process() -> int:
    """The number of this process among those of the run."""
    return int(os.environ.get("RANK", "0"))


def _own_file(process: int | str | None = None) -> str:
    """judge.jsonl of the first process, judge.1.jsonl of the second."""
    process = _process() if process is None else process
    stem, suffix = JUDGED_LINES.rsplit(".", 1)
    return JUDGED_LINES if process == 0 else f"{stem}{'' if process == '*' else '.'}{process}.{suffix}"
