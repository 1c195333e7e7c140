"""Log-probabilities of continuations: equal to a forward of each sequence alone, whatever prefixes are shared."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v2_modeling.inference import Continuation, continuation_likelihoods
from deepseek_v2_modeling.likelihoods import ROW_TOKENS
from deepseek_v2_modeling.prefix_trees import MIN_SHARED, common_prefix, pack_tree, tree_batches

from ..helpers.models import SMALL, logits_of, small_model


def alone(model, asked: Continuation) -> tuple[float, bool]:
    ids = torch.tensor([[*asked.context, *asked.continuation]])
    logps = logits_of(model, ids).double().log_softmax(-1)[0, len(asked.context) - 1 : -1]
    labels = torch.tensor(asked.continuation)
    return logps.gather(1, labels[:, None]).sum().item(), bool((logps.argmax(-1) == labels).all())


def of_each(model, asked, tokens: int = ROW_TOKENS):
    batches = continuation_likelihoods(model, asked, tokens)
    found = {i: one for batch, some in batches for i, one in zip(batch, some, strict=True)}
    return [found[i] for i in range(len(asked))]


def few_shot_choices(questions: int = 3, choices: int = 4) -> list[Continuation]:
    """Questions after the same examples, each with its choices of 1 to 4 tokens; two choices begin alike."""
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(2, SMALL["vocab_size"]) for _ in range(n)]

    examples = ids(2 * MIN_SHARED)
    asked = []
    for number in range(questions):
        context = [*examples, *ids(MIN_SHARED + 3 * number)]
        first = ids(3)
        asked += [Continuation(context, [*first[:2], *ids(1 + choice)]) for choice in range(choices - 1)]
        asked.append(Continuation(context, ids(1)))
    asked += [asked[0], Continuation([0], ids(5)), Continuation(examples, ids(2)), Continuation(examples[:5], ids(2))]
    return asked


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [ROW_TOKENS, 90])
def test_as_each_alone(attention, tokens):
    model = small_model()
    model.config._attn_implementation = attention
    asked = few_shot_choices()
    for one, sequence in zip(of_each(model, asked, tokens), asked, strict=True):
        logp, greedy = alone(model, sequence)
        assert one.logp == pytest.approx(logp, abs=2e-5) and one.is_greedy == greedy


def test_the_greedy_continuation_is_greedy():
    model = small_model()
    context = [5, 9, 3]
    best = logits_of(model, torch.tensor([context]))[0, -1].argmax().item()
    found = of_each(model, [Continuation(context, [best]), Continuation(context, [(best + 1) % 61])])
    assert [one.is_greedy for one in found] == [True, False]


def test_shared_prefixes_are_read_once():
    """Examples, each question and the choices' common beginning."""
    asked = few_shot_choices()
    read = [(*a.context, *a.continuation[:-1]) for a in asked]
    tree = pack_tree(read)
    assert len(tree.ids) < 0.3 * sum(map(len, read))
    assert tree.prefixes.count(-1) == 3  # the examples, and two sequences that share too little with them


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=12), st.integers(1, 80))
@settings(max_examples=100, deadline=None)
def test_a_tree_holds_every_sequence(sequences, tokens):
    sequences = [(*[1] * (len(ids) % 3 * MIN_SHARED), *ids) for ids in sequences]
    tree = pack_tree(sequences)
    for number, ids in enumerate(sequences):
        places = tree.places(number, range(len(ids)))
        assert [tree.ids[place] for place in places] == list(ids)
        assert [tree.positions[place] for place in places] == list(range(len(ids)))
    assert all(prefix < number for number, prefix in enumerate(tree.prefixes))
    assert len(tree.ids) <= sum(map(len, set(sequences)))
    batches = list(tree_batches(sequences, tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(sequences)))
    for batch in batches:
        size = len(pack_tree([sequences[i] for i in batch]).ids)
        assert len(batch) == 1 or size <= tokens + MIN_SHARED * len(batch)


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_prefixes(first, second):
    wanted = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    assert common_prefix(first, second) == wanted
