"""Turns canonical rows into token ids for training on preferences: pairs, or single answers with a label."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features, List, Value

from conversations.answers.judging import is_pair
from conversations.rendering.ahead import encoded_ahead
from conversations.rendering.answer_fitting import Fit
from conversations.rendering.conversation import conversation_runs
from conversations.rendering.encoded import Columns, EncodedRows, encoded_dataset, key_of, labelled
from conversations.rendering.encoding import EncodedTexts, Run, encode_runs
from conversations.rendering.fitting import NOTHING_TRAINED, Encode, Piece
from conversations.rendering.lengths import LengthReport, TooLong
from conversations.row import PAIR, Row
from conversations.row_cache import RowCache
from deepseek_v2_modeling.inference import pad_batch
from deepseek_v2_modeling.training import IGNORED
from rl.config import RlRecipe
from rl.preferences.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IDS = List(Value("int32"))
_PAIRS = Features({f"{key}_{what}": _IDS for key in PAIR[1:] for what in ("ids", "labels")})
_SINGLE = Features({"input_ids": _IDS, "labels": _IDS, "label": Value("bool")})


class AnswerFit(Fit):
    """A `Fit` whose masks leave out the assistant's turns in the prompt."""

    def _whole(self, prompt: list[Row], answers: Sequence[list[Row]], known: EncodedTexts) -> list[Piece]:
        asked = conversation_runs(prompt, self.tokenizer, add_generation_prompt=True)
        start = len(encode_runs(asked, self.tokenizer, known)["input_ids"])
        return [(ids, [0] * start + mask[start:]) for ids, mask in super()._whole(prompt, answers, known)]

    def trained(self, row: Row, known: EncodedTexts, report: LengthReport) -> list[Piece]:
        """The row's answers with their prompt, counted in `report`; none if the row is left out."""
        pieces = self.answers(row, _answers_of(row), known, report)
        if not all(any(mask[1:]) for _, mask in pieces):
            report.reject(NOTHING_TRAINED, row)
            return []
        return pieces


def _answers_of(row: Row) -> Sequence[str]:
    return PAIR[1:] if is_pair(row) else ("completion",)


def _runs_of(row: Row, tokenizer: "PreTrainedTokenizerBase") -> list[Run]:
    """What is encoded of a row."""
    return [run for key in _answers_of(row) for run in conversation_runs([*row["prompt"], *row[key]], tokenizer)]


def encoder(recipe: RlRecipe, tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> Encode:
    """The encoding function for a row: a pair is one training sample, or two where answers are trained singly."""
    fit = AnswerFit(tokenizer, max_length, recipe.format.too_long)
    single = METHODS[recipe.method].single

    def encode(row: Row, report: LengthReport) -> list[list[Piece]]:
        pieces = fit.trained(row, {}, report)
        return [[piece] for piece in pieces] if single else [pieces] if pieces else []

    return encode


def encode_preferences(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    single: bool,
    max_length: int | None,
    too_long: TooLong,
    cache: RowCache | None = None,
) -> EncodedRows:
    """Encode rows for training.

    Args:
        single: each answer is a row of its own (columns input_ids, labels and label); else each pair is one (columns
            chosen_ids, chosen_labels, rejected_ids, rejected_labels). labels are IGNORED where nothing is trained.
        max_length, too_long: as of `Fit`.

    Raises:
        ToolkitError: no row is left.
    """
    fit = AnswerFit(tokenizer, max_length, too_long)

    def encoded(report: LengthReport) -> Iterator[Columns]:
        for batch in encoded_ahead(rows, partial(_runs_of, tokenizer=tokenizer), tokenizer):
            fitted = [(one.row, fit.trained(one.row, one.encoded, report)) for one in batch]
            kept = [(row, pieces) for row, pieces in fitted if pieces]
            yield _single_columns(kept) if single else _pair_columns([pieces for _, pieces in kept])

    settings = {"single": single, "max_length": max_length, "too_long": too_long}
    key = key_of(rows, tokenizer, stage="rl", **settings)
    count = len(rows) if isinstance(rows, Sequence) else None
    features = _SINGLE if single else _PAIRS
    return encoded_dataset(cache or RowCache(), key, features, encoded, rows=count, max_length=max_length)


def _pair_columns(pairs: list[list[Piece]]) -> Columns:
    columns = {}
    for place, key in enumerate(PAIR[1:]):
        ids, masks = ([pair[place][part] for pair in pairs] for part in (0, 1))
        found = labelled(ids, masks, IGNORED)
        columns |= {f"{key}_ids": found["input_ids"], f"{key}_labels": found["labels"]}
    return columns


def _single_columns(rows: list[tuple[Row, list[Piece]]]) -> Columns:
    pieces = [piece for _, found in rows for piece in found]
    verdicts = [verdict for row, _ in rows for verdict in ((True, False) if is_pair(row) else (bool(row["label"]),))]
    return {**labelled([ids for ids, _ in pieces], [mask for _, mask in pieces], IGNORED), "label": verdicts}


# --- batches ----------------------------------------------------------------------------------------------------------


Labelled = tuple[list[int], list[int]]  # ids, labels


def split(ids: list[int], labels: list[int]) -> tuple[Labelled, Labelled]:
    """The prompt, and the answer from its first trained token on."""
    start = next(place for place, label in enumerate(labels) if label != IGNORED)
    return (ids[:start], labels[:start]), (ids[start:], labels[start:])


def padded(rows: Sequence[tuple[Labelled, Labelled]], pad_token_id: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Prompts and answers -> {input_ids, attention_mask, completion_mask} [B, T]: prompts are padded on the left and
    answers on the right, so that all answers begin in the same column."""
    parts = []
    for place in (0, 1):
        ids, mask = pad_batch([row[place][0] for row in rows], pad_token_id, left=place == 0)
        labels, _ = pad_batch([row[place][1] for row in rows], IGNORED, left=place == 0)
        parts.append((ids, mask, (labels != IGNORED).long()))
    names = ("input_ids", "attention_mask", "completion_mask")
    return {
        f"{prefix}{name}": torch.cat(both, dim=1) for name, both in zip(names, zip(*parts, strict=True), strict=True)
    }


class PairCollator:
    """The batch of TRL's DPOTrainer: B chosen rows, then B rejected ones, and the reference's log-probabilities."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [split(pair[f"{key}_ids"], pair[f"{key}_labels"]) for key in PAIR[1:] for pair in pairs]
        return {**padded(rows, self.pad_token_id), **_numbers(pairs, "ref_chosen_logps", "ref_rejected_logps")}


class SingleCollator:
    """The batch of TRL's KTOTrainer: answers with their labels, and (KL_...) each prompt with an answer to another one
    in the batch (see `_shift`), cut to max_length, from which KTO estimates how far the policy is from the reference.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None):
        self.pad_token_id, self.max_length = pad_token_id, max_length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [split(example["input_ids"], example["labels"]) for example in examples]
        prompts, answers = zip(*rows, strict=True)
        shift = _shift([tuple(ids) for ids, _ in prompts])
        mismatched = [
            (prompt, self._fitting(prompt, answer))
            for prompt, answer in zip(prompts, answers[-shift:] + answers[:-shift], strict=True)
        ]
        return {
            **padded(rows, self.pad_token_id),
            **padded(mismatched, self.pad_token_id, "KL_"),
            "label": torch.tensor([example["label"] for example in examples]),
            **_numbers(examples, "ref_logps", "ref_KL_logps"),
        }

    def _fitting(self, prompt: Labelled, answer: Labelled) -> Labelled:
        room = None if self.max_length is None else max(0, self.max_length - len(prompt[0]))
        return answer[0][:room], answer[1][:room]


def _shift(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many rows before its own the answer is that each prompt is joined with: the fewest, at least 1, at which as
    many as possible answer other prompts. In pairs, the row before is often the other answer to the same prompt."""
    numbers = torch.tensor([prompts.index(prompt) for prompt in prompts])
    return min(range(1, len(prompts)), key=lambda shift: int((numbers.roll(shift) == numbers).sum()), default=1)


def _numbers(examples: list[dict[str, Any]], *names: str) -> dict[str, torch.Tensor]:
    """Columns of numbers, those that the examples have."""
    return {
        name: torch.tensor([row[name] for row in examples], dtype=torch.float64)
        for name in names
        if name in examples[0]
    }


def column_hash(data: Dataset) -> str:
    """A hash of all ids and labels, in their order."""
    digest = hashlib.sha256()
    batches: Any = data.with_format("numpy").iter(1000)
    for batch in batches:
        for name in sorted(data.column_names):
            for value in batch[name]:
                digest.update(value.tobytes() + b"|")
    return digest.hexdigest()
