"""Packed documents: found by their positions, and attended to one by one."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v2_modeling.layers.attention_plan import AttentionPlan
from deepseek_v2_modeling.packing.layouts import find_documents, flat_layout, pack_layout

from ..helpers.models import left_padded, logits_of, random_ids, small_model


def positions_of(rows: list[list[int]]) -> torch.Tensor:
    """Position ids of rows of documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def alone(model: Any, ids: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """Logits of each document by itself, put together again."""
    return torch.stack(
        [
            torch.cat([logits_of(model, part.unsqueeze(0))[0] for part in row.split(lengths)])
            for row, lengths in zip(ids, rows, strict=True)
        ]
    )


WAYS: dict[str, dict[str, Any]] = {
    "no mask": {"use_cache": False},
    "a mask of ones": {"attention_mask": torch.ones(2, 12, dtype=torch.int64), "use_cache": False},
    "a cache": {"use_cache": True},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("way", WAYS)
def test_documents_do_not_see_each_other(way: str, attention: str):
    rows = [[5, 7], [1, 3, 3, 5]]
    model, ids = small_model(attn_implementation=attention), random_ids(2, 12)
    found = logits_of(model, ids, position_ids=positions_of(rows), **WAYS[way])
    torch.testing.assert_close(found, alone(model, ids, rows), rtol=0, atol=1e-5)
    assert not torch.allclose(found, logits_of(model, ids), atol=1e-2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_boundaries_by_cu_seq_lens(attention: str):
    """One flat row, as a collator without padding makes it."""
    model, ids = small_model(attn_implementation=attention), random_ids(1, 12)
    cu = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    found = logits_of(model, ids, position_ids=positions_of([[5, 1, 6]]), cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    torch.testing.assert_close(found, alone(model, ids, [[5, 1, 6]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients(attention: str):
    rows, grads = [[5, 7], [1, 3, 3, 5]], []
    ids = random_ids(2, 12)
    for packed in (True, False):
        model = small_model(attn_implementation=attention)
        if packed:
            model(ids, position_ids=positions_of(rows)).logits.square().sum().backward()
        else:
            for row, lengths in zip(ids, rows, strict=True):
                for part in row.split(lengths):
                    model(part.unsqueeze(0)).logits.square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-3 * grads[1][name].abs().max(), msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_is_no_pack(attention: str):
    """Its positions (0, 0, 0, 1, 2) restart too."""
    model = small_model(attn_implementation=attention)
    ids, mask, positions = left_padded(random_ids(2, 9), [0, 3])
    assert find_documents(positions, mask, None, (2, 9)) is None
    found = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    for row, pads in ((0, 0), (1, 3)):
        wanted = logits_of(model, ids[row : row + 1, pads:])
        torch.testing.assert_close(found[row : row + 1, pads:], wanted, rtol=0, atol=1e-5)


def test_nothing_to_find():
    assert find_documents(None, None, None, (2, 5)) is None
    assert find_documents(torch.arange(5).unsqueeze(0), None, None, (2, 5)) is None
    assert find_documents(torch.arange(7, 12).unsqueeze(0), None, None, (1, 5)) is None


def test_padding_beside_documents_is_one_itself():
    """Else a document would see it where no mask goes along."""
    positions = torch.tensor([[0, 0, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1] * 8])
    found = find_documents(positions, mask, None, (2, 8))
    assert found is not None
    assert found.tolist() == [[0, 0, 1, 1, 2, 2, 2, 3], [0] * 8]


def test_flat_layout():
    layout = flat_layout(torch.tensor([[0, 0, 1], [0, 1, 1]]))
    assert layout.starts.tolist() == [0, 2, 3, 4, 6] and layout.starts.dtype == torch.int32 and layout.longest == 2


def test_plan_moves_with_a_layer():
    """accelerate sends the arguments of a layer to its device, and asks them for `to`."""
    documents = torch.tensor([[0, 0, 1]])
    for layout in (None, pack_layout(documents), flat_layout(documents)):
        moved = AttentionPlan(torch.ones(2), layout).to("meta")
        assert moved.mask.device.type == "meta"
        for value in vars(moved.layout).values() if moved.layout else ():
            tensors = value if isinstance(value, list) else [value]
            assert all(t.device.type == "meta" for t in tensors if isinstance(t, torch.Tensor))
        assert AttentionPlan(None, layout).to("cpu").mask is None


packs = st.integers(1, 12).flatmap(
    lambda length: st.lists(
        st.lists(st.booleans(), min_size=length - 1, max_size=length - 1).map(
            lambda cuts: [len(part) for part in "".join("|." if cut else "." for cut in [False, *cuts]).split("|")]
        ),
        min_size=1,
        max_size=3,
    )
)


@settings(max_examples=40, deadline=None)
@given(packs)
def test_layout(rows: list[list[int]]):
    """Documents are found, and attention over buckets is attention over each of them."""
    positions = positions_of(rows)
    documents = find_documents(positions, None, None, tuple(positions.shape))
    wanted = torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in rows])
    if documents is None:
        assert all(len(row) == 1 for row in rows)
        documents = wanted
    assert torch.equal(documents, wanted)

    query, key, value = torch.randn(3, len(rows), 2, positions.shape[1], 4).unbind(0)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None

    found = pack_layout(documents).attend(attend, query, key, value)
    for b, row in enumerate(rows):
        parts = [t[b : b + 1].split(row, dim=2) for t in (query, key, value)]
        torch.testing.assert_close(
            found[b : b + 1], torch.cat([attend(*p)[0] for p in zip(*parts, strict=True)], dim=1)
        )


def test_documents_that_follow_one_another_are_not_copied():
    """Equally long neighbours reach the kernel as views of all tokens; others are gathered, and put back in order."""
    query = torch.randn(1, 2, 6, 4)
    seen: list[int] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, None]:
        seen.append(q.untyped_storage().data_ptr())
        return q.transpose(1, 2), None

    for lengths, views in (((3, 3), 1), ((4, 2), 2), ((2, 4), 2), ((1, 4, 1), 1)):
        seen.clear()
        documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
        found = pack_layout(documents).attend(attend, query, query, query)
        torch.testing.assert_close(found, query.transpose(1, 2), rtol=0, atol=0)
        assert seen.count(query.untyped_storage().data_ptr()) == views
