"""An environment in which Python programs run, in the sandbox."""

import asyncio
import re

from conversations.errors import ToolkitError
from conversations.sandbox.box import Limits, require
from conversations.sandbox.checking import run_program

_FRAMES_OF_OURS = re.compile(r'^  File "[^"]*/(?:candidate|limits|wire)\.py".*\n(?:    .*\n)*', re.MULTILINE)
_DOTS = "\n... ({} characters left out) ...\n"


def shortened(text: str, longest: int) -> str:
    """The text, with its middle left out where it has more than `longest` characters."""
    if len(text) <= longest:
        return text
    start, end = longest - longest // 2, longest // 2
    return text[:start] + _DOTS.format(f"{len(text) - longest:,}") + text[len(text) - end :]


class PythonSandbox:
    """Runs programs, each by itself, as docs/sandbox.md describes.

    Args:
        seconds: wall-clock and CPU time of a program.
        memory: MiB of address space.
        characters: of output that the model gets to read.
        allow_unsandboxed: run programs without isolation, with a warning, where there is no sandbox.

    Raises:
        ToolkitError: a value is out of range, or this machine has no sandbox.
    """

    def __init__(
        self, seconds: float = 10.0, memory: int = 512, characters: int = 2000, allow_unsandboxed: bool = False
    ):
        for name, value, most in (
            ("seconds", seconds, 3600),
            ("memory", memory, 2**20),
            ("characters", characters, 2**20),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
                raise ToolkitError(f"PythonSandbox: {name} must be a number from 1 to {most:,}, not {value!r}")
        if not isinstance(allow_unsandboxed, bool):
            raise ToolkitError(f"PythonSandbox: allow_unsandboxed must be true or false, not {allow_unsandboxed!r}")
        require(allow_unsandboxed)
        self._limits = Limits(seconds=float(seconds), memory=int(memory))
        self._characters, self._isolated = int(characters), not allow_unsandboxed

    def reset(self, **row: object) -> None:
        """Each program starts anew: there is nothing to prepare."""

    async def run_python(self, code: str) -> str:
        """
        Run a Python program and return what it prints. Variables are not kept from one program to the next.

        Args:
            code: The program. Only the standard library is there.

        Returns:
            What it printed, and the error if there was one.
        """
        ran = await asyncio.to_thread(run_program, code, "", self._limits, isolated=self._isolated, with_errors=True)
        said = _FRAMES_OF_OURS.sub("", ran.output).strip()
        fault = ran.fault if ran.fault and "Traceback" not in said else None
        return "\n".join(filter(None, (shortened(said, self._characters), fault))) or "(it printed nothing)"
