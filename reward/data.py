"""Encodes canonical rows as token ids for a reward model: pairs, or single answers with a verdict."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import pyarrow
from datasets import Features, List, Value

from conversations.answers.judging import is_pair
from conversations.errors import ToolkitError
from conversations.rendering.ahead import encoded_ahead
from conversations.rendering.answer_fitting import Fit
from conversations.rendering.conversation import conversation_runs
from conversations.rendering.encoded import Columns, EncodedRows, encoded_dataset, id_lists, key_of
from conversations.rendering.encoding import Run
from conversations.rendering.fitting import Encode, Piece
from conversations.rendering.lengths import LengthReport, TooLong
from conversations.row import JUDGED, MARGIN, PAIR, VERDICTS, Row
from conversations.row_cache import RowCache
from reward.config import RewardRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = (*PAIR[1:], "completion")
_IDS = List(Value("int32"))
_PAIRS = Features(
    {**{f"{key}_ids": _IDS for key in PAIR[1:]}, "answer_tokens": Value("int32"), MARGIN: Value("float64")}
)
_JUDGED = Features({"input_ids": _IDS, "target": Value("float64")})


def encoder(recipe: RewardRecipe, tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> Encode:
    """The encoding function for a row: its answers, a pair or one, form one training sample."""
    fit = Fit(tokenizer, max_length, recipe.format.too_long)

    def encode(row: Row, report: LengthReport) -> list[list[Piece]]:
        fitted = fit.answers(row, [key for key in ANSWERS if key in row], {}, report)
        report.margins += MARGIN in row
        return [[(ids, [0] * len(ids)) for ids, _ in fitted]] if fitted else []

    return encode


def answer_ids(
    prompt: list[Row], answer: list[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> list[int]:
    """Token ids of the conversation that ends with the answer, truncated as in training."""
    return Fit(tokenizer, max_length).one(prompt, answer)[0]


def _runs_of(row: Row, keys: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[Run]:
    """The texts to encode for the answers under these keys, each after the prompt."""
    return [run for key in keys for run in conversation_runs([*row["prompt"], *row[key]], tokenizer)]


def _last_turn(mask: list[int]) -> int:
    """The number of tokens at the end that belong to a trainable assistant turn, including its end token."""
    return next((count for count, trained in enumerate(reversed(mask)) if not trained), len(mask))


def encode_pairs(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    too_long: TooLong,
    cache: RowCache | None = None,
) -> EncodedRows:
    """Encode pairs into the columns chosen_ids, rejected_ids, answer_tokens (the number of tokens at the end of
    chosen_ids that are the answer's last turn) and margin (null if the row has none), with a length report.

    Raises:
        ToolkitError: a row is not a pair, or no row is left.
    """

    def checked() -> Iterator[Row]:
        for number, row in enumerate(rows, 1):
            if not is_pair(row):
                raise ToolkitError(
                    f"row {number} is not a pair (it has {', '.join(sorted(row))}); it needs {', '.join(PAIR)}, "
                    "or loss: pointwise for judged answers"
                )
            yield row

    fit = Fit(tokenizer, max_length, too_long)

    def encoded(report: LengthReport) -> Iterator[Columns]:
        runs_of = partial(_runs_of, keys=PAIR[1:], tokenizer=tokenizer)
        for batch in encoded_ahead(checked(), runs_of, tokenizer):
            pairs = [
                (prepared.row, fit.answers(prepared.row, PAIR[1:], prepared.encoded, report)) for prepared in batch
            ]
            report.margins += sum(MARGIN in prepared.row for prepared in batch)
            pairs = [(row, pair) for row, pair in pairs if pair]
            ids = {f"{key}_ids": id_lists([pair[place][0] for _, pair in pairs]) for place, key in enumerate(PAIR[1:])}
            answers = [_last_turn(chosen[1]) for _, (chosen, _) in pairs]
            margins = [row.get(MARGIN) for row, _ in pairs]
            yield {
                **ids,
                "answer_tokens": pyarrow.array(answers, pyarrow.int32()),
                MARGIN: pyarrow.array(margins, pyarrow.float64()),
            }

    columns = sorted(_PAIRS)
    key = key_of(
        rows, tokenizer, stage="reward", loss="pairwise", max_length=max_length, too_long=too_long, columns=columns
    )
    count = len(rows) if isinstance(rows, Sequence) else None
    return encoded_dataset(cache or RowCache(), key, _PAIRS, encoded, rows=count, max_length=max_length)


def encode_judged(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    too_long: TooLong,
    cache: RowCache | None = None,
) -> EncodedRows:
    """Encode judged answers into the columns input_ids and target (the label or the score), with a length report.

    Raises:
        ToolkitError: a row has no verdict, the data mix labels and scores, or no row is left.
    """

    def checked() -> Iterator[Row]:
        verdicts = set()
        for number, row in enumerate(rows, 1):
            verdicts.add(verdict_of(row, number))
            if len(verdicts) > 1:
                raise ToolkitError("data: some rows have a label and some a score; train on one kind at a time")
            yield row

    fit = Fit(tokenizer, max_length, too_long)

    def encoded(report: LengthReport) -> Iterator[Columns]:
        runs_of = partial(_runs_of, keys=JUDGED[1:], tokenizer=tokenizer)
        for batch in encoded_ahead(checked(), runs_of, tokenizer):
            ids, targets = [], []
            for prepared in batch:
                if fitted := fit.answers(prepared.row, JUDGED[1:], prepared.encoded, report):
                    ids.append(fitted[0][0])
                    targets.append(float(prepared.row[verdict_of(prepared.row, report.rows)]))
            yield {"input_ids": id_lists(ids), "target": targets}

    key = key_of(rows, tokenizer, stage="reward", loss="pointwise", max_length=max_length, too_long=too_long)
    count = len(rows) if isinstance(rows, Sequence) else None
    return encoded_dataset(cache or RowCache(), key, _JUDGED, encoded, rows=count, max_length=max_length)


def verdict_of(row: Row, number: int) -> str:
    """The kind of verdict in a row: "label" or "score". Raises ToolkitError if the row is not a judged answer."""
    verdict = next((name for name in VERDICTS if name in row), None)
    if verdict is None or not all(key in row for key in JUDGED):
        raise ToolkitError(
            f"row {number} is not a judged answer (it has {', '.join(sorted(row))}); loss: pointwise needs "
            "prompt, completion and a label or a score"
        )
    return verdict
