"""A row -> the token ids and loss masks that are trained, none longer than a run allows; all of it counted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conversations.infill import render_text
from conversations.lengths import LengthReport, TooLong
from conversations.rendering import TrainOn, render_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Piece = tuple[list[int], list[int]]  # token ids, loss mask

NOTHING_TRAINED = "nothing in it is trained"
CUT_AWAY = "all that would be trained lies behind the cut"


@dataclass(frozen=True)
class Fitter:
    """How rows become pieces.

    max_length: in tokens; None lets every row be. too_long: "truncate" keeps the start; "drop" leaves the row out;
    "split" makes parts of whole exchanges (a user's turn with its answer), each with the system message in front,
    that see nothing of one another. An exchange that is too long by itself is truncated. Plain text has no turns: it
    is split anywhere.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int | None
    too_long: TooLong = "truncate"
    train_on: TrainOn = "all_assistant"

    def pieces(self, row: Row, report: LengthReport) -> Iterator[Piece]:
        """The pieces of a row (a conversation or plain text), counted in `report`; each has a trained token.

        Raises:
            ToolkitError: as render_conversation and render_text.
        """
        report.rows += 1
        ids, mask = whole = self._rendered(row)
        report.lengths.append(len(ids))
        if not any(mask):
            report.reject(NOTHING_TRAINED, row)
        elif self._fits(whole):
            yield whole
        elif self.too_long == "drop":
            report.reject(f"longer than {self.max_length} tokens", row)
        else:
            # The first token is never predicted: a window of that one alone would train nothing.
            found = [piece for piece in self._cut(row, whole, report) if any(piece[1][1:])]
            if not found:
                report.reject(CUT_AWAY, row)
            yield from found

    def _cut(self, row: Row, whole: Piece, report: LengthReport) -> Iterator[Piece]:
        if row.get("fim"):  # without its end the middle would be missing
            report.unfilled += 1
            whole = self._rendered({"text": row["text"]})
            if self._fits(whole):
                yield whole
                return
        if self.too_long == "truncate":
            report.truncated += 1
            yield self._start_of(whole)
        elif "text" in row:
            report.split += 1
            yield from self._windows(whole)
        else:
            yield from self._parts(row["messages"], report)

    def _parts(self, messages: Sequence[Row], report: LengthReport) -> Iterator[Piece]:
        parts = list(self._whole_exchanges(messages))
        report.split += len(parts) > 1
        last = max(index for index, part in enumerate(parts) if _answered(part))
        too_long = False
        for index, part in enumerate(parts):
            if self.train_on == "last_assistant" and index != last:
                continue
            piece = self._rendered({"messages": part})
            too_long |= not self._fits(piece)
            yield self._start_of(piece)
        report.truncated += too_long

    def _whole_exchanges(self, messages: Sequence[Row]) -> Iterator[list[Row]]:
        """Parts of as many exchanges as fit; one that does not fit by itself is a part, too."""
        first = int(messages[0]["role"] == "system")
        system = list(messages[:first])
        part: list[Row] = []
        for start in range(first, len(messages), 2):
            exchange = list(messages[start : start + 2])
            if part and not self._fits(self._rendered({"messages": [*system, *part, *exchange]})):
                yield [*system, *part]
                part = []
            part += exchange
        yield [*system, *part]

    def _rendered(self, row: Row) -> Piece:
        if "text" in row:
            rendered = render_text(row, self.tokenizer)
        else:
            rendered = render_conversation(row["messages"], self.tokenizer, train_on=self.train_on)
        return rendered["input_ids"], rendered["assistant_mask"]

    def _fits(self, piece: Piece) -> bool:
        return self.max_length is None or len(piece[0]) <= self.max_length

    def _start_of(self, piece: Piece) -> Piece:
        return piece[0][: self.max_length], piece[1][: self.max_length]

    def _windows(self, piece: Piece) -> Iterator[Piece]:
        ids, mask = piece
        size = self.max_length or len(ids)
        for start in range(0, len(ids), size):
            yield ids[start : start + size], mask[start : start + size]


def _answered(messages: Sequence[Row]) -> bool:
    return any(message["role"] == "assistant" for message in messages)
