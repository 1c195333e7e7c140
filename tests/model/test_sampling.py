"""Tokens sampled by one uniform random number a row: the softmax's distribution, and nothing outside of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v2_modeling.sampling import BLOCK, choose_tokens, draws, tokens_at

LAST = 1 - 2**-53  # the largest number that torch.rand gives


@pytest.mark.parametrize("words", [40, 700])
def test_a_million_draws_follow_the_softmax(words: int):
    """Chi-square over all tokens that are expected five times and more; the others are one cell."""
    logits = torch.randn(1, words, generator=torch.Generator().manual_seed(words)) * 2
    count, rows = torch.zeros(words), 20_000
    numbers = draws([0], 1_000_000)[0]
    probabilities = (logits / 1.3).softmax(-1)
    for part in numbers.split(rows):
        count += tokens_at(probabilities.expand(rows, -1), part).bincount(minlength=words)
    expected = probabilities[0].double() * len(numbers)
    rare = expected < 5
    cells = [torch.cat((value[~rare].double(), value[rare].double().sum()[None])) for value in (count, expected)]
    statistic = ((cells[0] - cells[1]).square() / cells[1].clamp(min=1e-9)).sum()
    freedom = len(cells[0]) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


@given(
    words=st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7]),
    kept=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    drawn=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, LAST, 1.0])),
    tiny=st.sampled_from([0.0, -40.0, -100.0]),
)
def test_a_token_without_probability_is_never_sampled(words: int, kept: int, seed: int, drawn: float, tiny: float):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((1, words), -torch.inf)
    places = torch.randperm(words, generator=generator)[:kept]
    logits[0, places] = torch.randn(len(places), generator=generator)
    logits[0, places[0]] += tiny
    token = choose_tokens(logits, 1.0, torch.tensor([drawn], dtype=torch.float64))
    assert logits.softmax(-1)[0, token] > 0


@given(
    words=st.integers(1, 3 * BLOCK + 7), rows=st.integers(1, 4), seed=st.integers(0, 10_000), scale=st.floats(0.1, 8)
)
def test_it_is_the_inverse_of_the_distribution(words: int, rows: int, seed: int, scale: float):
    """The running sum before the token is at most the number drawn, and with it more, up to rounding."""
    logits = torch.randn(rows, words, generator=torch.Generator().manual_seed(seed)) * scale
    drawn = draws([seed], rows)[0]
    tokens = choose_tokens(logits, 1.0, drawn)
    reached = logits.softmax(-1).double().cumsum(-1)
    reached = torch.cat((reached.new_zeros(rows, 1), reached / reached[:, -1:]), dim=-1)
    before, after = reached.gather(1, tokens[:, None])[:, 0], reached.gather(1, tokens[:, None] + 1)[:, 0]
    assert (before <= drawn + 1e-6).all() and (drawn <= after + 1e-6).all()


def test_numbers_of_a_row_are_its_own():
    alone = torch.cat([draws([seed], 9) for seed in (5, 6)])
    assert torch.equal(draws([5, 6], 9), alone) and torch.equal(draws([6, 5], 9), alone.flip(0))
    assert torch.equal(draws([5], 4)[0], alone[0, :4]) and not torch.equal(alone[0], alone[1])


def test_temperature_divides_in_float32():
    logits = torch.tensor([[100.0, 101.0]], dtype=torch.bfloat16)
    share = choose_tokens(logits.expand(20_000, 2), 3.0, draws([0], 20_000)[0]).double().mean()
    assert share.item() == pytest.approx(torch.tensor([100 / 3, 101 / 3]).softmax(0)[1].item(), abs=0.01)
    assert choose_tokens(logits, 0.0).tolist() == [1]
