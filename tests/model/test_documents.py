"""Documents by whatever name a collator gives them, and a cache that holds one sequence per row."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from deepseek_v2_modeling import LatentCache, ModelError, collect_balance
from deepseek_v2_modeling.packing.boundaries import documents_of, documents_with_cache

from ..helpers.models import left_padded, logits_of, random_ids, small_model

CLOSE = {"rtol": 0, "atol": 1e-5}
LENGTHS = [5, 1, 6]
CU = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
INDEX = torch.tensor([[0] * 5 + [1] + [2] * 6], dtype=torch.int32)
RESTARTING = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)


def cache_of(model: Any, ids: torch.Tensor, **kwargs: Any) -> LatentCache:
    cache = LatentCache(model.config)
    logits_of(model, ids, past_key_values=cache, **kwargs)
    return cache


# Boundaries


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "given",
    [{"cu_seq_lens": CU}, {"cu_seq_lens_q": CU}, {"seq_idx": INDEX}, {"seq_idx": INDEX, "cu_seq_lens_k": CU}],
    ids=lambda given: "+".join(given),
)
@pytest.mark.parametrize("positions", [None, torch.arange(12).unsqueeze(0), RESTARTING], ids=["none", "on", "restart"])
def test_boundaries_alone_keep_documents_apart(given: dict[str, Any], positions: torch.Tensor | None, attention: str):
    model, ids = small_model(attn_implementation=attention), random_ids(1, 12)
    alone = torch.cat([logits_of(model, part) for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(logits_of(model, ids, position_ids=positions, **given), alone, rtol=0, atol=2e-5)


def test_padding_beside_numbered_documents():
    index, mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0], [1] * 5])
    found = documents_of(None, mask, {"seq_idx": index}, (2, 5))
    assert found is not None and found.tolist() == [[0, 0, 1, 1, 2], [0] * 5]
    assert documents_of(None, None, {"seq_idx": torch.zeros(2, 5)}, (2, 5)) is None


def test_numbered_documents_are_sequences_of_the_balance_losses():
    model, ids = small_model().train(), random_ids(1, 12)
    losses = []
    for given in ({"seq_idx": INDEX}, {"position_ids": RESTARTING}, {}):
        with collect_balance(model) as ledger:
            model(ids, **given)
        losses.append(ledger.losses[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] != pytest.approx(losses[2], rel=1e-2)


# On a cache


RESTARTS: dict[str, dict[str, Any]] = {
    "a position of 0": {"position_ids": torch.arange(4).unsqueeze(0)},
    "in the middle": {"position_ids": torch.tensor([[6, 7, 0, 1]])},
    "in the middle, not from 0": {"position_ids": torch.tensor([[6, 7, 3, 4]])},
    "under a mask of ones": {"position_ids": torch.arange(4).unsqueeze(0), "attention_mask": torch.ones(2, 10)},
    "in one row": {"position_ids": torch.tensor([[6, 7, 8, 9], [0, 1, 2, 3]]), "attention_mask": torch.ones(2, 10)},
    "by cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32)},
    "by seq_idx": {"seq_idx": torch.tensor([[0, 0, 1, 1]])},
}


@pytest.mark.parametrize("kind", [LatentCache, DynamicCache])
@pytest.mark.parametrize("name", RESTARTS)
def test_a_document_that_starts_on_a_filled_cache(name: str, kind: Any):
    """It would see the tokens of the one before."""
    model, ids = small_model(), random_ids(2, 10)
    cache = kind(config=model.config)
    logits_of(model, ids[:, :6], past_key_values=cache)
    with pytest.raises(ModelError, match="one sequence per row"):
        logits_of(model, ids[:, 6:], past_key_values=cache, **RESTARTS[name])
    assert cache.get_seq_length() == 6  # refused before anything was stored
    torch.testing.assert_close(
        logits_of(model, ids[:, 6:], past_key_values=cache), logits_of(model, ids)[:, 6:], **CLOSE
    )


@pytest.mark.parametrize("given", [{"position_ids": RESTARTING}, {"cu_seq_lens": CU}, {"seq_idx": INDEX}])
@pytest.mark.parametrize("tokens", [1, 3])
def test_nothing_follows_on_packed_documents(given: dict[str, Any], tokens: int):
    model = small_model()
    cache = cache_of(model, random_ids(1, 12), **given)
    after = torch.arange(6, 6 + tokens).unsqueeze(0)
    with pytest.raises(ModelError, match="packed"):
        logits_of(model, random_ids(1, tokens), past_key_values=cache, position_ids=after)
    made = model(random_ids(1, 12), use_cache=True, **given).past_key_values
    with pytest.raises(ModelError, match="packed"):
        logits_of(model, random_ids(1, tokens), past_key_values=made)


@pytest.mark.parametrize("empty", [lambda cache: cache.reset(), lambda cache: cache.crop(-12)])
def test_an_emptied_cache_is_new(empty: Any):
    model, ids = small_model(), random_ids(1, 8)
    cache = cache_of(model, random_ids(1, 12), position_ids=RESTARTING)
    empty(cache)
    logits_of(model, ids[:, :5], past_key_values=cache, position_ids=torch.arange(5).unsqueeze(0))
    found = logits_of(model, ids[:, 5:], past_key_values=cache, position_ids=torch.arange(5, 8).unsqueeze(0))
    torch.testing.assert_close(found, logits_of(model, ids)[:, 5:], **CLOSE)


def test_one_document_a_row_is_no_pack():
    model, ids = small_model(), random_ids(2, 6)
    cache = cache_of(model, ids[:, :4], cu_seq_lens_q=torch.tensor([0, 4, 8], dtype=torch.int32))
    torch.testing.assert_close(
        logits_of(model, ids[:, 4:], past_key_values=cache), logits_of(model, ids)[:, 4:], **CLOSE
    )


def test_a_row_whose_cached_tokens_are_padding_may_begin():
    """In a chunk of its own, or within one, or behind chunks of nothing else."""
    model, (ids, mask, positions) = small_model(), left_padded(random_ids(4, 9), [0, 3, 4, 8])
    cache, outs = LatentCache(model.config), []
    for begin, end in ((0, 3), (3, 6), (6, 9)):
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        outs.append(logits_of(model, ids[:, begin:end], past_key_values=cache, **given))
    found = torch.cat(outs, dim=1)
    for row, pads in enumerate([0, 3, 4, 8]):
        torch.testing.assert_close(found[row, pads:], logits_of(model, ids[row : row + 1, pads:])[0], **CLOSE)


def test_a_mask_in_four_dimensions_tells_on_its_own():
    model, ids = small_model(attn_implementation="eager"), random_ids(1, 8)
    cache = cache_of(model, ids[:, :4])
    allowed = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    allowed[..., 4:] = torch.ones(4, 4).tril().bool()
    given = {"attention_mask": allowed, "position_ids": torch.arange(4).unsqueeze(0)}
    found = logits_of(model, ids[:, 4:], past_key_values=cache, **given)
    torch.testing.assert_close(found, logits_of(model, ids[:, 4:]), **CLOSE)


class Unread(torch.Tensor):
    """Positions that nobody may look at: on a GPU each look waits for it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was asked of the positions")


def test_a_single_token_is_not_looked_at():
    model = small_model()
    cache = cache_of(model, random_ids(2, 4))
    unread = torch.zeros(2, 1).as_subclass(Unread)
    assert documents_with_cache(cache, unread, torch.ones(2, 5), {}, (2, 1)) is None
