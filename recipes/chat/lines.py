"""What the user enters: lines of standard input, or turns edited in a terminal."""

import sys
from collections.abc import Callable
from typing import Any

from conversations.errors import ToolkitError
from recipes.terminal import is_unicode

Read = Callable[[], str | None]  # the next turn without spaces around it; None at the end


def reader() -> Read:
    """How turns are read: edited in a terminal, else one per line of standard input."""
    return _editor() if sys.stdin.isatty() else read_line


def read_line() -> str | None:
    """The next line of standard input; None at its end.

    Raises:
        ToolkitError: the input is not in the encoding of standard input.
    """
    try:
        text = sys.stdin.readline()
    except UnicodeDecodeError:
        text = "\udc80"
    if not is_unicode(text):
        raise ToolkitError(
            f"standard input is not valid {sys.stdin.encoding.upper()}; send it as UTF-8, or name its encoding in "
            "PYTHONIOENCODING, such as gbk"
        )
    return text.strip() if text else None


def _editor() -> Read:
    """Turns of one or more lines with editing and, for this session, a history. Pasted lines are one turn.

    Enter sends, Alt-Enter begins a new line, Ctrl-C clears what was typed, Ctrl-D ends.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    # The editor moves the cursor, so it writes past the wrapper that makes untrusted text printable.
    screen = sys.__stdout__ if sys.stdout.isatty() else sys.__stderr__
    session: PromptSession[str] = PromptSession(multiline=True, key_bindings=keys, output=create_output(screen))

    def read() -> str | None:
        while True:
            try:
                return session.prompt("> ", prompt_continuation="  ").strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None

    return read
