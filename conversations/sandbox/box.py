"""The only place that runs model-written code: in a process with nothing but Python, an empty temporary folder and
limits. bubblewrap creates the namespaces (docs/sandbox.md says why this one).
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.sandbox.seccomp import program

GUEST = Path(__file__).parent / "guest"
INSIDE = "/guest"  # that folder's path in a sandbox
MIB = 1 << 20

UNSANDBOXED = (
    "WARNING: allow_unsandboxed is true: model-written code runs on this machine with your permissions and can read "
    "and write whatever you can."
)


@dataclass(frozen=True)
class Limits:
    """Limits of one process. seconds: wall-clock and CPU time. In MiB: memory, of address space (which also limits
    threads); files, of the temporary folder and of each file; output, of what is read from a program."""

    seconds: float = 10.0
    memory: int = 512
    files: int = 16
    output: int = 1

    @property
    def words(self) -> list[str]:
        """The limits as command-line arguments for the scripts of `guest/`."""
        return [str(number) for number in (int(self.seconds) + 1, self.memory * MIB, self.files * MIB)]


def why_unavailable() -> str | None:
    """Why code cannot be isolated on this machine, with the remedy; None if it can."""
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, and this is {platform.system()}"
    if program() is None:
        return f"it supports x86_64 and aarch64, and this machine is {platform.machine()}"
    if shutil.which("bwrap") is None:
        return "it needs bubblewrap: install it (Debian, Ubuntu and Fedora: the package bubblewrap)"
    return _failed_trial()


def require(allow_unsandboxed: bool = False) -> None:
    """Raises ToolkitError if code cannot be isolated on this machine; prints a warning if the recipe allows that."""
    if allow_unsandboxed:
        _print_once(UNSANDBOXED)
    elif why := why_unavailable():
        raise ToolkitError(
            f"model-written code runs in a sandbox, which is not available on this machine: {why}. "
            "allow_unsandboxed: true runs the code without any protection"
        )


@cache
def _print_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@cache
def _failed_trial() -> str | None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        with _started(["-c", "print('ready')"], 1, isolated=True, **pipes) as process:
            out, err = process.communicate(timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not start: {error}"
    if out == b"ready\n":
        return None
    error_lines = err.decode(errors="replace").strip().splitlines()
    why = error_lines[-1] if error_lines else f"exit code {process.returncode}"
    return (
        f"bubblewrap cannot isolate processes on this machine ({why}): the system must allow user namespaces "
        "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0); in a container, its "
        "runtime must allow them"
    )


@contextmanager
def guest(
    script: str,
    arguments: Sequence[Any],
    limits: Limits,
    isolated: bool,
    fds: Sequence[int],
    shows: Sequence[str] = (),
    **pipes: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a script of `guest/` in its own sandbox; at the end of the block, it and everything it started are killed.

    fds: file descriptors of this process that it inherits. shows: folders and programs that it may read and run, beside
    which it then has /proc and /dev of its own. pipes: stdin, stdout and stderr as for Popen; by default all are closed
    off. isolated: False runs it with the limits only.
    """
    folder = INSIDE if isolated else str(GUEST)
    words = [f"{folder}/{script}", *limits.words, *map(str, arguments)]
    with _started(words, limits.files, isolated=isolated, fds=fds, shows=shows, **pipes) as process:
        yield process


@contextmanager
def _started(
    arguments: Sequence[str],
    files: int,
    *,
    isolated: bool,
    fds: Sequence[int] = (),
    shows: Sequence[str] = (),
    **pipes: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **pipes}
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", *arguments]
    with ExitStack() as stack:
        if isolated:
            filtered = stack.enter_context(tempfile.TemporaryFile())
            filtered.write(program() or b"")
            filtered.seek(0)
            fds = [*fds, filtered.fileno()]
            command = [*isolation(files, tuple(shows)), "--seccomp", str(filtered.fileno()), *python]
            folder = "/"
        else:
            command, folder = python, stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv2-code-"))
        process = subprocess.Popen[bytes](
            command,
            pass_fds=fds,
            cwd=folder,
            env={},
            start_new_session=True,
            **pipes,
        )
        try:
            yield process
        finally:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill bubblewrap, and with it everything in its namespace; without bubblewrap, the process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def isolation(files: int, shows: tuple[str, ...] = ()) -> list[str]:
    """The bubblewrap command: no network, no other processes, no capabilities, an empty environment; the only files are
    Python's standard library and the libraries it links to, read-only, an empty folder, and what `guest` shows."""
    standard, python = sysconfig.get_path("stdlib"), os.path.realpath(sys.executable)
    packages = f"{standard}/site-packages"
    # By its full path: sandboxes start in another folder, with an environment that has no PATH.
    bubblewrap = os.path.abspath(shutil.which("bwrap") or "bwrap")
    words = [bubblewrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    words += ["--hostname", "sandbox", "--size", str(files * MIB), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    words += ["--ro-bind", standard, standard, "--tmpfs", packages, "--remount-ro", packages]
    words += ["--ro-bind", str(GUEST), INSIDE]
    programs = tuple(path for path in shows if os.path.isfile(path))
    for path in (python, *_linked(python, standard), *_libraries(programs), *shows):
        words += ["--ro-bind", path, path]
    if shows:
        words += ["--proc", "/proc", "--dev", "/dev"]
    return [*words, "--remount-ro", "/"]


@cache
def _linked(python: str, standard: str) -> tuple[str, ...]:
    """The shared libraries of the interpreter and its modules, except those of tkinter."""
    modules = [str(path) for path in (Path(standard) / "lib-dynload").glob("*.so") if "tkinter" not in path.name]
    return _libraries((python, *modules))


@cache
def _libraries(programs: tuple[str, ...]) -> tuple[str, ...]:
    """The shared libraries that programs link to; none of a script."""
    if not programs:
        return ()
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    paths = (line.split("=>")[-1].split("(")[0].strip() for line in listed.splitlines() if "(0x" in line)
    return tuple(sorted({path for path in paths if path.startswith("/")}))
