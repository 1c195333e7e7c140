"""Runs an installed program on model-written text, in a sandbox that shows it the folders that it needs."""

import subprocess
from collections.abc import Mapping, Sequence
from tempfile import TemporaryFile

from conversations.sandbox.box import MIB, Limits, guest
from conversations.sandbox.checking import Ran

CORES = 16  # a program with so many busy threads still gets all its seconds of CPU time


def run_tool(
    command: Sequence[str],
    stdin: str,
    limits: Limits,
    *,
    shows: Sequence[str],
    environment: Mapping[str, str],
    isolated: bool = True,
) -> Ran:
    """Run a command once.

    Args:
        command: its words; the first is the absolute path of a program in one of the folders.
        limits: seconds of wall-clock time.
        shows: folders that it may read.
    """
    words = [*(f"{name}={value}" for name, value in environment.items()), "--", *command]
    cpu = Limits(limits.seconds * CORES, limits.memory, limits.files, limits.output)
    with TemporaryFile() as stdin_file, TemporaryFile() as output:
        stdin_file.write(stdin.encode())
        stdin_file.seek(0)
        pipes = {"stdin": stdin_file, "stdout": output, "stderr": subprocess.STDOUT}
        with guest("tool.py", words, cpu, isolated, [], shows=[*shows, command[0]], **pipes) as run:
            fault = None
            try:
                if code := run.wait(limits.seconds):
                    fault = f"it ended with exit code {code}"
            except subprocess.TimeoutExpired:
                fault = f"not done after {limits.seconds:g} s"
        output.seek(0)
        return Ran(output.read(limits.output * MIB).decode(errors="replace"), fault)
