"""Encodes answers to a prompt, such as a pair's, and cuts them to a length in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conversations.errors import ToolkitError
from conversations.rendering.conversation import conversation_runs
from conversations.rendering.encoding import EncodedTexts, encode_runs
from conversations.rendering.fitting import Piece
from conversations.rendering.lengths import LengthReport, TooLong
from conversations.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Fit:
    """Encodes the answers of a row as token ids and masks of at most max_length tokens; None is no limit.

    too_long: "drop" leaves longer rows out; "truncate" cuts the beginning of the prompt, down to a quarter of
    max_length, and then the end of the answer, so that a truncated answer has no end token, as in RL.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int | None
    too_long: TooLong = "truncate"

    def answers(self, row: Row, keys: Sequence[str], known: EncodedTexts, report: LengthReport) -> list[Piece]:
        """The answers under these keys, each after its prompt; empty if the row is left out. Counts in `report`.

        known: texts that are already encoded (see encode_runs).

        Raises:
            ToolkitError: the row is too long, and too_long is "split".
        """
        pieces = self._whole(row["prompt"], [row[key] for key in keys], known)
        longest, limit = max(len(ids) for ids, _ in pieces), self.max_length
        report.rows += 1
        report.lengths.append(longest)
        if limit is None or longest <= limit:
            return pieces
        if self.too_long == "split":
            raise ToolkitError("format.too_long: split is for conversations; preferences need truncate or drop")
        if self.too_long == "drop":
            report.reject(f"longer than {limit} tokens")
            return []
        pieces = self._cut(row["prompt"], pieces, known)
        if len(pieces) > 1 and pieces[0][0] == pieces[1][0]:
            report.reject(f"two answers that are equal when cut to {limit} tokens")
            return []
        report.truncated += 1
        return pieces

    def one(self, prompt: list[Row], answer: list[Row]) -> Piece:
        """An answer after its prompt, truncated regardless of too_long."""
        return self._cut(prompt, self._whole(prompt, [answer], {}), {})[0]

    def _cut(self, prompt: list[Row], pieces: list[Piece], known: EncodedTexts) -> list[Piece]:
        limit = self.max_length
        if limit is None or all(len(ids) <= limit for ids, _ in pieces):
            return pieces
        prompt_runs = conversation_runs(prompt, self.tokenizer, add_generation_prompt=True)
        start = len(encode_runs(prompt_runs, self.tokenizer, known)["input_ids"])
        return [(cut(ids, start, limit), cut(mask, start, limit)) for ids, mask in pieces]

    def _whole(self, prompt: list[Row], answers: Sequence[list[Row]], known: EncodedTexts) -> list[Piece]:
        runs = [conversation_runs([*prompt, *answer], self.tokenizer) for answer in answers]
        encoded = [encode_runs(answer_runs, self.tokenizer, known) for answer_runs in runs]
        return [(piece["input_ids"], piece["assistant_mask"]) for piece in encoded]


def cut(tokens: list[int], start: int, limit: int) -> list[int]:
    """Truncate a list with one value per token of a prompt and its answer, which begins at `start`, to `limit` tokens
    (see Fit)."""
    prompt_tokens = min(start, max(limit - (len(tokens) - start), limit // 4))
    return tokens[start - prompt_tokens : start - prompt_tokens + limit]
