"""Token counts of a mixture for `dsv2 check`: needs no weights, and memory does not grow with the number of rows."""

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from conversations.rendering.fitting import Encode, Row
from conversations.rendering.lengths import LengthReport
from conversations.sections import TrainingRecipe
from recipes.data.row_store import MixedRows
from recipes.stages import stage_of, training_of

EXAMPLES = 3
EXAMPLE_TOKENS = 1500
_BUDGET = 8 << 20  # bytes of rows to tokenize, a few seconds' work; larger data is sampled
_PACKED_AT_ONCE = 1000  # rows that TRL packs at a time (the batch size of datasets.map)


@dataclass(frozen=True)
class Example:
    """A row as the model sees it: spans of text, each with whether it is trained on; `more` tokens are not shown.

    part_of: token count of the whole row if this is only a part of it; 0 otherwise.
    """

    origin: str
    runs: list[tuple[str, bool]]
    more: int = 0
    part_of: int = 0

    @property
    def title(self) -> str:
        return f"{self.origin}, part of {self.part_of:,} tokens" if self.part_of else self.origin


@dataclass
class Figures:
    """Token counts of a mixture. If `step` is over 1, only every step-th row was measured, and the totals are `scale`
    times the measured counts.

    pieces: token count of each measured piece that is trained on. samples: how many samples they make up.
    by_source: source -> its measured tokens, and how many of them are trained on.
    """

    step: int
    scale: float
    report: LengthReport = field(default_factory=LengthReport)
    pieces: list[int] = field(default_factory=list)
    samples: int = 0
    by_source: dict[int, list[int]] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in one epoch."""
        return round(sum(self.pieces) * self.scale)

    def tokens_of(self, source: int) -> tuple[int, int]:
        """(tokens, trained tokens) of a source's rows in one epoch."""
        tokens, trained = self.by_source.get(source, (0, 0))
        return round(tokens * self.scale), round(trained * self.scale)

    def fate(self, too_long: str, max_length: int | None) -> str:
        """What `format.too_long` does to the measured rows."""
        summary = self.report.summary(max_length)
        unchanged = "" if ";" in summary else ", none too long"
        return f"{'of the sample: ' if self.step > 1 else ''}{summary}{unchanged}; format.too_long is {too_long}"

    @property
    def sampling(self) -> str:
        """How the counts were estimated; empty if all rows were measured."""
        return f"many rows: token counts are estimates from 1 row in {self.step:,}" if self.step > 1 else ""

    @property
    def about(self) -> str:
        """Prefix of an estimated count."""
        return "about " if self.sampling else ""


def measure(rows: MixedRows, encode: Encode, tokenizer: Any, limit: int | None = None) -> Figures:
    """Tokenize the rows (the first `limit` of them), or an even sample if there are too many for a quick answer.

    Raises:
        ToolkitError: a row that the stage cannot render.
    """
    total = len(rows) if limit is None else min(limit, len(rows))
    step = max(1, math.ceil(total * rows.mean_bytes / _BUDGET))
    numbers = range(0, total, step)
    figures = Figures(step, total / len(numbers))
    examples: dict[int, list[Example]] = {}
    for index in numbers:
        row, source = rows[index], rows.source_of(index)
        samples = encode(row, figures.report)
        figures.samples += len(samples)
        pieces = [piece for sample in samples for piece in sample]
        of_source = figures.by_source.setdefault(source, [0, 0])
        for ids, mask in pieces:
            figures.pieces.append(len(ids))
            of_source[0] += len(ids)
            of_source[1] += sum(mask)
        examples_of_source = examples.setdefault(source, [])
        for piece in pieces[: EXAMPLES - len(examples_of_source)]:
            full_length = figures.report.lengths[-1]
            is_part = full_length > max(len(ids) for ids, _ in pieces)
            examples_of_source.append(_example(row, *piece, tokenizer, full_length if is_part else 0))
    in_turn = chain.from_iterable(zip_longest(*examples.values()))  # alternate between sources, so that each is shown
    figures.examples = [example for example in in_turn if example][:EXAMPLES]
    return figures


def _example(row: Row, ids: Sequence[int], mask: Sequence[int], tokenizer: Any, part_of: int) -> Example:
    runs: list[tuple[str, bool]] = []
    start, end = 0, min(len(ids), EXAMPLE_TOKENS)
    for position in range(1, end + 1):
        if position == end or mask[position] != mask[start]:
            text = tokenizer.decode(ids[start:position], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            runs.append((text, bool(mask[start])))
            start = position
    return Example(row.get("origin", ""), runs, len(ids) - end, part_of)


def packs(lengths: Sequence[int], capacity: int) -> int:
    """Number of packs of `capacity` tokens after best-fit-decreasing packing, as in TRL, 1,000 rows at a time."""
    return sum(
        _best_fit(lengths[start : start + _PACKED_AT_ONCE], capacity)
        for start in range(0, len(lengths), _PACKED_AT_ONCE)
    )


def _best_fit(lengths: Sequence[int], capacity: int) -> int:
    """Best fit: each row goes to the pack with the least free space that still holds it."""
    rooms: Counter[int] = Counter()
    sizes: list[int] = []  # the distinct amounts of free space, ascending
    opened = 0
    for length in sorted(lengths, reverse=True):
        at = bisect_left(sizes, length)
        if at < len(sizes):
            room = sizes[at]
            rooms[room] -= 1
            if not rooms[room]:
                del sizes[at]
        else:
            opened += 1
            room = capacity
        free = room - length
        if free and not rooms[free]:
            insort(sizes, free)
        rooms[free] += 1
    return opened


@dataclass(frozen=True)
class Plan:
    """The length of a run. samples: training samples per epoch; passes: number of epochs, possibly fractional."""

    steps: int
    steps_per_epoch: int
    batch: int
    passes: float
    packs: int | None = None
    fill: float | None = None


def plan(recipe: TrainingRecipe, rows: int, figures: Figures | None) -> Plan:
    """Number of updates of a training run; an estimate if rows were sampled, or packed but not measured.

    Raises:
        ModelError: the rows do not fill a single batch.
    """
    from deepseek_v2_modeling.training import check_batches
    from recipes.processes import world_size
    from recipes.runs.training_fields import setting, trl_config

    def of(name: str) -> Any:
        return setting(recipe, name)

    batch = of("per_device_train_batch_size") * of("gradient_accumulation_steps") * world_size()
    samples, packed = float(rows), None
    if stage_of(recipe).encode and figures:
        samples = figures.samples * figures.scale
        if of("packing") and of("max_length"):
            samples = packed = round(packs(figures.pieces, of("max_length")) * figures.scale)
    samples *= math.prod(map(of, training_of(recipe).row_uses))
    check_batches(trl_config(recipe), round(samples))
    per_epoch = max(1, math.ceil(samples / batch))
    steps = of("max_steps")
    if steps is None or steps <= 0:
        steps = math.ceil(per_epoch * of("num_train_epochs"))
    fill = figures.tokens / (packed * of("max_length")) if figures and packed else None
    return Plan(steps, per_epoch, batch, steps / per_epoch, packed, fill)
