"""Values and calls between two sandboxes: what runs the tests, and what they test.

Plain values travel as bytes; everything else stays where it is, and a reference to it travels. So nothing of one side
runs on the other: an object that equals everything is only a reference there, which equals itself. The format is our
own, and nothing is imported that is not needed: starting Python is most of what a check costs.
"""

from __future__ import annotations

import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LONGEST = 1 << 24  # bytes of a message
DEEPEST = 200  # of values in one another


class Gone(BaseException):
    """The other side has ended, or does not keep to the protocol. No `except Exception` of a test takes it for an error
    of the function that it tests."""


class Reference:
    """A value of the sender's that does not travel: its place in a list there."""

    def __init__(self, place):
        self.place = place


class Channel:
    """Messages over a connected socket: values behind their length.

    replace: of a value that does not travel, the Reference that does. found: what the receiver has for one.
    """

    def __init__(self, fd, replace, found):
        self.fd, self.replace, self.found, self.gone = fd, replace, found, False

    def send(self, value):
        """Raises ValueError or TypeError for a value that cannot be sent, Gone for a receiver that is not there."""
        content = b"".join(encode(value, self.replace))
        if len(content) > LONGEST:
            raise ValueError(f"a value of more than {LONGEST:,} bytes")
        content = struct.pack("!I", len(content)) + content
        try:
            while content:
                content = content[os.write(self.fd, content) :]
        except OSError as error:
            self.gone = True
            raise Gone from error

    def receive(self) -> Any:
        """The next value; raises Gone where none comes, or no value."""
        try:
            (length,) = struct.unpack("!I", self._read(4))
            if length > LONGEST:
                raise ValueError("too long")
            value, end = decode(self._read(length), 0, self.found)
            if end != length:
                raise ValueError("something behind the value")
            return value
        except (OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, struct.error) as error:
            self.gone = True
            raise Gone from error

    def _read(self, length):
        content = b""
        while len(content) < length:
            part = os.read(self.fd, length - len(content))
            if not part:
                raise EOFError
            content += part
        return content


def _sized(tag, content):
    return tag + struct.pack("!I", len(content)) + content


def encode(value, replace, depth=0):
    """The bytes of a value, in parts. Raises ValueError for one that is too deep (or holds itself)."""
    if depth > DEEPEST:
        raise ValueError("a value too deep to be sent")
    if value is None:
        return [b"N"]
    if isinstance(value, bool):
        return [b"T" if value else b"F"]
    if isinstance(value, int):
        return [_sized(b"I", hex(value).encode())]
    if isinstance(value, float):
        return [b"D", struct.pack("!d", value)]
    if isinstance(value, str):
        return [_sized(b"S", str.encode(value, "utf-8", "surrogatepass"))]
    if isinstance(value, (bytes, bytearray)):
        return [_sized(b"B" if isinstance(value, bytes) else b"A", bytes(value))]
    if isinstance(value, complex):
        return [b"C", struct.pack("!dd", value.real, value.imag)]
    if isinstance(value, Reference):
        return [b"R", struct.pack("!I", value.place)]
    if isinstance(value, dict):
        items = [part for item in dict.items(value) for part in item]
        return _several(b"M", items, replace, depth)
    if isinstance(value, range):
        return _several(b"G", (value.start, value.stop, value.step), replace, depth)
    for tag, kind in ((b"L", list), (b"U", tuple), (b"E", set), (b"Z", frozenset)):
        if isinstance(value, kind):
            return _several(tag, list(value), replace, depth)
    for name, kind in _made_elsewhere():
        if isinstance(value, kind):
            return _several(b"O", [name, list(value) if name == "deque" else str(value)], replace, depth)
    return encode(replace(value), replace, depth + 1)


def _several(tag, items, replace, depth):
    parts = [tag, struct.pack("!I", len(items))]
    for item in items:
        parts += encode(item, replace, depth + 1)
    return parts


def _made_elsewhere():
    """(name, class) of plain values of modules; those that nobody has imported have no values."""
    for module, name in (("collections", "deque"), ("decimal", "Decimal"), ("fractions", "Fraction")):
        if module in sys.modules:
            yield name, getattr(sys.modules[module], name)


def _other(name, content):
    if name == "deque":
        from collections import deque

        return deque(content)
    if name == "Decimal":
        from decimal import Decimal

        return Decimal(content)
    if name == "Fraction":
        from fractions import Fraction

        return Fraction(content)
    raise ValueError("no such value")


_MAKERS = {
    b"L": list,
    b"U": tuple,
    b"E": set,
    b"Z": frozenset,
    b"G": lambda items: range(*items),
    b"M": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
    b"O": lambda items: _other(*items),
}


def decode(content, at, found, depth=0):
    """(the value at this place, the place behind it). Raises ValueError, TypeError, LookupError or struct.error for
    bytes that `encode` does not make."""
    if depth > DEEPEST:
        raise ValueError("too deep")
    tag, at = content[at : at + 1], at + 1
    if tag in b"NTF" and tag:
        return {b"N": None, b"T": True, b"F": False}[tag], at
    if tag in (b"D", b"C"):
        width = 8 if tag == b"D" else 16
        numbers = struct.unpack_from("!d" if tag == b"D" else "!dd", content, at)
        return numbers[0] if tag == b"D" else complex(*numbers), at + width
    (size,) = struct.unpack_from("!I", content, at)
    at += 4
    if tag == b"R":
        return found(size), at
    if tag in (b"I", b"S", b"B", b"A"):
        part = content[at : at + size]
        if len(part) < size:
            raise ValueError("cut")
        makers = {
            b"I": lambda text: int(text, 16),
            b"S": lambda text: text.decode("utf-8", "surrogatepass"),
            b"B": bytes,
            b"A": bytearray,
        }
        return makers[tag](part), at + size
    if size > len(content) - at:
        raise ValueError("more parts than bytes")
    items = []
    for _ in range(size):
        item, at = decode(content, at, found, depth + 1)
        items.append(item)
    return _MAKERS[tag](items), at
