"""JSON lines, JSON arrays and JSON objects over several lines -> records, distinguished by how the file begins.

Files are read in chunks, so that memory does not grow with them. Anything unreadable becomes a record with a `problem`.
"""

import codecs
import json
import re
from collections.abc import Generator, Iterator
from itertools import count
from typing import IO, Any

from conversations.reading.data_file import LONGEST_ROW, TOO_LONG, BoundedLines, DataFile, Record, RowTooLong
from conversations.row import is_utf8

_CHUNK = 1 << 20
_SNIFFED = 1 << 16
# Keys under which one object holds all rows of a file.
_WRAPPERS = ("data", "rows", "records", "train", "dataset")
# A file that begins with an object of rows: {"version": "1.0", "data": [{
_SCALAR = rb'"[^"\\]*"\s*:\s*(?:"[^"\\]*"|-?[0-9.]+|true|false|null)\s*,\s*'
_WRAPPED = re.compile(rb'\{\s*(?:%s)*"(?:%s)"\s*:\s*\[\s*\{' % (_SCALAR, "|".join(_WRAPPERS).encode()))
# A file that begins with an object whose first line cannot be complete.
_OPEN = re.compile(rb'\{[^\n]*(?:(?<=[\[,:])[ \t\r]*\n|(?<=\{)[ \t\r]*\n\s*["}])')
_NOT_UTF8 = "not valid UTF-8"
_DEEPEST = 80  # deepest indentation of an array element that is tracked


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError for a duplicate key with different values: a dict would lose one."""
    values = dict(pairs)
    if len(values) != len(pairs):
        for key, value in pairs:
            if value != values[key]:
                raise ValueError(f"the key {key!r:.60} is given twice, with different values")
    return values


_JSON = json.JSONDecoder(object_pairs_hook=_without_repeats)


def json_records(file: DataFile) -> Iterator[Record]:
    """The records of a .jsonl or .json file; either may hold lines, one array, or objects over several lines."""
    with file.open() as content:
        start = content.read(_SNIFFED).removeprefix(codecs.BOM_UTF8).lstrip()
    with file.open() as content:  # reopened: not every compressed stream can seek back
        if start.startswith(b"["):
            yield from _array_records(content)
        elif _WRAPPED.match(start) or _OPEN.match(start):
            yield from _object_records(content)
        else:
            yield from _line_records(content)


def _line_records(file: IO[bytes]) -> Iterator[Record]:
    """One object per line; empty lines are skipped."""
    lines = BoundedLines(file)
    for line in count(1):
        lines.taken = 0
        try:
            raw = next(lines, None)
        except RowTooLong as error:
            yield Record(line, "", {}, str(error))
            continue
        if raw is None:
            return
        if line == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if raw := raw.strip():
            yield _parsed(line, raw)


def _parsed(line: int, raw: bytes) -> Record:
    try:
        text = raw.decode()
    except UnicodeDecodeError:  # in the record's text such bytes become lone surrogates
        return Record(line, raw.decode(errors="surrogateescape"), {}, _NOT_UTF8)
    try:
        return _object(line, text, json.loads(text, object_pairs_hook=_without_repeats))
    except json.JSONDecodeError as error:
        return Record(line, text, {}, f"broken JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or thousands of nested brackets
        return Record(line, text, {}, f"unreadable JSON: {error}")


def _object(line: int, text: str, value: Any, place: str = "") -> Record:
    if not isinstance(value, dict):
        return Record(line, text, {}, f"not an object: {text[:40]}", place)
    return Record(line, text, value, place=place)


def _checked(line: int, text: str, value: Any, place: str = "") -> Record:
    """The record of a value whose text may contain lone surrogates, which stand for bytes that are not UTF-8."""
    return _object(line, text, value, place) if is_utf8(text) else Record(line, text, {}, _NOT_UTF8, place)


def _array_records(file: IO[bytes]) -> Iterator[Record]:
    """The elements of one array."""
    text = _Window(file)
    if (yield from _elements(text)) and (rest := text.peek()):
        yield Record(text.line, rest, {}, "broken JSON: more text after the end of the array")


def _object_records(file: IO[bytes]) -> Iterator[Record]:
    """Objects over several lines: each is a row, or holds a list of rows under one of _WRAPPERS."""
    text = _Window(file)
    while text.peek() == "{":
        if not (yield from _one_object(text)):
            return
    if rest := text.peek():
        yield Record(text.line, rest, {}, "broken JSON: more text after the end of the object")


def _one_object(text: "_Window") -> Generator[Record, None, bool]:
    """Yields the rows of one object; returns whether the text after it can be read."""
    line, values, lists = text.line, {}, 0
    text.skip("{")
    while text.peek() != "}":
        key, _, problem = text.element()
        if not problem and text.peek() != ":":
            problem = "broken JSON: the object lacks a colon after a key"
        if not problem:
            text.skip(":")
            text.peek()  # skips the space before the value
            if key in _WRAPPERS and text.begins_list_of_objects():
                lists += 1
                if not (yield from _elements(text)):
                    return False
            else:
                value, _, problem = text.element()
                if not problem and values.setdefault(str(key), value) != value:
                    problem = f"unreadable JSON: the key {key!r:.60} is given twice, with different values"
        mark = text.peek()
        if not problem and mark == ",":
            text.skip(",")
        elif not problem and mark != "}":
            problem = f"broken JSON: the object {'lacks a comma after a value' if mark else 'is not closed'}"
        if problem:
            yield Record(text.line, "", {}, f"{problem}; nothing after it in this file can be read")
            return False
    text.skip("}")
    if lists > 1:
        yield Record(line, "", {}, f"an object with {lists} lists of rows; put each into a file of its own")
    if not lists:
        yield _checked(line, json.dumps(values, ensure_ascii=False), values)
    elif values:
        yield Record(line, None, {}, beside=tuple(values))
    return True


def _elements(text: "_Window") -> Generator[Record, None, bool]:
    """Yields the elements of one array; returns whether its end was reached.

    After a broken element, reading resumes at the next line that begins an element with the same indentation; without
    such a line the broken element is the last record.
    """
    text.skip("[")
    if text.peek() == "]":
        text.skip("]")
        return True
    ended = 0  # the line on which the last element ended
    for number in count(1):
        text.peek()  # skips the space before the element
        line, before, mark = text.line, text.before, ""
        place = f"element {number}: " if line == ended else ""
        value, source, problem = text.element()
        ended = text.line
        if not problem:
            yield _checked(line, source, value, place)
            mark = text.peek()
            if mark in ("]", ","):
                text.skip(mark)
                if mark == "]":
                    return True
                continue
            line, source = text.line, mark
            problem = f"broken JSON: the array {'lacks a comma after an element' if mark else 'is not closed'}"
        is_there = mark == "{" and text.before == before
        goes_on = before is not None and (is_there or text.go_to(before))
        lost = "" if goes_on or not source else "; nothing after it in this array can be read"
        yield Record(line, source, {}, problem + lost, place)
        if not goes_on:
            break
    return False


class _Window:
    """A sliding window over a text file, which counts lines."""

    def __init__(self, file: IO[bytes]):
        # A BOM at the start is skipped; bytes that are not UTF-8 become lone surrogates.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._file = file
        self._text = ""
        self._at = 0
        self._is_whole = False
        self.line = 1
        self._start = ""  # start of the current line, truncated if it is long

    def _read_more(self, size: int) -> None:
        data = self._file.read(size)
        self._is_whole = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        self._at = 0

    def _move(self, to: int) -> None:
        passed, newline, start = self._text[self._at : to].rpartition("\n")
        self.line += passed.count("\n") + len(newline)
        self._start = start if newline else (self._start + start)[:_DEEPEST]
        self._at = to

    @property
    def before(self) -> str | None:
        """The indentation before the current position; None if anything but white space precedes it on its line."""
        return None if self._start.strip() or len(self._start) == _DEEPEST else self._start

    def go_to(self, before: str) -> bool:
        """Go to the next line with an object at exactly this indentation; returns False if there is none."""
        mark = f"\n{before}{{"
        while (at := self._text.find(mark, self._at)) < 0:
            if self._is_whole:
                return False
            self._move(max(self._at, len(self._text) - len(mark)))
            self._read_more(_CHUNK)
        self._move(at + 1)
        return True

    def peek(self) -> str:
        """The next character that is not white space, without consuming it; "" at the end."""
        while True:
            position = self._at
            while position < len(self._text) and self._text[position] in " \t\r\n":
                position += 1
            self._move(position)
            if position < len(self._text):
                return self._text[position]
            if self._is_whole:
                return ""
            self._read_more(_CHUNK)

    def begins_list_of_objects(self) -> bool:
        """Whether a list that begins with an object comes next; consumes nothing."""
        if self.peek() != "[":
            return False
        while not (rest := self._text[self._at + 1 :].lstrip()) and not self._is_whole:
            self._read_more(_CHUNK)
        return rest.startswith("{")

    def skip(self, mark: str) -> None:
        """Consume the next character, which must be `mark`."""
        assert self.peek() == mark
        self._move(self._at + 1)

    def element(self) -> tuple[Any, str, str | None]:
        """(JSON value, its text, None) of the next value, or (None, the start of its text, what is wrong)."""
        size = _CHUNK
        while True:
            try:
                value, end = _JSON.raw_decode(self._text, self._at)
                if end < len(self._text) or self._is_whole:  # otherwise a number may continue
                    source = self._text[self._at : end]
                    self._move(end)
                    return value, source, None
                problem = ""
            except json.JSONDecodeError as error:
                problem = f"broken JSON: {error.msg}"
            except (ValueError, RecursionError) as error:
                return None, self._text[self._at : self._at + 80], f"unreadable JSON: {error}"
            too_long = len(self._text) - self._at > LONGEST_ROW
            if self._is_whole or too_long:
                problem += f", or this element is {TOO_LONG}" if too_long else ""
                return None, self._text[self._at : self._at + 80], problem
            self._read_more(size)
            size *= 2  # so that a long element is parsed a logarithmic number of times
