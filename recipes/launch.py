"""Starts several processes of a command, with torchrun's own agent and our program by its path.

A file in the working directory can thus not be imported in the place of ours, and the processes of one launch end
together: if one ends, the agent stops the others.
"""

import argparse
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dsv2_start

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

from conversations.errors import ToolkitError

OPTIONS = ("--processes", "--nodes", "--rendezvous")
LAUNCHED = "DSV2_LAUNCHED"  # set in the processes that were started here
RESUMES = "the same command resumes from the newest checkpoint"
INTERRUPTED = 130  # an exit code
SECONDS_TO_STOP = 20  # for the others after one process has ended


def launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of commands that run on several processes."""
    parser.add_argument("--processes", type=int, metavar="N", help="run on N processes of this machine, one a GPU")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines; start the command on each (1)")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="with --nodes: where the machines meet, one of them")


def starts_others(arguments: argparse.Namespace) -> bool:
    """Whether the command has to be started on several processes.

    Raises:
        ToolkitError: numbers that make no launch, or a launch inside of torchrun or accelerate launch.
    """
    if arguments.processes is None:
        if arguments.nodes != 1 or arguments.rendezvous:
            raise ToolkitError("--nodes and --rendezvous need --processes N, the processes of each machine")
        return False
    for option, value in (("--processes", arguments.processes), ("--nodes", arguments.nodes)):
        if not 1 <= value <= 4096:
            raise ToolkitError(f"{option} is {value}; it must be at least 1 and at most 4096")
    if "RANK" in os.environ:
        raise ToolkitError("--processes starts processes itself; leave it out under torchrun or accelerate launch")
    if (arguments.nodes > 1) != bool(arguments.rendezvous):
        raise ToolkitError("--nodes and --rendezvous belong together: --nodes 2 --rendezvous HOST:PORT on each machine")
    return arguments.processes * arguments.nodes > 1


def launch(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run the command of these words on several processes; returns the exit code.

    The first process that ends with an error decides: its own message has been printed, and the others are stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    _keep_quiet()
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.processes)))
    program = [str(dsv2_start.HOME / "dsv2_start.py"), *without_options(argv)]
    try:
        elastic_launch(_config(arguments), sys.executable)(*program)
    except ChildFailedError as error:
        return exit_code_of(error)
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    finally:
        del os.environ[LAUNCHED]
    return 0


def stopped_by_agent() -> bool:
    """Whether this process was started by `launch`, which says itself why a launch ended."""
    return LAUNCHED in os.environ


def tell_agent(message: str, closed: bool) -> None:
    """Leave word of another process that has ended (closed) or does not answer: many processes notice it, and the agent
    says it once."""
    data = {"message": message, "timestamp": int(time.time()), "closed": closed}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(data), encoding="utf-8")


def without_options(argv: Sequence[str]) -> list[str]:
    """The command's words without those that describe the launch."""
    words, skips = [], False
    for word in argv:
        if skips:
            skips = False
        elif word in OPTIONS:
            skips = True
        elif not word.startswith(tuple(f"{option}=" for option in OPTIONS)):
            words.append(word)
    return words


def _config(arguments: argparse.Namespace) -> "LaunchConfig":
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    meeting = arguments.rendezvous
    return LaunchConfig(
        min_nodes=arguments.nodes,
        max_nodes=arguments.nodes,
        nproc_per_node=arguments.processes,
        run_id=meeting.rpartition(":")[2] if meeting else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=meeting or "localhost:0",
        local_addr=None if meeting else "localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=SECONDS_TO_STOP,
    )


def exit_code_of(error: "ChildFailedError") -> int:
    """The exit code of the process that failed first; says what ended it if it could not say so itself."""
    failures = error.failures
    noticed = [failure.error_file_data for failure in failures.values() if "closed" in failure.error_file_data]
    codes = {rank: f.exitcode for rank, f in failures.items() if "closed" not in f.error_file_data}
    own = [code for code in codes.values() if code > 0 and code != INTERRUPTED]  # of those that have said why
    late = [data["message"] for data in noticed if not data["closed"]]
    killed = next((rank for rank, code in codes.items() if code < 0), None)
    if own:
        return max(own)
    if late:
        message = late[0]
    elif killed is not None:
        name = signal.Signals(-codes[killed]).name
        message = f"process {killed} was killed ({name}), and the others were stopped; {RESUMES}"
    elif noticed:  # it was a process of another machine
        message = noticed[0]["message"]
    else:
        return INTERRUPTED
    print(f"error: {message}", file=sys.stderr)
    return 1


def _keep_quiet() -> None:
    """Turn off the agent's own log: a process that fails says itself why."""
    import logging

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
