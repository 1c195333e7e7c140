"""Encodes a row into training pieces (token ids and loss masks) of limited length, and counts how rows were handled."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conversations.rendering.ahead import Prepared
from conversations.rendering.conversation import TrainOn, conversation_runs
from conversations.rendering.encoding import EncodedTexts, Run, encode_runs
from conversations.rendering.fill_in_the_middle import text_runs
from conversations.rendering.lengths import CUT_AWAY, LengthReport, TooLong
from conversations.row import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[list[int], list[int]]  # token ids, loss mask
# (row, the report that counts it) -> its training samples, each of one piece or, if answers are compared, of several
Encode = Callable[[Row, LengthReport], list[list[Piece]]]

NOTHING_TRAINED = "nothing to train on"


@dataclass(frozen=True)
class Fitter:
    """How rows become pieces.

    max_length: in tokens; None for no limit. too_long: "truncate" keeps the start; "drop" leaves the row out; "split"
    divides it into independent parts of complete exchanges (a user turn with its answer), each after the system
    message. An exchange that is too long by itself is truncated. Plain text has no turns, so it is split anywhere.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int | None
    too_long: TooLong = "truncate"
    train_on: TrainOn = "all_assistant"

    def runs(self, row: Row) -> list[Run]:
        """The runs of a row (a conversation or plain text). Raises ToolkitError as `pieces` does."""
        if "text" in row:
            return text_runs(row, self.tokenizer)
        return conversation_runs(row["messages"], self.tokenizer, train_on=self.train_on)

    def pieces(self, row: Row, report: LengthReport) -> Iterator[Piece]:
        """The pieces of a row, counted in `report`; each has a trained token.

        Raises:
            ToolkitError: as `render_conversation` and `render_text`.
        """
        return self.fit(Prepared(row, self.runs(row), {}), report)

    def fit(self, prepared: Prepared, report: LengthReport) -> Iterator[Piece]:
        """`pieces` of a row whose texts were encoded in a batch with others."""
        row = prepared.row
        report.rows += 1
        ids, mask = full = self._encoded(prepared.runs, prepared.encoded)
        report.lengths.append(len(ids))
        if not any(mask):
            report.reject(NOTHING_TRAINED, row)
        elif self._fits(full):
            yield full
        elif self.too_long == "drop":
            report.reject(f"longer than {self.max_length} tokens", row)
        else:
            yield from self._fitted(row, full, prepared.encoded, report)

    def _fitted(self, row: Row, full: Piece, encoded: EncodedTexts, report: LengthReport) -> list[Piece]:
        """The pieces of a row that is too long; counts how it was handled."""
        if row.get("fim"):  # the middle comes last, so truncation would remove it
            report.unfilled += 1
            row = {key: value for key, value in row.items() if key != "fim"}
            full = self._rendered(row, encoded)
            if self._fits(full):
                return [full]
        # A part's turns may all be excluded from training.
        candidates = [candidate for candidate in self._candidates(row, full, encoded) if any(candidate[1])]
        # The first token is never predicted: a piece whose mask covers only that one would train nothing.
        pieces = [piece for piece in map(self._start_of, candidates) if any(piece[1][1:])]
        if not pieces:
            report.reject(CUT_AWAY, row)
            return []
        report.truncated += not all(map(self._fits, candidates))
        report.split += candidates != [full]
        report.cut_exchanges += (len(candidates) - len(pieces)) * ("messages" in row)
        return pieces

    def _candidates(self, row: Row, full: Piece, encoded: EncodedTexts) -> Iterator[Piece]:
        """The parts of a row that would be trained, before those that are still too long are truncated."""
        if self.too_long == "truncate":
            yield full
        elif "text" in row:
            yield from self._windows(full)
        else:
            trainable = [part for part in self._whole_exchanges(row["messages"], encoded) if _has_answer(part)]
            for part in trainable[-1:] if self.train_on == "last_assistant" else trainable:
                yield self._rendered({"messages": part}, encoded)

    def _whole_exchanges(self, messages: Sequence[Message], encoded: EncodedTexts) -> Iterator[list[Message]]:
        """Parts with as many exchanges as fit; an exchange that does not fit by itself is a separate part."""
        first = int(messages[0]["role"] == "system")
        system = list(messages[:first])
        part: list[Message] = []
        for start in range(first, len(messages), 2):
            exchange = list(messages[start : start + 2])
            longer = {"messages": [*system, *part, *exchange]}
            if part and not self._fits(self._rendered(longer, encoded)):
                yield [*system, *part]
                part = []
            part += exchange
        yield [*system, *part]

    def _rendered(self, row: Row, encoded: EncodedTexts) -> Piece:
        return self._encoded(self.runs(row), encoded)

    def _encoded(self, runs: Sequence[Run], encoded: EncodedTexts) -> Piece:
        rendered = encode_runs(runs, self.tokenizer, encoded)
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


def _has_answer(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "assistant" for message in messages)
