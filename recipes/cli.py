"""The command line: `dsv2 COMMAND ...`. Heavy modules are imported inside the command that needs them.

Exit codes: 0 success; 2 an error in the recipe, the data or the command (one message); 1 a bug in the toolkit; 130
interrupted, with a checkpoint if training had begun.
"""

import dsv2_start  # first: it checks that the packages imported below are our own

# isort: split
import argparse
import logging
import os
import re
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
from recipes.disk import disk_fault
from recipes.launch import launch, launch_arguments, starts_others, stopped_by_agent
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


# --- arguments ---------------------------------------------------------------------------------------------------


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, or a name that `dsv2 recipes` lists")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="values to replace, as YAML")
    parser.add_argument("--smoke", action="store_true", help="run at toy size: 2 steps, batch 1")
    parser.add_argument("--no-cache", action="store_true", help="do not use the cache of prepared rows")


def _load(arguments: argparse.Namespace) -> "Loaded[Recipe]":
    from recipes.recipe.loader import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides, smoke=arguments.smoke, use_cache=not arguments.no_cache)


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory for the model; new or empty")
    presets = "tiny, v2-lite-mini, v2-lite-heads, v2-mini, deepseek-moe-mini, v3-mini, glm4-moe-lite-mini or youtu-mini"
    parser.add_argument("--preset", required=True, help=presets)
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (0)")


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL_OR_RUN", help="a model directory, a run, or a hub name")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="show the answers of two models side by side")
    parser.add_argument("--prompt", help="answer this prompt and exit; without it, start a conversation")
    parser.add_argument("--system", help="the system message")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="maximum length of an answer in tokens (512)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0 is greedy (0)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="dtype of the model (float32)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (0)")


def _adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER_OR_RUN", help="an adapter directory, or a run with one in final/")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="directory to write; new or empty")


def _license(text: str) -> str:
    """A licence as the hub names it; raises what argparse expects for another text."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a licence as the hub names them, such as apache-2.0 or other"
        )
    return text


def _size(text: str) -> int:
    """A number of bytes, such as 5GB or 500MiB; raises what argparse expects for another text."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 5GB or 500MiB")
    return size


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="a model directory, a run, or a hub name")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (8000)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1)")
    parser.add_argument("--key", action="store_true", help="require the API key that is in DSV2_API_KEY")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="dtype of the model (float32)"
    )


def _card_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--license", type=_license, metavar="NAME", help="licence for the model card, as the hub names it (none)"
    )


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    _adapter_arguments(parser)
    _card_arguments(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of all weights; by default, the base's"
    )
    parser.add_argument(
        "--shard-size",
        type=_size,
        metavar="SIZE",
        help="largest weight file, such as 5GB; by default, the base's files",
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _adapter_arguments(parser)
    _card_arguments(parser)
    parser.add_argument(
        "--layout", default="per_expert", help="layout to write: per_expert, which vLLM and SGLang read (per_expert)"
    )


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    _adapter_arguments(parser)
    parser.add_argument("--base", metavar="MODEL", help="base model, if not the one that the adapter's config names")


def _experts_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument(
        "--score",
        choices=("gate", "token"),
        default="gate",
        help="score experts by gate weights or by token counts (gate)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="share of the scores that the chosen experts must reach (0.1; with token 0.2)",
    )
    parser.add_argument(
        "--tokens", type=int, default=131072, metavar="N", help="score rows with about N tokens in total (131072)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="file to write (the recipe's experts_file, or one next to output_dir)",
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--gpu-gb", type=float, default=80.0, metavar="GB", help="memory of a GPU in 10^9 bytes (80)")
    parser.add_argument(
        "--gpu-tflops", type=float, default=989.0, metavar="N", help="its peak in bf16, in TFLOP/s (989: H100)"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.3, metavar="P", help="share of the peak that training uses (0.3)"
    )


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "copy", nargs="*", metavar="copy NAME FILE", help="copy a shipped recipe to FILE, for you to edit"
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories of stages or chains")
    parser.add_argument("--output", type=Path, help="HTML file to write (report.html in the first run)")
    parser.add_argument(
        "--watch", action="store_true", help="serve the page on 127.0.0.1 and renew it while runs go on"
    )
    parser.add_argument("--port", type=int, help="port of --watch; 0 takes a free one (8001)")


# --- commands ----------------------------------------------------------------------------------------------------


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
            _ON_RECIPE, stage.help, _recipe_arguments, _stage(stage.name), stage.training is not None, True
        )
        for stage in stages().values()
    }
    return {
        "init": Command(
            "DIR --preset NAME", "create a seeded random model with tokenizer, in hub layout", _init_arguments, _init
        ),
        "check": Command("RECIPE", "check a recipe and its data without loading weights", _recipe_arguments, _check),
        "plan": Command(
            "RECIPE [--gpu-gb 80]", "say how much memory, and how many GPUs, a recipe needs", _plan_arguments, _plan
        ),
        **stage_commands,
        "run": Command(
            _ON_RECIPE, "run a chain of stages; resumes if interrupted", _recipe_arguments, _chain, True, True
        ),
        "chat": Command("MODEL_OR_RUN [--prompt TEXT]", "chat with a model", _chat_arguments, _chat),
        "serve": Command(
            "MODEL_OR_RUN [--port 8000]", "serve a model with an OpenAI-compatible API", _serve_arguments, _serve
        ),
        "merge": Command(
            "ADAPTER_OR_RUN OUT_DIR", "merge an adapter into a plain checkpoint", _merge_arguments, _merge
        ),
        "export": Command(
            "ADAPTER_OR_RUN OUT_DIR --layout per_expert",
            "convert an adapter for vLLM and SGLang",
            _export_arguments,
            _export,
        ),
        "import": Command(
            "ADAPTER OUT_DIR", "convert a per-expert or old adapter to PEFT's layout", _import_arguments, _import
        ),
        "experts": Command(
            "RECIPE [key.path=value ...]",
            "find the experts that a data set uses, to train only those",
            _experts_arguments,
            _experts,
        ),
        "recipes": Command("[copy NAME FILE]", "list the shipped recipes, or copy one", _recipes_arguments, _recipes),
        "report": Command(
            "RUN [RUN ...] [--watch]", "write or serve one HTML page with plots and samples", _report_arguments, _report
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
    if stopped_by_agent() and getattr(error, "closed", False):
        return 1  # the agent says which process has ended
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
