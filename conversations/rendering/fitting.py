"""Encodes a row into training pieces (token ids and loss masks) of limited length, and counts what it does."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conversations.rendering.ahead import Prepared
from conversations.rendering.conversation import TrainOn, conversation_runs
from conversations.rendering.encoding import Known, Run, encode_runs
from conversations.rendering.fill_in_the_middle import text_runs
from conversations.rendering.lengths import CUT_AWAY, LengthReport, TooLong
from conversations.row import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[list[int], list[int]]  # token ids, loss mask
# (row, the report that counts it) -> what is trained on of it: samples, of one piece or (answers compared) several
Encode = Callable[[Row, LengthReport], list[list[Piece]]]

NOTHING_TRAINED = "nothing to train on"


@dataclass(frozen=True)
class Fitter:
    """How rows become pieces.

    max_length: in tokens; None lets every row be. too_long: "truncate" keeps the start; "drop" leaves the row out;
    "split" makes parts of whole exchanges (a user's turn with its answer), each after the system message,
    that see nothing of one another. An exchange that is too long by itself is truncated. Plain text has no turns: it
    is split anywhere.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int | None
    too_long: TooLong = "truncate"
    train_on: TrainOn = "all_assistant"

    def runs(self, row: Row) -> list[Run]:
        """A row (a conversation or plain text) as what is encoded. Raises ToolkitError, as `pieces`."""
        if "text" in row:
            return text_runs(row, self.tokenizer)
        return conversation_runs(row["messages"], self.tokenizer, train_on=self.train_on)

    def pieces(self, row: Row, report: LengthReport) -> Iterator[Piece]:
        """The pieces of a row, counted in `report`; each has a trained token.

        Raises:
            ToolkitError: as render_conversation and render_text.
        """
        return self.fit(Prepared(row, self.runs(row), {}), report)

    def fit(self, prepared: Prepared, report: LengthReport) -> Iterator[Piece]:
        """`pieces` of a row whose texts have been encoded in a batch with others."""
        row = prepared.row
        report.rows += 1
        ids, mask = whole = self._encoded(prepared.runs, prepared.known)
        report.lengths.append(len(ids))
        if not any(mask):
            report.reject(NOTHING_TRAINED, row)
        elif self._fits(whole):
            yield whole
        elif self.too_long == "drop":
            report.reject(f"longer than {self.max_length} tokens", row)
        else:
            yield from self._fitted(row, whole, prepared.known, report)

    def _fitted(self, row: Row, whole: Piece, known: Known, report: LengthReport) -> list[Piece]:
        """The pieces of a row that is too long; counts how it was handled."""
        if row.get("fim"):  # without its end the middle would be missing
            report.unfilled += 1
            row = {key: value for key, value in row.items() if key != "fim"}
            whole = self._rendered(row, known)
            if self._fits(whole):
                return [whole]
        # all turns may be excluded from training
        parts = [part for part in self._parts(row, whole, known) if any(part[1])]
        # The first token is never predicted: a piece in which that one alone counts would train nothing.
        kept = [piece for piece in map(self._start_of, parts) if any(piece[1][1:])]
        if not kept:
            report.reject(CUT_AWAY, row)
            return []
        report.truncated += not all(map(self._fits, parts))
        report.split += parts != [whole]
        report.cut_exchanges += (len(parts) - len(kept)) * ("messages" in row)
        return kept

    def _parts(self, row: Row, whole: Piece, known: Known) -> Iterator[Piece]:
        """The parts of a row that would be trained, before those that are still too long lose their end."""
        if self.too_long == "truncate":
            yield whole
        elif "text" in row:
            yield from self._windows(whole)
        else:
            answered = [part for part in self._whole_exchanges(row["messages"], known) if _answered(part)]
            for part in answered[-1:] if self.train_on == "last_assistant" else answered:
                yield self._rendered({"messages": part}, known)

    def _whole_exchanges(self, messages: Sequence[Message], known: Known) -> Iterator[list[Message]]:
        """Parts with as many exchanges as fit; an exchange that does not fit alone is a part of its own."""
        first = int(messages[0]["role"] == "system")
        system = list(messages[:first])
        part: list[Message] = []
        for start in range(first, len(messages), 2):
            exchange = list(messages[start : start + 2])
            longer = {"messages": [*system, *part, *exchange]}
            if part and not self._fits(self._rendered(longer, known)):
                yield [*system, *part]
                part = []
            part += exchange
        yield [*system, *part]

    def _rendered(self, row: Row, known: Known) -> Piece:
        return self._encoded(self.runs(row), known)

    def _encoded(self, runs: Sequence[Run], known: Known) -> Piece:
        rendered = encode_runs(runs, self.tokenizer, known)
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


def _answered(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "assistant" for message in messages)
