"""A task of lm-eval in a recipe. Imports no torch."""

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from conversations.sections import Section

NEXT_TURN = "\n\nUser:"  # how the chat template continues after an answer


def decoding_name(temperature: float) -> str:
    """The name of a temperature in the results: greedy, t1, t0.7."""
    return "greedy" if temperature == 0 else f"t{temperature:g}"


class BenchmarkTask(Section):
    """A task of lm-eval: one of this toolkit's task files on local rows, one of its registry, or a file in its
    format."""

    task: str = Field(
        min_length=1,
        description="A task file of this toolkit (gsm8k_local, ...: docs/evaluation.md), a name of lm-eval's registry, "
        "or a .yaml file in lm-eval's format.",
    )
    name: str = Field(
        default="", pattern=r"^([a-z][a-z0-9_]*)?$", description="Name of the task in the results; by default `task`."
    )
    path: str | None = Field(
        default=None, min_length=1, description="With a task file: the rows, in any file that `data` reads."
    )
    fewshot_path: str | None = Field(
        default=None, min_length=1, description="With a task file: rows for the examples in the prompt."
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, le=100, description="Examples in the prompt; null for as many as the task has."
    )
    limit: int | None = Field(
        default=None, ge=1, le=10**9, description="Use only this many rows, the first ones; null uses all."
    )
    temperature: float | None = Field(
        default=None, ge=0, le=10, description="Sampling temperature, 0 is greedy; null is the task's own."
    )
    num_answers: int = Field(default=1, ge=1, le=1024, description="Answers to each row: avg@n, pass@k and cons@n.")
    pass_at: list[Annotated[int, Field(ge=1, le=1024)]] = Field(
        default_factory=list, description="The k of pass@k; by default 1, 2, 4, ... and num_answers."
    )
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Maximum length of an answer, in tokens; null is the task's own."
    )
    batch_size: int = Field(default=32, ge=1, description="Number of answers generated side by side.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Strings before which an answer ends, besides the task's own."
    )
    too_long: Literal["refuse", "cut"] = Field(
        default="refuse",
        description="A prompt that, with its answer, exceeds the model's positions: it is refused before anything is "
        "measured, or cut from the left.",
    )

    against: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Files of training data: rows of the task that share 13 consecutive words with them are counted, "
        "and the figure is also given without them.",
    )

    @property
    def generation(self) -> dict[str, Any]:
        """The fields of lm-eval's generation_kwargs that count instead of the task's."""
        fields: dict[str, Any] = {}
        if self.temperature is not None:
            fields |= {"temperature": self.temperature, "do_sample": self.temperature > 0}
        if self.max_new_tokens is not None:
            fields["max_gen_toks"] = self.max_new_tokens
        return fields

    def files(self) -> dict[str, str]:
        """The files that it reads, by key."""
        named = {"path": self.path, "fewshot_path": self.fewshot_path}
        named |= {f"against.{place}": path for place, path in enumerate(self.against)}
        return {key: path for key, path in named.items() if path is not None}

    @property
    def values(self) -> list[str]:
        """The names that the measured value may have; which, the task's file says."""
        return ["value", "greedy"] if self.temperature is None else ["value", decoding_name(self.temperature)]

    @model_validator(mode="after")
    def _named_after_its_task(self) -> "BenchmarkTask":
        if not self.name:
            stem = PurePath(self.task).stem if self.task.endswith(".yaml") else self.task
            self.name = re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_")
            if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
                raise ValueError(f"give it a name: the task {self.task!r} makes none")
        return self

    @model_validator(mode="after")
    def _several_answers_differ(self) -> "BenchmarkTask":
        if self.num_answers > 1 and not self.temperature:
            raise ValueError("num_answers needs a temperature above 0: greedy answers to a prompt are all the same")
        if self.num_answers == 1 and self.pass_at:
            raise ValueError("pass_at needs num_answers, the number of answers to each row")
        if too_many := [k for k in self.pass_at if k > self.num_answers]:
            raise ValueError(f"pass_at: {too_many[0]} is more than num_answers, {self.num_answers}")
        return self
