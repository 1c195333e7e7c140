"""A language model behind an endpoint as a reward: it scores answers by a rubric, or compares them with the reference.

Every request and verdict is stored in the run directory; a resumed run repeats no request.
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
    """A verdict and its reason. value: from 0 to 1, NaN if the judge gave none, None if there is nothing to judge."""

    value: float | None
    reason: str


class JudgeReward(Reward):
    """A judge's score from 0 to 1: (points - lowest) / (highest - lowest) on the scale. With `pairwise`, the answer is
    compared with the reference in both orders: 1 if it is better in both, 0 if it is worse in both, otherwise the mean.

    Args:
        scale: the lowest and the highest points.
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
        self.verdicts = {line["key"]: line for line in kept if line["value"] is not None}
        mine = [line for line in kept if line["process"] == _process()]
        self.endpoint = Endpoint(endpoint, sum(line["requests"] for line in mine))
        self.compared = self.agreed = 0

    def summary(self) -> str:
        """The number of requests so far and, if pairwise, how often both orders agreed."""
        requests = f"{self.endpoint.spent:,} requests to {self.settings.model}"
        if not self.compared:
            return requests
        return f"{requests}; both orders agree on {self.agreed:,} of {self.compared:,} comparisons"

    def judge(self, answers: Sequence[Answer]) -> Values:
        """Each distinct answer to a prompt is judged once."""
        keys = [self._key(answer) for answer in answers]
        distinct = dict(zip(keys, answers, strict=True))
        verdicts: dict[str, Judged] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            key_of = {pool.submit(self._judged, answer): key for key, answer in distinct.items()}
            for future in as_completed(key_of):
                verdict = verdicts[key_of[future]] = future.result()
                if self.on_error == "error" and verdict.value is not None and math.isnan(verdict.value):
                    pool.shutdown(cancel_futures=True)  # the run ends here: make no further paid requests
                    raise ToolkitError(verdict.reason)
        self.reasons = [verdicts[key].reason for key in keys]
        return [verdicts[key].value for key in keys]

    def _judged(self, answer: Answer) -> Judged:
        if self.pairwise and answer.reference is None:
            return Judged(None, "no reference to compare with")
        prompt = prompt_text(answer.prompt)
        try:
            if self.pairwise:
                return self._compared(prompt, answer.text, answer.reference or "")
            value, reply = self._verdict(
                self._key(answer),
                lambda: point_messages(self.rubric, self.scale, prompt, answer.text),
                lambda reply: read_points(reply, self.scale),
            )
        except NoReply as error:
            return Judged(math.nan, str(error.args[0]))
        return Judged(value, shown(reply, 300))

    def _compared(self, prompt: str, answer: str, reference: str) -> Judged:
        """Compare in both orders, because judges tend to prefer a position; the value is the mean of the two."""
        values = []
        for order, texts in (("AB", (answer, reference)), ("BA", (reference, answer))):
            value, _ = self._verdict(
                self._hash([order, prompt, answer, reference]),
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

    def _verdict(self, key: str, messages: Callable[[], Messages], read: Callable[[str], float]) -> tuple[float, str]:
        """(value, reply) from the stored verdicts, or else from the endpoint, whose verdict is then stored."""
        stored = self.verdicts.get(key)
        if stored:
            return stored["value"], stored["reply"]
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
            self._store({**line, "value": None, "error": error.args[0], "requests": error.args[1]})
            raise
        self._store({**line, "value": value, "reply": reply, "requests": requests})
        return value, reply

    def _store(self, line: dict[str, Any]) -> None:
        with self.lock:
            if line["value"] is not None:
                self.verdicts[line["key"]] = line
            if self.file is not None:
                append_lines(self.file, [line])

    def _key(self, answer: Answer) -> str:
        return self._hash([prompt_text(answer.prompt), answer.text, answer.reference if self.pairwise else None])

    def _hash(self, texts: Sequence[str | None]) -> str:
        """A hash of everything that a verdict depends on: the judge's settings and these texts."""
        settings = self.settings
        judge = [settings.base_url, settings.model, settings.parameters, self.rubric, self.scale, self.pairwise]
        return hashlib.sha256(json.dumps([*judge, *texts], sort_keys=True).encode()).hexdigest()


def _process() -> int:
    """The rank of this process in the run."""
    return int(os.environ.get("RANK", "0"))


def _own_file(process: int | str | None = None) -> str:
    """The file of a process: judge.jsonl for the first, judge.1.jsonl for the second; "*" gives a glob for all."""
    process = _process() if process is None else process
    stem, suffix = JUDGED_LINES.rsplit(".", 1)
    return JUDGED_LINES if process == 0 else f"{stem}{'' if process == '*' else '.'}{process}.{suffix}"
