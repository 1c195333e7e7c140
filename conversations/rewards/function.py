"""A user-defined function as a reward."""

import math
from collections.abc import Sequence
from functools import partial

from conversations.answers.own_function import call, check_loaded, place_of
from conversations.answers.prompts import prompt_text
from conversations.answers.workers import TooLong, Workers
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer, OnError, Reward, Values

REMEMBERED = 100_000  # values
Key = tuple[str, str, str | None, bool, int | None]


class FunctionReward(Reward):
    """A function of the user's, in processes of its own: what it does to its process touches no other, and a call that
    hangs is ended. It is asked once for each answer to a prompt.

    Raises:
        ToolkitError: no such file or function.
    """

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
        self.known: dict[Key, float | None] = {}

    def judge(self, answers: Sequence[Answer]) -> Values:
        new = {self._key(answer): answer for answer in answers if self._key(answer) not in self.known}
        asked = [
            {"prompt": a.prompt, "completion": a.text}
            | {column: getattr(a, column) for column in ("reference", "finished", "tokens")}
            for a in new.values()
        ]
        size = max(1, math.ceil(len(asked) / self.count))
        found = dict(zip(new, self.workers.map(partial(call, self.written), asked, size, self.timeout), strict=True))
        failed = {key: error for key, error in found.items() if isinstance(error, Exception)}
        if failed and self.on_error == "error":
            error = next(iter(failed.values()))
            raise ToolkitError(self._told(error)) from error
        self.known |= {key: value for key, value in found.items() if key not in failed}
        if len(self.known) > REMEMBERED:
            self.known = {key: self.known[key] for key in map(self._key, answers) if key in self.known}
        return [math.nan if (key := self._key(a)) in failed else self.known[key] for a in answers]

    def check(self, answer: Answer) -> None:
        """Calls the function once, and ends its processes.

        Raises:
            ToolkitError: the file cannot be read or run, or has no such function; or, with on_error "error", the call
                failed.
        """
        try:
            (function,) = self.workers.map(check_loaded, [self.written], 1, self.timeout)
            if isinstance(function, Exception):
                raise ToolkitError(self._told(function)) from function
            if self.on_error == "error":
                self.judge([answer])
        finally:
            self.close()

    def close(self) -> None:
        """End its processes."""
        self.workers.close()

    def _told(self, error: Exception) -> str:
        if isinstance(error, TooLong):
            return f"{self.written} took longer than timeout = {self.timeout:g} s for one answer"
        return str(error) if isinstance(error, ToolkitError) else f"{self.written}: its process ended ({error})"

    def _key(self, answer: Answer) -> Key:
        return prompt_text(answer.prompt), answer.text, answer.reference, answer.finished, answer.tokens
