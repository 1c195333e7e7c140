"""The `environment` section of a recipe. Imports no torch."""

from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import Field, field_validator

from conversations.answers.prompts import prompt_of
from conversations.environments.loading import Environment, load_environment, module_and_class
from conversations.row import Message, Row
from conversations.sections import Section


class EnvironmentSection(Section):
    """What a model acts in by calling tools while it answers."""

    python: str = Field(
        description='The environment\'s class, "FILE.py:CLASS" or "MODULE:CLASS", with the protocol of TRL\'s '
        "environment_factory; conversations.environments has Calculator and PythonSandbox.",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of its constructor.")

    @field_validator("python")
    @classmethod
    def _names_a_class(cls, python: str) -> str:
        module_and_class(python)
        return python

    def load(self) -> Environment:
        """Raises ToolkitError if there is no such environment."""
        return load_environment(self.python, self.settings)

    def prompts(self) -> Callable[[Row, int], list[Message]]:
        """A function from a row and its number to its prompt with the tools, without what `reset` adds."""
        load = cache(self.load)
        return lambda row, number: load().offered(prompt_of(row, number))
