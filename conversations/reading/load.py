"""Reads a data file into canonical rows, and reports every row that is left out."""

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

from conversations.errors import ToolkitError
from conversations.formats.bad_row import BadRow
from conversations.formats.hints import likely_columns, mapping_hint, plain_columns, plain_hint
from conversations.formats.reasoning import Reasoning
from conversations.formats.table import UnknownFormat, convert_row, null_keys
from conversations.formats.turn_reading import Rules
from conversations.reading.data_file import Record
from conversations.reading.locating import Located, locate
from conversations.reading.records import records_of
from conversations.row import Refuse, Row
from conversations.tally import Event, counted, event_lines

OnBadRow = Literal["error", "skip"]

_SHOWN = 10  # bad rows in one message


@dataclass(frozen=True)
class RejectedRow:
    """A row that was left out: `file` and `line` (from 1; in a parquet file the row's number), the reason, and the row
    as written."""

    file: str
    line: int
    reason: str
    row: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file: what UTF-8 cannot encode is escaped: \\udcff (a byte ff), \\ud800 (half a surrogate
        pair)."""
        values = asdict(self)
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        return values | {name: text.encode("utf-8", "backslashreplace").decode() for name, text in texts.items()}


def load_conversations(
    path: str | PathLike[str],
    on_bad_row: OnBadRow = "error",
    *,
    columns: Mapping[str, str] | None = None,
    max_bad_rows: int | float | None = None,
    on_rejected: Callable[[RejectedRow], object] | None = None,
    refuse: Refuse | None = None,
    roles: Mapping[str, str] | None = None,
    reasoning: Reasoning = "refuse",
    split: str = "",
) -> "ConversationReader":
    """Read the canonical rows (conversations/row.py) of a data file.

    Args:
        path: a file of JSON lines, one JSON array or JSON objects (recognised by how it begins), CSV, TSV, parquet or
            Arrow (recognised by name); also compressed (.gz, .zst); a .zip of these, a folder, or a pattern
            (data/*.jsonl).
        on_bad_row: "error": stop yielding at the first bad row, check the rest of the file, and raise one error that
            lists up to 10 bad rows as file:line: reason, and their total number. "skip": leave bad rows out.
        columns: {key of a known format: the file's name for it}, as {"prompt": "Body", "response": "Answer"}.
        max_bad_rows: with "skip", the most rows that may be left out: a number (int), or a share of all rows
            (float from 0 to 1, checked at the end of the file).
        on_rejected: called with every RejectedRow, for example `list.append`.
        refuse: returns why the caller cannot use a canonical row (None if it can); such a row is a bad row too.
        roles: the file's role names -> system, user, assistant or tool, as {"bot": "assistant"}.
        reasoning: "refuse": reasoning stored with an answer makes a bad row. "drop": it is left out, and counted.
            "think_tags": it is put before the answer, between <think> and </think>.
        split: the name of a folder's split; "" takes train if there are several.

    Returns:
        A lazy iterator of rows that reports what it read: see ConversationReader.

    Raises:
        ToolkitError: at the call, for a wrong argument, a missing file or an unknown file type; while iterating, for
            bad rows (or too many of them), a file that cannot be read, and a file without a single good row.
    """
    if on_bad_row not in get_args(OnBadRow):
        raise ToolkitError(f"on_bad_row is {on_bad_row!r}; use one of {', '.join(get_args(OnBadRow))}")
    if reasoning not in get_args(Reasoning):
        raise ToolkitError(f"reasoning is {reasoning!r}; use one of {', '.join(get_args(Reasoning))}")
    rules = Rules(roles or {}, reasoning)
    located = locate(Path(path), split)
    return ConversationReader(Path(path), located, on_bad_row, columns or {}, max_bad_rows, on_rejected, refuse, rules)


class ConversationReader(Iterator[Row]):
    """A one-time iterator over the rows of a path, with counts of what has been read so far.

    formats: name of each recognised format -> rows. rejected: number of rows left out. line: line of the last row.
    """

    def __init__(
        self,
        path: Path,
        located: Located,
        on_bad_row: OnBadRow,
        columns: Mapping[str, str],
        max_bad_rows: int | float | None,
        on_rejected: Callable[[RejectedRow], object] | None,
        refuse: Refuse | None,
        rules: Rules,
    ):
        self.path = path
        self.formats: Counter[str] = Counter()
        self.rejected = 0
        self.line = 0
        self._on_bad_row = on_bad_row
        self._columns = columns
        self._max_bad_rows = max_bad_rows
        self._on_rejected = on_rejected
        self._refuse = refuse
        self._rules = rules
        self._events: Counter[Event] = Counter()
        self._first_rejected: list[RejectedRow] = []
        self._hint: dict[str, str] | None = None  # suggested columns for rows of no known format
        self._unread: Row = {}  # the first such row
        self._plain: dict[str, str] = {}
        self._files = located.files
        self._file: Path | zipfile.Path = path
        self._display_name = self._name_of(path)
        self._notes = located.notes
        self._rows = self._good_rows()

    def __iter__(self) -> "ConversationReader":
        return self

    def __next__(self) -> Row:
        return next(self._rows)

    @property
    def rows(self) -> int:
        """Good rows read so far."""
        return self.formats.total()

    def summary(self) -> str:
        """One line for the user: "law.jsonl: ShareGPT, 1,200 rows; 3 rows left out"."""
        formats = "; ".join(f"{name}, {counted(number)}" for name, number in self.formats.most_common()) or "no rows"
        return f"{self.path.name}: {formats}" + (f"; {counted(self.rejected)} left out" if self.rejected else "")

    def notes(self) -> list[str]:
        """What was not used of good rows, or read in a way the user should know: one line per kind."""
        return [*self._notes, *event_lines(self._events)]

    @property
    def place(self) -> str:
        """The location of the last row: "law.jsonl:17", or "laws/part/1.jsonl:17" in a folder."""
        return f"{self._display_name}:{self.line}"

    def _name_of(self, file: Path | zipfile.Path) -> str:
        names = str(file)
        within = names.removeprefix(str(self.path)).strip("/\\") if file != self.path else ""
        return f"{self.path.name}/{within}" if within != names and within else PurePath(names).name

    def _good_rows(self) -> Iterator[Row]:
        for file in self._files:
            self._file, self._display_name = file.path, self._name_of(file.path)
            for record in records_of(file):
                if record.beside:
                    self._events.update(("beside", key) for key in record.beside)
                    continue
                row = self._converted(record)
                if row is not None and not (self.rejected and self._on_bad_row == "error"):
                    yield row
        self.check()

    def _converted(self, record: Record) -> Row | None:
        events: list[Event] = []
        try:
            if record.problem:
                raise BadRow(record.problem)
            format, row = convert_row(record.value, self._columns, self._rules, events)
            if self._refuse and (reason := self._refuse(row)):
                null = null_keys(record.value, self._columns)
                raise BadRow(reason + (f" ({', '.join(null)} is null)" if null else ""))
        except BadRow as error:
            if isinstance(error, UnknownFormat) and not self._hint:
                self._unread = record.value
                self._hint = self._working({**self._columns, **likely_columns(record.value)}, record.value)
            if not self._plain and self.rejected < _SHOWN:
                self._plain = self._working(plain_columns(record.value, self._columns), record.value)
            text = record.text
            if text is None:
                text = json.dumps(record.value, ensure_ascii=False, default=str)
            self._reject(RejectedRow(str(self._file), record.line, f"{record.place}{error}", text))
            return None
        self.line = record.line
        self.formats[format.name] += 1
        self._events.update(events)
        return row

    def _working(self, columns: dict[str, str], row: Row) -> dict[str, str]:
        """These columns if they make the row usable (such as a conversation without its verdict), otherwise none."""
        try:
            _, converted = convert_row(row, columns, self._rules)
        except BadRow:
            return {}
        return {} if self._refuse and self._refuse(converted) else columns

    def _reject(self, rejected: RejectedRow) -> None:
        self.rejected += 1
        if len(self._first_rejected) < _SHOWN:
            self._first_rejected.append(rejected)
        if self._on_rejected:
            self._on_rejected(rejected)
        limit = self._max_bad_rows
        if self._on_bad_row == "skip" and isinstance(limit, int) and self.rejected > limit:
            raise ToolkitError(self._message(f"more than max_bad_rows = {limit} bad rows in {self.path}"))

    def check(self) -> None:
        """Check the rows read so far: raises ToolkitError if none is good, or more are bad than allowed.

        Called automatically at the end; a caller that stops earlier must call it."""
        total = self.rows + self.rejected
        limit = self._max_bad_rows
        if self.rejected and self._on_bad_row == "error":
            raise ToolkitError(self._message(f"{self.path}: {self.rejected:,} of {counted(total)} cannot be used"))
        if not total:
            raise ToolkitError(f"{self.path}: no rows: the file is empty")
        if not self.rows:
            raise ToolkitError(self._message(f"{self.path}: none of {counted(total)} can be used"))
        if isinstance(limit, float) and self.rejected > limit * total:
            share = f"{self.rejected:,} of {counted(total)}"
            raise ToolkitError(self._message(f"{self.path}: {share} are bad, more than max_bad_rows = {limit}"))

    def _message(self, head: str) -> str:
        lines = [head, *(f"  {rejected}" for rejected in self._first_rejected)]
        if more := self.rejected - len(self._first_rejected):
            lines.append(f"  ... and {more:,} more")
        if self._hint is not None:
            lines.append(mapping_hint(self._hint, self._unread))
        if self._plain:
            lines.append(plain_hint(self._plain))
        lines.append("Fix these rows, or leave them out with on_bad_row: skip.")
        return "\n".join(lines)
