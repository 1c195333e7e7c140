"""Flags in a file that say whether a turn or a row is trained: masks of 0 or 1 under various names.

Masks and weights of 0 and 1 (also true and false, and any of these as text) are honoured: a turn with 0 is not trained;
one with 1 is trained if format.train_on selects it. Names such as `masked` mean the opposite. Anything else, such as a
weight of 0.5 or character spans, raises BadRow with its name.
"""

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from conversations.formats.bad_row import BadRow, by_spelling, from_json, known_name, quoted

REVERSED = ("masked", "no_loss", "ignore_loss")  # 1 means not trained
FLAGS = (
    "train", "training", "trainable", "trained", "loss", "loss_mask", "mask", "loss_scale", "loss_weight", "weight",
    "output_with_loss",
)  # fmt: skip
SPANS = "train_detail"
ROW_FLAGS = (
    *FLAGS, *REVERSED, "loss_masks", "loss_weights", "train_mask", "assistant_mask", "assistant_masks",
    "completion_mask", "sample_weight", "example_weight", SPANS,
)  # fmt: skip
_ROW_NAMES = by_spelling(ROW_FLAGS)
# Words about training in an unknown key; and the position where a new word begins, as in lossMask.
_ABOUT_TRAINING = re.compile(
    r"(?:^|[_\W])(?:un)?(?:train|trained|training|trainable|loss|mask|masks|masked)(?:[_\W]|$)"
)
_NEW_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_VALUES = {"1": True, "true": True, "1.0": True, "0": False, "false": False, "0.0": False}


def is_absent(value: Any) -> bool:
    """Whether the value is null or a table's equivalent: an empty string, NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def turn_flag(
    values: Mapping[str, Any], label: str, names: tuple[str, ...] = (*FLAGS, *REVERSED)
) -> tuple[str, bool] | None:
    """The name and value of a turn's own flag; None if it has none."""
    if not values:
        return None
    if values.get(SPANS):
        raise BadRow(
            f"{label} has {SPANS}: spans of characters cannot be honoured, only whole turns (train: true or false)"
        )
    flags = {name: _flag(values[name], name, label) for name in names if not is_absent(values.get(name))}
    for name, value in values.items():
        if speaks_of_training(name) and name not in (*names, SPANS) and not is_absent(value):
            raise BadRow(
                f"{label} has {name} {quoted(value)}, a flag that is not supported; write train: true or false"
            )
    if len(set(flags.values())) > 1:
        contradicting = " and ".join(f"{name} {values[name]!r}" for name in flags)
        raise BadRow(f"{label} has {contradicting}, which contradict each other")
    return next(iter(flags.items()), None)


def row_flags(columns: Mapping[str, Any], turns: int | None) -> list[tuple[str, bool]] | None:
    """The name and value of a flag for each turn, from the row's own columns; None if no column sets one.

    A single value for the whole row sets a flag only if it is false; it then applies to every turn. turns: the number
    of turns in the file, if they are one list.
    """
    named_flags = [key for key in columns if is_row_flag(key)]
    present = {key: columns[key] for key in named_flags if not is_absent(columns[key])}
    by_name = {name: _of_turns(name, value, turns) for name, value in present.items()}
    by_name = {name: flags for name, flags in by_name.items() if flags is not None}
    if any(flags != next(iter(by_name.values())) for flags in by_name.values()):
        raise BadRow(f"{' and '.join(present)} contradict one another")
    return [(name, flag) for name, flags in list(by_name.items())[:1] for flag in flags] or None


def is_row_flag(key: Any) -> bool:
    """Whether a row's column is one of ROW_FLAGS, however it is spelled."""
    return known_name(key, _ROW_NAMES) in ROW_FLAGS


def _of_turns(name: str, value: Any, turns: int | None) -> list[bool] | None:
    canonical = known_name(name, _ROW_NAMES)
    if canonical == "mask" and str(value).lower() == "user":  # NeMo: the role that is masked out of the loss
        return None
    if canonical == SPANS:
        raise BadRow(f"the row has {name}: spans of characters cannot be honoured")
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a CSV file
        value = from_json(value, otherwise=value)
    if not isinstance(value, list):
        return None if _flag(value, name, "the row") else [False] * (turns or 1)
    if turns is None:
        raise BadRow(f"{name} is a list, but the row has no list of turns for it to belong to")
    if len(value) != turns:
        raise BadRow(f"{name} has {len(value)} entries for {turns} turns; it needs one for each turn")
    return [_flag(flag, f"{name}[{index}]", "the row") for index, flag in enumerate(value)]


def _flag(value: Any, name: str, label: str) -> bool:
    flag = _VALUES.get(str(value).strip().lower()) if isinstance(value, (bool, int, float, str)) else None
    if flag is None:
        remedy = f"; if it means something else, map it: columns: {{other: {name}}}" if label == "the row" else ""
        raise BadRow(
            f"{label} has {name} {quoted(value)}, which cannot be honoured: a turn is trained or not (1 or 0){remedy}"
        )
    return flag != (known_name(name.split("[")[0], _ROW_NAMES) in REVERSED)


def refuse_flags(values: Mapping[str, Any], label: str) -> None:
    """Raises BadRow for a flag on part of a turn."""
    for name, value in values.items():
        if (speaks_of_training(name) or name in FLAGS or name == SPANS) and not is_absent(value):
            raise BadRow(f"{label} has {name}, which cannot be honoured: a turn is trained or not, as a whole")


@lru_cache(maxsize=4096)
def speaks_of_training(name: str) -> bool:
    """Whether a key's name contains a word about training."""
    return bool(_ABOUT_TRAINING.search(_NEW_WORD.sub("_", str(name)).lower()))
