"""Intervals of means of scores from 0 to 1: they hold the mean, and cover the truth as often as they say."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations.answers.intervals import bootstrap_interval, mean_interval, wilson

SHARES = st.floats(0, 1)


def half_right(rng: Any, n: int) -> tuple[list[float], list[int]]:
    """Scores of partial credit, one to a prompt, with the mean 0.6."""
    return rng.beta(3, 2, n).tolist(), list(range(n))


def right_or_wrong(rng: Any, n: int) -> tuple[list[float], list[int]]:
    return (rng.random(n) < 0.6).astype(float).tolist(), list(range(n))


def several_answers(rng: Any, n: int) -> tuple[list[float], list[int]]:
    """Eight answers to each prompt, of which some prompts are easy and some hard."""
    easy = np.repeat(rng.beta(0.6, 0.4, n), 8)
    return (rng.random(8 * n) < easy).astype(float).tolist(), np.repeat(np.arange(n), 8).tolist()


@pytest.mark.parametrize("drawn", [half_right, right_or_wrong, several_answers])
def test_nineteen_of_twenty_intervals_hold_the_mean(drawn: Any) -> None:
    rng = np.random.default_rng(0)
    found = [mean_interval(*drawn(rng, 60)) for _ in range(1500)]
    assert 0.935 <= np.mean([low <= 0.6 <= high for low, high in found]) <= 0.97


def test_of_shares_it_is_wilsons() -> None:
    assert mean_interval([1.0] * 7 + [0.0] * 3) == pytest.approx(wilson(0.7, 10))
    assert mean_interval([1.0] * 10) == pytest.approx(wilson(1, 10))
    assert mean_interval([1.0] * 10, [0] * 5 + [1] * 5) == pytest.approx(wilson(1, 2))


def test_scores_between_say_more_than_a_share_and_the_same_prompt_again_says_less() -> None:
    def width(*args: Any) -> float:
        low, high = mean_interval(*args)
        return high - low

    shares, scores = [1.0] * 5 + [0.0] * 5, [0.6] * 5 + [0.4] * 5
    assert width(scores) < width(shares) / 2
    assert width(shares * 4, list(range(10)) * 4) == pytest.approx(width(shares), rel=0.05)


@given(st.lists(st.tuples(SHARES, st.integers(0, 5)), min_size=1, max_size=40))
def test_the_mean_is_in_its_interval_and_that_within_0_and_1(listed: list[tuple[float, int]]) -> None:
    values, prompts = (list(column) for column in zip(*listed, strict=True))
    low, high = mean_interval(values, prompts)
    assert 0 <= low <= np.mean(values) + 1e-9 and np.mean(values) - 1e-9 <= high <= 1


def test_a_bootstrap_draws_whole_prompts() -> None:
    values, prompts = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), [*"aaabbb"]

    def mean(weights: Any) -> float:
        return float((weights * values).sum() / weights.sum())

    assert bootstrap_interval(mean, prompts) == (0, 1)
    low, high = bootstrap_interval(mean, range(6))
    assert 0 < low < 0.5 < high < 1
