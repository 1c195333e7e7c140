"""Which pairs of a prompt's answers are kept: properties."""

from hypothesis import given
from hypothesis import strategies as st

from pairs.choosing import Judged, LeftOut, balanced, best_of, distinct, pairs_of

TEXTS = st.text("ab", max_size=6)
REWARDS = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def groups(draw: st.DrawFn) -> list[Judged]:
    drawn = draw(st.lists(st.tuples(TEXTS, REWARDS), max_size=7))
    return [Judged(0, number, text, reward, reward == 1) for number, (text, reward) in enumerate(drawn)]


@given(groups(), st.integers(1, 5), st.sampled_from([0.0, 0.25, 0.6]), st.integers())
def test_pairs_are_of_a_better_and_a_worse_answer(group: list[Judged], most: int, min_margin: float, seed: int):
    answers, left_out = distinct(group), LeftOut()
    pairs = pairs_of(answers, most=most, min_margin=min_margin, seed=seed, left_out=left_out)
    assert len({judged.text for judged in answers}) == len(answers)
    assert {judged.text for judged in answers} == {judged.text for judged in group}
    assert all(pair.margin > 0 and pair.margin >= min_margin for pair in pairs)
    assert all(pair.chosen.text != pair.rejected.text for pair in pairs)
    assert len({(pair.chosen.answer, pair.rejected.answer) for pair in pairs}) == len(pairs) <= most
    better = [(a, b) for a in answers for b in answers if a.reward > b.reward]
    assert len(pairs) == min(most, sum(a.reward - b.reward >= min_margin for a, b in better))
    assert len(pairs) + left_out.min_margin + left_out.max_pairs_per_prompt == len(better)
    again = pairs_of(answers, most=most, min_margin=min_margin, seed=seed, left_out=LeftOut())
    assert again == pairs


@given(st.lists(groups(), max_size=6))
def test_balanced_pairs_have_as_many_longer_as_shorter_answers(all_groups: list[list[Judged]]):
    left_out = LeftOut()
    pairs = [
        pair
        for number, group in enumerate(all_groups)
        for pair in pairs_of(distinct(group), most=9, min_margin=0, seed=number, left_out=LeftOut())
    ]
    kept = balanced(pairs, left_out)
    longer, shorter = (sum(pair.longer * sign > 0 for pair in kept) for sign in (1, -1))
    assert longer == shorter == min(sum(pair.longer * sign > 0 for pair in pairs) for sign in (1, -1))
    assert sum(pair.longer == 0 for pair in kept) == sum(pair.longer == 0 for pair in pairs)
    assert len(kept) + left_out.balance_lengths == len(pairs)


def test_answers_that_differ_least_in_length_stay():
    sizes = [("aaaa", "a"), ("aa", "a"), ("a", "aa")]
    pairs = [
        pairs_of([Judged(row, 0, good, 1), Judged(row, 1, bad, 0)], most=1, min_margin=0, seed=0, left_out=LeftOut())[0]
        for row, (good, bad) in enumerate(sizes)
    ]
    assert [pair.chosen.row for pair in balanced(pairs, LeftOut())] == [1, 2]


def test_every_answer_is_in_a_pair_before_one_is_in_two():
    answers = [Judged(0, 0, "a", 1), Judged(0, 1, "b", 1), Judged(0, 2, "c", 0), Judged(0, 3, "d", 0)]
    pairs = pairs_of(answers, most=2, min_margin=0, seed=1, left_out=LeftOut())
    assert {judged.answer for pair in pairs for judged in (pair.chosen, pair.rejected)} == {0, 1, 2, 3}


def test_chosen_and_rejected_answers_count_alike():
    """With a > b > c and a pair of a and b, c is then paired with either of them."""
    answers = [Judged(0, 0, "a", 1), Judged(0, 1, "b", 0.5), Judged(0, 2, "c", 0)]
    drawn = [pairs_of(answers, most=2, min_margin=0, seed=seed, left_out=LeftOut()) for seed in range(40)]
    named = [tuple(pair.chosen.text + pair.rejected.text for pair in pairs) for pairs in drawn]
    assert {second for first, second in named if first == "ab"} == {"ac", "bc"}


def test_the_best_answer_is_right_where_that_is_known():
    wrong = [Judged(0, 0, "a", 0.5, False), Judged(0, 1, "b", 0.9, False)]
    assert best_of(wrong) is None
    assert best_of([*wrong, Judged(0, 2, "c", 0.7, True), Judged(0, 3, "d", 0.7, True)]) == Judged(0, 2, "c", 0.7, True)
    assert best_of([Judged(0, 0, "a", 0.5), Judged(0, 1, "b", 0.9)]) == Judged(0, 1, "b", 0.9)
    assert best_of([]) is None
