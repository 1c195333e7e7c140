"""The command line: `dsv2 COMMAND ...`. Heavy modules are imported inside the command that needs them.

Exit codes: 0 success; 2 an error in the recipe, the data or the command (one message); 1 a bug in the toolkit; 130
interrupted, with a checkpoint if training had begun.
"""

import dsv2_start  # first: it checks that the packages imported below are our own

# isort: split
import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from conversations.errors import ToolkitError
from conversations.scratch import remove_abandoned, remove_scratch
from recipes.arguments import (
    chat_arguments,
    experts_arguments,
    export_arguments,
    import_arguments,
    init_arguments,
    merge_arguments,
    plan_arguments,
    recipe_arguments,
    recipes_arguments,
    report_arguments,
    serve_arguments,
)
from recipes.disk import disk_fault
from recipes.launch import launch, launch_arguments, starts_others, stopped_by_agent, tell_agent
from recipes.processes import is_main, rank
from recipes.secret_keys import without_secrets
from recipes.stages import stages
from recipes.terminal import safe_terminal

if TYPE_CHECKING:
    from recipes.recipe.loader import Loaded
    from recipes.recipe.schema import Recipe


@dataclass(frozen=True)
class Command:
    """A `dsv2` command: its usage line, its help, the function that declares its arguments, the function that runs it,
    whether it resumes after an interruption, and whether it can run on several processes."""

    usage: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    resumes: bool = False
    spreads: bool = False


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments as a ToolkitError, like every other user error."""

    def error(self, message: str) -> NoReturn:
        raise ToolkitError(f"{message}; see: {self.prog} --help")


# --- commands ----------------------------------------------------------------------------------------------------


def _load(arguments: argparse.Namespace) -> "Loaded[Recipe]":
    from recipes.recipe.loader import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides, smoke=arguments.smoke, use_cache=not arguments.no_cache)


def _init(arguments: argparse.Namespace) -> int:
    from recipes.runs.new_model import describe_model, make_model

    make_model(arguments.directory, arguments.preset, arguments.seed)
    print(describe_model(arguments.directory))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from recipes.check.check import check
    from recipes.check.page import page_path
    from recipes.lock import hold_path

    loaded = _load(arguments)
    with hold_path(page_path(Path(loaded.recipe.output_dir))):
        check(loaded)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from recipes.plan.plan import print_plan

    print_plan(arguments)
    return 0


def _stage(stage: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        from recipes.recipe.loader import of_stage

        loaded = of_stage(_load(arguments), [stage])
        from recipes.runs.stage import report_outcome, run_stage

        report_outcome(loaded.recipe, run_stage(loaded))
        return 0

    return run


def _chain(arguments: argparse.Namespace) -> int:
    from recipes.recipe.loader import of_chain

    loaded = of_chain(_load(arguments))
    from recipes.chains.chain import run_chain

    run_chain(loaded)
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from recipes.chat.session import chat

    return chat(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    from recipes.serving.server import serve

    return serve(arguments)


def _merge(arguments: argparse.Namespace) -> int:
    from recipes.commands.adapters import merge

    print(merge(arguments))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from recipes.commands.adapters import export

    print(export(arguments))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from recipes.commands.adapters import import_

    print(import_(arguments))
    return 0


def _experts(arguments: argparse.Namespace) -> int:
    from recipes.commands.experts import find_experts

    print(find_experts(arguments))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    if arguments.watch:
        from recipes.report.watch import watch

        watch(arguments)
        return 0
    if arguments.port is not None:
        raise ToolkitError("--port belongs to --watch")
    from recipes.report.report import write_report

    print(write_report(arguments.runs, arguments.output))
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from recipes.recipe.shipped import copy_recipe, headline, shipped_recipes

    if not arguments.copy:
        recipes = shipped_recipes()
        width = max(map(len, recipes))
        for name, path in recipes.items():
            print(f"{name:<{width}}  {headline(path)}")
        return 0
    if len(arguments.copy) != 3 or arguments.copy[0] != "copy":
        raise ToolkitError("usage: dsv2 recipes, or dsv2 recipes copy NAME FILE")
    _, name, target = arguments.copy
    copy_recipe(name, Path(target))
    print(f"written: {target}")
    return 0


_ON_RECIPE = "RECIPE [--smoke] [key.path=value ...]"


def commands() -> dict[str, Command]:
    """All commands by name, in the order of the help."""
    stage_commands = {
        stage.name: Command(
            _ON_RECIPE, stage.help, recipe_arguments, _stage(stage.name), stage.training is not None, True
        )
        for stage in stages().values()
    }
    return {
        "init": Command(
            "DIR --preset NAME", "create a seeded random model with tokenizer, in hub layout", init_arguments, _init
        ),
        "check": Command("RECIPE", "check a recipe and its data without loading weights", recipe_arguments, _check),
        "plan": Command(
            "RECIPE [--gpu-gb 80]", "say how much memory, and how many GPUs, a recipe needs", plan_arguments, _plan
        ),
        **stage_commands,
        "run": Command(
            _ON_RECIPE, "run a chain of stages; resumes if interrupted", recipe_arguments, _chain, True, True
        ),
        "chat": Command("MODEL_OR_RUN [--prompt TEXT]", "chat with a model", chat_arguments, _chat),
        "serve": Command(
            "MODEL_OR_RUN [--port 8000]", "serve a model with an OpenAI-compatible API", serve_arguments, _serve
        ),
        "merge": Command("ADAPTER_OR_RUN OUT_DIR", "merge an adapter into a plain checkpoint", merge_arguments, _merge),
        "export": Command(
            "ADAPTER_OR_RUN OUT_DIR --layout per_expert",
            "convert an adapter for vLLM and SGLang",
            export_arguments,
            _export,
        ),
        "import": Command(
            "ADAPTER OUT_DIR", "convert a per-expert or old adapter to PEFT's layout", import_arguments, _import
        ),
        "experts": Command(
            "RECIPE [key.path=value ...]",
            "find the experts that a data set uses, to train only those",
            experts_arguments,
            _experts,
        ),
        "recipes": Command("[copy NAME FILE]", "list the shipped recipes, or copy one", recipes_arguments, _recipes),
        "report": Command(
            "RUN [RUN ...] [--watch]", "write or serve one HTML page with plots and samples", report_arguments, _report
        ),
    }


def help_text() -> str:
    """The text of `dsv2 --help`."""
    usages = {f"{name} {command.usage}": command.help for name, command in commands().items()}
    width = max(map(len, usages))
    lines = [f"  dsv2 {usage:<{width}}  {text}" for usage, text in usages.items()]
    return "\n".join(
        [
            "dsv2: turn a DeepSeek-V2 base checkpoint into chat variants.",
            "",
            *lines,
            "",
            "Details: dsv2 COMMAND --help. On several GPUs: dsv2 COMMAND RECIPE --processes 8",
            "Exit codes: 0 success, 2 wrong recipe, data or command, 1 a bug in the toolkit, 130 interrupted.",
            "--traceback (or DSV2_TRACEBACK=1) shows where an error comes from.",
        ]
    )


def dispatch(argv: Sequence[str]) -> int:
    """Run a command.

    Raises:
        ToolkitError: an unknown command or wrong arguments.
    """
    if argv and argv[0] == "--traceback":
        argv = [*argv[1:], argv[0]]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("deepseek-v2-toolkit"))
        return 0
    name, all_commands = argv[0], commands()
    if name not in all_commands:
        near = get_close_matches(name, all_commands, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"commands: {', '.join(all_commands)}"
        raise ToolkitError(f'unknown command "{name}"; {hint}')
    command = all_commands[name]
    parser = _Parser(prog=f"dsv2 {name}", description=command.help, allow_abbrev=False)
    command.arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    if command.spreads:
        launch_arguments(parser)
    arguments = parser.parse_intermixed_args(list(argv[1:]))
    if command.spreads and starts_others(arguments):
        return launch(arguments, argv)
    return command.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    _prepare_process()
    argv = sys.argv[1:] if argv is None else argv
    with safe_terminal():
        try:
            if message := dsv2_start.in_the_way():
                raise ToolkitError(message)
            return dispatch(argv)
        except KeyboardInterrupt as interrupt:
            command = commands().get(argv[0] if argv else "")
            then = "the same command resumes from there" if command and command.resumes else "nothing was finished"
            if is_main() and not (stopped_by_agent() and not str(interrupt)):
                _complain(f"interrupted{f': {interrupt}' if str(interrupt) else ''}; {then}")
            return 130
        except BrokenPipeError:  # the program reading our output has exited
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            return _failed(error, argv)
        finally:
            remove_scratch()


def _failed(error: Exception, argv: Sequence[str]) -> int:
    """Report an error and return the exit code. A bug in the toolkit is shown with its traceback."""
    closed = getattr(error, "closed", None)  # of LostContact
    if closed is not None and stopped_by_agent():
        tell_agent(str(error), closed)
        return 1
    message = str(error) if _is_for_the_user(error) else disk_fault(error)
    if message is None or "--traceback" in argv or os.environ.get("DSV2_TRACEBACK", "0") not in ("", "0"):
        _complain("".join(traceback.format_exception(error)).rstrip())
    if message is None:
        return 1
    _complain(f"error: {message}")
    return 2


def _is_for_the_user(error: Exception) -> bool:
    """Whether it is a ToolkitError or a ModelError; the latter's module is only imported once torch is."""
    model_errors = sys.modules.get("deepseek_v2_modeling.errors")
    return isinstance(error, ToolkitError) or (model_errors is not None and isinstance(error, model_errors.ModelError))


def _complain(message: str) -> None:
    """Print from every process, since an error may occur in only one; all but the first prefix their rank."""
    prefix = "" if is_main() else f"rank {rank()}: "
    print(f"{prefix}{without_secrets(message)}", file=sys.stderr, flush=True)


def _prepare_process() -> None:
    """Handle SIGTERM like Ctrl-C, restore SIGINT (a shell ignores it for background jobs in a script), silence the
    fork warning of tokenizers and, on CPUs with bf16 products, bitsandbytes' about missing kernels that are not used
    here (PEFT imports it), and remove temporary files left by killed processes."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    remove_abandoned()


if __name__ == "__main__":
    sys.exit(main())
