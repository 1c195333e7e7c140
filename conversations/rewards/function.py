"""A user-defined function as a reward."""

import math
from collections.abc import Sequence
from functools import partial

from conversations.answers.own_function import call, check_loaded, place_of
from conversations.answers.prompts import prompt_text
from conversations.answers.workers import TooLong, Workers
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer, OnError, Reward, Values

REMEMBERED = 100_000  # values to cache
Key = tuple[str, str, str | None, bool, int | None]


class FunctionReward(Reward):
    """A user's function, run in separate worker processes, so that it cannot affect the run and a call that hangs can
    be killed. It is called once per distinct answer to a prompt.

    Args:
        written: "FILE.py:FUNCTION".
        timeout: seconds per call.
        workers: number of processes.

    Raises:
        ToolkitError: `written` does not name a function in a file.
    """

    gives_reasons = True  # of answers for which the function failed

    def __init__(
        self,
        written: str,
        weight: float = 1.0,
        on_error: OnError = "error",
        *,
        timeout: float = 10.0,
        workers: int = 1,
    ):
        super().__init__(place_of(written)[1], weight, on_error)
        self.written, self.timeout, self.count = written, timeout, workers
        self.workers = Workers(workers)
        self.values: dict[Key, float | None] = {}

    def judge(self, answers: Sequence[Answer]) -> Values:
        new = {self._key(answer): answer for answer in answers if self._key(answer) not in self.values}
        calls = [
            {"prompt": a.prompt, "completion": a.text}
            | {name: getattr(a, name) for name in ("reference", "finished", "tokens")}
            for a in new.values()
        ]
        size = max(1, math.ceil(len(calls) / self.count))
        results = self.workers.map(partial(call, self.written), calls, size, self.timeout)
        result_of = dict(zip(new, results, strict=True))
        failed = {key: error for key, error in result_of.items() if isinstance(error, Exception)}
        if failed and self.on_error == "error":
            error = next(iter(failed.values()))
            raise ToolkitError(self._message_of(error)) from error
        why = {key: self._message_of(error) for key, error in failed.items()}
        self.reasons = [why.get(self._key(answer)) for answer in answers]
        self.values |= {key: value for key, value in result_of.items() if key not in failed}
        if len(self.values) > REMEMBERED:
            self.values = {key: self.values[key] for key in map(self._key, answers) if key in self.values}
        return [math.nan if (key := self._key(a)) in failed else self.values[key] for a in answers]

    def check(self, answer: Answer) -> None:
        """Call the function once, then end its processes.

        Raises:
            ToolkitError: the file cannot be read or run, or lacks the function; or, with on_error "error", the call
                failed.
        """
        try:
            (function,) = self.workers.map(check_loaded, [self.written], 1, self.timeout)
            if isinstance(function, Exception):
                raise ToolkitError(self._message_of(function)) from function
            if self.on_error == "error":
                self.judge([answer])
        finally:
            self.close()

    def close(self) -> None:
        """End the worker processes."""
        self.workers.close()

    def _message_of(self, error: Exception) -> str:
        if isinstance(error, TooLong):
            return f"{self.written} took longer than timeout = {self.timeout:g} s for one answer"
        return str(error) if isinstance(error, ToolkitError) else f"{self.written}: its process ended ({error})"

    def _key(self, answer: Answer) -> Key:
        return prompt_text(answer.prompt), answer.text, answer.reference, answer.finished, answer.tokens
