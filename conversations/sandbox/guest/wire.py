"""Sends values and calls between two sandboxes: the one that runs the tests, and the one that they test.

Plain values are sent as bytes; for everything else, a reference is sent. So no code of one side runs on the other: an
object that claims to equal everything arrives as a reference, which equals only itself. The format is our own, and
imports are kept to a minimum: starting Python is most of the cost of a check.
"""

from __future__ import annotations

import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LONGEST = 1 << 24  # maximum message size in bytes
DEEPEST = 200  # maximum nesting of values


class Gone(BaseException):
    """The other side has ended or violates the protocol. A BaseException, so that no `except Exception` of a test
    mistakes it for an error of the tested function."""


class Reference:
    """Stands for a value that stays with its sender: its index in a list there."""

    def __init__(self, place):
        self.place = place


class Channel:
    """Messages over a connected socket: each value is preceded by its length.

    replace: value that cannot be sent -> the Reference to send. resolve: index of a Reference -> the receiver's value.
    """

    def __init__(self, fd, replace, resolve):
        self.fd, self.replace, self.resolve, self.gone = fd, replace, resolve, False

    def send(self, value):
        """Raises ValueError or TypeError for a value that cannot be sent, Gone if the receiver has ended."""
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
        """The next value; raises Gone if there is none, or if what arrives is malformed."""
        try:
            (length,) = struct.unpack("!I", self._read_exactly(4))
            if length > LONGEST:
                raise ValueError("too long")
            value, end = decode(self._read_exactly(length), 0, self.resolve)
            if end != length:
                raise ValueError("trailing bytes after the value")
            return value
        except (OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, struct.error) as error:
            self.gone = True
            raise Gone from error

    def _read_exactly(self, length):
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
    """The bytes of a value, as a list of chunks. Raises ValueError for one nested too deeply (or in itself)."""
    if depth > DEEPEST:
        raise ValueError("a value nested too deeply to be sent")
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
        return _encoded_items(b"M", items, replace, depth)
    if isinstance(value, range):
        return _encoded_items(b"G", (value.start, value.stop, value.step), replace, depth)
    for tag, kind in ((b"L", list), (b"U", tuple), (b"E", set), (b"Z", frozenset)):
        if isinstance(value, kind):
            return _encoded_items(tag, list(value), replace, depth)
    for name, kind in _library_types():
        if isinstance(value, kind):
            return _encoded_items(b"O", [name, list(value) if name == "deque" else str(value)], replace, depth)
    return encode(replace(value), replace, depth + 1)


def _encoded_items(tag, items, replace, depth):
    chunks = [tag, struct.pack("!I", len(items))]
    for item in items:
        chunks += encode(item, replace, depth + 1)
    return chunks


def _library_types():
    """(name, class) of plain values defined in library modules; a module that is not imported has no values to send."""
    for module, name in (("collections", "deque"), ("decimal", "Decimal"), ("fractions", "Fraction")):
        if module in sys.modules:
            yield name, getattr(sys.modules[module], name)


def _library_value(name, content):
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
    b"O": lambda items: _library_value(*items),
}


def decode(content, at, resolve, depth=0):
    """(the value at this offset, the offset after it). Raises ValueError, TypeError, LookupError or struct.error for
    bytes that `encode` does not produce."""
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
        return resolve(size), at
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
        item, at = decode(content, at, resolve, depth + 1)
        items.append(item)
    return _MAKERS[tag](items), at
