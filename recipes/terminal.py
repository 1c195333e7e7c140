"""The terminal: what goes out is text that cannot steer it, what comes in is text.

Answers of a model, keys and names of files are other people's words. While the command line runs, everything that
Python prints goes through `printable`. Progress bars, which do move the cursor, write to `sys.__stderr__` themselves.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# Control characters of both sets (a tab and a newline are text), marks that reorder the text around them, separators
# that some terminals take for newlines, and halves of characters, which no encoding has.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)


def printable(text: str) -> str:
    """The text with what would steer a terminal written out: an escape character is `\\x1b`, as in Python."""
    return _STEERING.sub(_written_out, text)


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded; bytes that could not be decoded are halves of characters in it."""
    return not re.search("[\ud800-\udfff]", text)


@contextmanager
def safe_terminal() -> Iterator[None]:
    """Inside, `sys.stdout` and `sys.stderr` print what is `printable`, and what their encoding lacks as `\\u4e2d`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Printable, before)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Printable:
    """A text stream that writes what is printable; all else is the stream's own."""

    def __init__(self, stream: Any):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
