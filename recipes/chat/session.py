"""`dsv2 chat`: one prompt, or a conversation with commands."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversations.errors import ToolkitError
from conversations.tally import counted
from recipes.chat.lines import reader
from recipes.terminal import is_unicode

if TYPE_CHECKING:
    from recipes.chat.partner import Answer, Partner

NEARLY_FULL = 0.8  # share of the context from which its use is reported


def chat(arguments: argparse.Namespace) -> int:
    """Answer one prompt, or hold a conversation.

    Raises:
        ToolkitError, ModelError: wrong settings, or the model does not exist.
    """
    paths = _paths(arguments)
    if arguments.max_new_tokens < 1:
        raise ToolkitError(f"--max-new-tokens is {arguments.max_new_tokens}; it must be at least 1")
    if not 0 <= arguments.temperature < float("inf"):
        raise ToolkitError(f"--temperature is {arguments.temperature}; it must be a number of 0 or more")
    for name in ("prompt", "system"):
        if not is_unicode(getattr(arguments, name) or ""):
            raise ToolkitError(f"--{name} is not valid UTF-8")
    from deepseek_v2_modeling.training import quiet_libraries
    from recipes.chat.partner import Partner

    quiet_libraries()
    partners = [Partner(path, arguments) for path in paths]
    for partner in partners:
        if partner.own_template:
            print(f"{partner.name}: uses its own chat template, not DeepSeek-V2's", file=sys.stderr)
    if arguments.prompt is not None:
        answer(partners, arguments.prompt)
    else:
        converse(partners)
    return 0


def _paths(arguments: argparse.Namespace) -> list[str]:
    if bool(arguments.model) == bool(arguments.compare):
        raise ToolkitError("give one MODEL_OR_RUN, or two with --compare")
    return arguments.compare or [arguments.model]


def converse(partners: Sequence["Partner"]) -> None:
    """Answer turn after turn until the input ends.

    An error in a turn or a command ends the conversation only if input is not typed.
    """
    typed = sys.stdin.isatty()
    read = reader()
    if typed:
        print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    while (text := read()) is not None:
        word, rest = [*text.split(maxsplit=1), "", ""][:2]
        if word in ENDS:
            return
        try:
            if word in COMMANDS:
                print(_run(word, rest, partners), file=sys.stderr)
            elif typed and word[:1] == "/" and word[1:].isalpha():
                raise ToolkitError(f"no command {word}; /help lists them")
            elif text:
                with _stopped_by_interrupt(typed) as stopped:
                    answer(partners, text, stopped)
        except ToolkitError as error:
            if not typed:
                raise
            print(f"error: {error}", file=sys.stderr)


def answer(partners: Sequence["Partner"], text: str, stopped: Callable[[], bool] = lambda: False) -> None:
    """Print the answer as it is generated, or two answers side by side."""
    if len(partners) == 1:
        reply = partners[0].answer(text, partial(print, end="", flush=True), stopped)
        print()
        for remark in _remarks(reply):
            print(f"[{remark}]", file=sys.stderr)
        return
    for partner in partners:
        partner.read(text)  # a turn that does not fit into one context must not go on in the other conversation
    answers = [partner.answer(text, lambda piece: None, stopped) for partner in partners]
    _print_columns([partner.name for partner in partners], answers)


def _remarks(reply: "Answer") -> Iterator[str]:
    """Why an answer is not complete, and how much of the context is used if that is much."""
    if reply.mark:
        yield reply.mark
    if reply.used >= NEARLY_FULL * reply.limit:
        yield f"{reply.used:,} of {reply.limit:,} tokens of context used; /reset and /undo free it"


def _print_columns(names: Sequence[str], answers: Sequence["Answer"]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table, details = Table(show_lines=True), []
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(Text(reply.text) for reply in answers))
    for reply in answers:
        details.append("; ".join([f"{counted(reply.tokens, 'token')}, {reply.seconds:.1f} s", *_remarks(reply)]))
    table.add_row(*(Text(line) for line in details))
    Console(file=sys.stdout, color_system=None, highlight=False).print(table)


@contextmanager
def _stopped_by_interrupt(typed: bool) -> Iterator[Callable[[], bool]]:
    """In the block, Ctrl-C ends the answer and a second one the program; if input is not typed, the first one does."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    if typed:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _reset(partners: Sequence["Partner"], rest: str) -> str:
    for partner in partners:
        partner.reset()
    return "[new conversation]"


def _undo(partners: Sequence["Partner"], rest: str) -> str:
    undone = [partner.undo() for partner in partners]
    return "[the last question and its answer are forgotten]" if any(undone) else "[nothing to undo]"


def _system(partners: Sequence["Partner"], rest: str) -> str:
    for partner in partners:
        partner.set_system(rest)
    return "[system message set]" if rest else "[no system message]"


def _temperature(partners: Sequence["Partner"], rest: str) -> str:
    try:
        value = float(rest)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ToolkitError(f"/temperature {rest}: give a number of 0 or more; 0 is greedy")
    for partner in partners:
        partner.temperature = value
    return f"[temperature {value:g}]"


def _save(partners: Sequence["Partner"], rest: str) -> str:
    from deepseek_v2_modeling.training import append_lines

    if not rest.endswith(".jsonl"):
        raise ToolkitError(f"/save {rest}: give a file whose name ends in .jsonl; the conversation is added to it")
    rows = [{"messages": partner.messages, "model": partner.name} for partner in partners if partner.messages]
    if not rows:
        raise ToolkitError(f"/save {rest}: there is nothing to save yet")
    try:
        append_lines(Path(rest).expanduser(), rows)
    except (OSError, ValueError) as error:  # a name with a NUL character is a ValueError
        raise ToolkitError(f"/save {rest}: {error}") from error
    return f"[{len(rows)} conversation{'s' if len(rows) != 1 else ''} added to {rest}]"


def _help(partners: Sequence["Partner"], rest: str) -> str:
    lines = {name: text for name, (text, _) in COMMANDS.items()} | {ENDS[0]: "end the conversation, as does Ctrl-D"}
    keys = "Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer"
    return "\n".join([*(f"{name:14}{text}" for name, text in lines.items()), keys])


def _run(word: str, rest: str, partners: Sequence["Partner"]) -> str:
    """Run a command; returns what is said of it."""
    if rest and word in ALONE:
        raise ToolkitError(f"{word} {rest}: {word} stands alone; enter it without what follows")
    return COMMANDS[word][1](partners, rest)


Command = Callable[[Sequence["Partner"], str], str]
COMMANDS: dict[str, tuple[str, Command]] = {
    "/reset": ("begin a new conversation", _reset),
    "/undo": ("forget the last question and its answer", _undo),
    "/system": ("TEXT: set the system message; without TEXT, remove it", _system),
    "/temperature": ("T: sample at temperature T; 0 is greedy", _temperature),
    "/save": ("FILE.jsonl: add the conversation as a row that dsv2 sft reads", _save),
    "/help": ("this list", _help),
}
ALONE = ("/reset", "/undo", "/help")  # commands that nothing follows
ENDS = ("/exit", "/quit")
