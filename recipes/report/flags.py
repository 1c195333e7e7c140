"""What to look at first among answers: the warnings that a sample's own record gives rise to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recipes.results.words import number

Sample = Mapping[str, Any]
Samples = Sequence[Sample | None]  # of one prompt, by column


def _is_empty(samples: Samples) -> bool:
    completion = _last(samples).get("completion")
    return isinstance(completion, str) and not completion.strip()


def _is_unread(samples: Samples) -> bool:
    last = _last(samples)
    return "read" in last and last["read"] is None


def _got_worse(samples: Samples) -> bool:
    values = [value for sample in samples if sample and (value := number(sample.get("value"))) is not None]
    return len(values) > 1 and values[-1] < max(values[:-1])


# By label, in the order in which they are shown.
WARNINGS: Mapping[str, Callable[[Samples], bool]] = {
    "cut off": lambda samples: _last(samples).get("truncated") is True,
    "no answer found in it": _is_unread,
    "empty": _is_empty,
    "worse than in an earlier column": _got_worse,
}


def warnings_of(samples: Samples) -> list[str]:
    """Warnings about the last of the answers to one prompt, by itself and beside the earlier ones."""
    return [label for label, holds in WARNINGS.items() if holds(samples)] if any(samples) else []


def _last(samples: Samples) -> Sample:
    return next((sample for sample in reversed(samples) if sample), {})
