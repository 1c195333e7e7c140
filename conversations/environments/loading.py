"""From the name of a class to the environment that its instances are: its tools, as definitions for a prompt."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from conversations.answers.own_function import loaded, located_error, place_of
from conversations.errors import ToolkitError
from conversations.formats.tools import tools_text
from conversations.row import Row

FORM = '"FILE.py:CLASS" or "MODULE:CLASS", such as conversations.environments:Calculator'
RESERVED = ("reset", "get_reward")  # methods that are not tools


def module_and_class(written: str) -> tuple[str, str]:
    """(file or module, name) of what a recipe names. Raises ToolkitError for anything else."""
    module, _, name = written.rpartition(":")
    is_module = all(part.isidentifier() for part in module.split("."))
    if not name.isidentifier() or not (module.endswith(".py") or is_module):
        raise ToolkitError(f"{written!r} does not name an environment: it must be {FORM}")
    return module, name


@dataclass(frozen=True)
class Environment:
    """A class of environments. Its instances are made once and reset for each answer.

    written: as the recipe names it. make: the class. settings: arguments of its constructor.
    """

    written: str
    make: Callable[..., Any]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.written.rpartition(":")[2]

    def instance(self) -> Any:
        """A new instance. Raises ToolkitError if its constructor does, naming the line."""
        try:
            return self.make(**self.settings)
        except ToolkitError:
            raise
        except (Exception, SystemExit) as error:
            raise ToolkitError(f"environment {self.written}: {self.located(error)}") from error

    @cached_property
    def tools(self) -> tuple[str, ...]:
        """The names of its tools: all public methods but those of the protocol."""
        methods = inspect.getmembers(self.make, inspect.isfunction)
        return tuple(name for name, _ in methods if not name.startswith("_") and name not in RESERVED)

    @cached_property
    def definitions(self) -> list[dict[str, Any]]:
        """The tools as JSON schemas, from their type hints and docstrings.

        Raises:
            ToolkitError: a type hint or a part of the docstring is missing.
        """
        from transformers.utils.chat_template_utils import get_json_schema

        found = []
        for name in self.tools:
            try:
                found.append(get_json_schema(getattr(self.make, name)))
            except Exception as error:  # of several types, and of no common one
                raise ToolkitError(
                    f"environment {self.written}: its tool {name} cannot be described: {_first_line(error)}. Give each "
                    'argument a type hint and a line in the docstring\'s "Args:"'
                ) from error
        return found

    def offered(self, messages: Sequence[Row]) -> list[Row]:
        """A prompt whose system message ends with the tools; one that has tools already is left as it is."""
        first, rest = (messages[0], messages[1:]) if messages[0]["role"] == "system" else (None, messages)
        said = first["content"] if first else ""
        if not self.tools or "<tools>" in said:
            return list(messages)
        text = "\n\n".join(part for part in (said, tools_text(self.definitions)) if part.strip())
        return [{"role": "system", "content": text}, *rest]

    @property
    def rewards(self) -> bool:
        """Whether it judges answers itself."""
        return callable(getattr(self.make, "get_reward", None))

    def located(self, error: BaseException) -> str:
        """An error of the environment, with the line of its file where it has one."""
        module, _ = module_and_class(self.written)
        if module.endswith(".py"):
            return located_error(place_of(self.written)[0], error)
        return f"{type(error).__name__}: {error}"[:500]


def load_environment(written: str, settings: Mapping[str, Any]) -> Environment:
    """The environment that a recipe names.

    Raises:
        ToolkitError: there is no such class, it has no `reset`, or a tool that cannot be described.
    """
    module, name = module_and_class(written)
    make = loaded(written) if module.endswith(".py") else _imported(written, module, name)
    if not inspect.isclass(make) or not callable(getattr(make, "reset", None)):
        raise ToolkitError(
            f"environment {written}: must be a class with a method reset(self, **row), which prepares it for an answer"
        )
    environment = Environment(written, make, dict(settings))
    if not environment.definitions and not environment.rewards:
        raise ToolkitError(f"environment {written}: has no public methods, which would be its tools, and no get_reward")
    return environment


def _imported(written: str, module: str, name: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ToolkitError(f"environment {written}: {error}; install it, or name a file: FILE.py:CLASS") from error
    if not hasattr(found, name):
        raise ToolkitError(f"environment {written}: {module} defines no {name}")
    return getattr(found, name)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
