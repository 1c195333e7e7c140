"""Safe terminal output: untrusted text cannot send control sequences to the terminal.

Model answers, keys and file names are untrusted. While the command line runs, everything that Python prints goes
through `printable`. Progress bars, which need to move the cursor, write to `sys.__stderr__` directly.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# C0 and C1 control characters (except tab and newline), bidirectional controls, separators that some terminals treat
# as newlines, and surrogates, which cannot be encoded.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)


def printable(text: str) -> str:
    """The text with control characters escaped as in Python: an escape character becomes `\\x1b`."""
    return _STEERING.sub(_written_out, text)


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded; undecodable bytes appear in it as surrogates."""
    return not re.search("[\ud800-\udfff]", text)


@contextmanager
def safe_terminal() -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` escape what is not `printable`, or not in their encoding (as `\\u4e2d`)."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Printable, before)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Printable:
    """Wraps a text stream and makes everything written to it printable."""

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
