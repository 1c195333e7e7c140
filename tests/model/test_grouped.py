"""Grouped products, dispatch and combine against plain loops."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from deepseek_v2_modeling.kernels import even_groups
from deepseek_v2_modeling.kernels.even_groups import BUSIEST, few_rows_each, place_evenly
from deepseek_v2_modeling.kernels.grouped_products import (
    ActiveAdapter,
    Groups,
    Slots,
    _Dispatch,
    blocks,
    combine,
    dispatch,
    filled_up,
    place_slots,
    weighted_slots,
)
from deepseek_v2_modeling.kernels.low_rank import Factors, Share, add_share, pieces, share_gradient, whole_pieces
from deepseek_v2_modeling.kernels.one_token import experts_of_one_token
from deepseek_v2_modeling.kernels.ragged_products import ragged_gradient, ragged_product
from deepseek_v2_modeling.layers import moe as moe_file
from deepseek_v2_modeling.layers.moe import (
    WAYS,
    DeepseekV2Experts,
    Routed,
    by_weights,
    choose_experts,
    expert_weights,
    has_few_rows,
    has_one_token,
    one_by_one,
    one_function,
    run_experts,
    trains_plainly,
)

from ..helpers.models import small_config, small_model

EXPERTS = 4
ROWS = {
    "some for all": [0, 0, 1, 2, 2, 2, 3],
    "empty ones": [1, 1, 3],
    "the first and the last empty": [1, 2, 2],
    "all for one": [2, 2, 2, 2],
    "one token": [3],
    "none": [],
}


def grouped(rows: list[int]) -> Groups:
    """The groups of rows that fall to these experts."""
    return Groups(torch.bincount(torch.tensor(rows, dtype=torch.int64), minlength=EXPERTS))


def looped(x: torch.Tensor, w: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return torch.stack([w[e] @ x[i] for i, e in enumerate(rows)]) if rows else x @ w[0].t()


@pytest.mark.parametrize("case", ROWS)
def test_grouped_product(case: str):
    rows = ROWS[case]
    torch.manual_seed(0)
    x, w = torch.randn(len(rows), 5).requires_grad_(), torch.randn(EXPERTS, 6, 5).requires_grad_()
    groups = grouped(rows)
    found, wanted = groups.linear(x, w), looped(x, w, rows)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    ours, theirs = torch.autograd.grad(found, (x, w), upstream), torch.autograd.grad(wanted, (x, w), upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ROWS)
def test_gradcheck(case: str):
    rows = ROWS[case]
    torch.manual_seed(0)
    x = torch.randn(len(rows), 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(EXPERTS, 2, 3, dtype=torch.float64, requires_grad=True)
    groups = grouped(rows)
    assert torch.autograd.gradcheck(groups.linear, (x, w))


@pytest.mark.parametrize(("x_trains", "w_trains"), [(True, False), (False, True)])
def test_only_what_trains_gets_a_gradient(x_trains: bool, w_trains: bool):
    x, w = torch.randn(3, 5, requires_grad=x_trains), torch.randn(EXPERTS, 6, 5, requires_grad=w_trains)
    grouped([0, 2, 2]).linear(x, w).sum().backward()
    assert (x.grad is not None) == x_trains and (w.grad is not None) == w_trains
    if w.grad is not None:
        assert torch.equal(w.grad[1], torch.zeros(6, 5))


def test_a_transposed_gradient_and_input():
    """Views come in from both sides."""
    x, w = torch.randn(5, 3).t().requires_grad_(), torch.randn(EXPERTS, 6, 5).requires_grad_()
    rows = [0, 1, 1]
    upstream = torch.randn(6, 3).t()
    found = torch.autograd.grad(grouped(rows).linear(x, w), (x, w), upstream)
    wanted = torch.autograd.grad(looped(x, w, rows), (x, w), upstream)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    x, w = torch.randn(3, 8), torch.randn(EXPERTS, 6, 8).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped([0, 1, 1]).linear(x, w)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
    torch.testing.assert_close(y.detach().float(), looped(x, w.detach(), [0, 1, 1]), rtol=0.02, atol=0.05)


chosen_experts = st.integers(1, 3).flatmap(
    lambda k: st.lists(st.permutations(range(EXPERTS)).map(lambda p: p[:k]), min_size=1, max_size=6)
)


@settings(max_examples=30, deadline=None)
@given(chosen_experts, st.sampled_from([0, 1, 2, 8]))
def test_dispatch_and_combine(chosen: list[list[int]], block: int):
    """Rows go to their experts in order and come back weighted, and so do gradients. Filling up changes nothing."""
    torch.manual_seed(0)
    experts = torch.tensor(chosen)
    tokens, k = experts.shape
    x = torch.randn(tokens, 5, requires_grad=True)
    weights = torch.rand(tokens, k, requires_grad=True)
    maps = torch.randn(EXPERTS, 5, 5, requires_grad=True)  # what an expert does to its rows

    slots, groups = place_slots(experts, EXPERTS, block)
    sizes = torch.bincount(experts.flatten(), minlength=EXPERTS).tolist()
    assert groups.counts == [filled_up(max(size, block)) if block and size else size for size in sizes]
    expert_of_row = F.pad(torch.arange(EXPERTS).repeat_interleave(torch.tensor(groups.counts)), (0, 999))
    expert_of_row = expert_of_row[: len(slots.slot_P)]
    real = slots.slot_P >= 0
    assert torch.equal(expert_of_row[real], experts.flatten()[slots.slot_P[real]])
    assert torch.equal(slots.slot_P[slots.place_S], torch.arange(tokens * k))
    found = combine(groups.linear(_Dispatch.apply(x, slots), maps), weights, slots)

    wanted = torch.stack(
        [sum(weights[n, j] * (maps[e] @ x[n]) for j, e in enumerate(row)) for n, row in enumerate(chosen)]
    )
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn(tokens, 5)
    ours = torch.autograd.grad(found, (x, weights, maps), upstream)
    theirs = torch.autograd.grad(wanted, (x, weights, maps), upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 10_000))
def test_filled_up_is_the_next_of_a_few_sizes(size: int):
    full = filled_up(size)
    assert size <= full < max(2 * size, 1) and (full % 32 == 0 or full in (0, 1, 2, 4, 8, 16))
    assert full - size < 32 and filled_up(full) == full


def test_low_precision_on_the_cpu_fills_up():
    """To blocks of a power of 2, up to the mean of the groups' sizes; the rows to a few numbers of blocks."""
    experts = torch.tensor([[0, 1]] * 5 + [[0, 2]])
    x = torch.randn(6, 5)
    assert dispatch(x, experts, EXPERTS)[1].counts == [6, 5, 1, 0]
    rows, groups, _ = dispatch(x.bfloat16(), experts, EXPERTS)  # blocks of 2
    assert groups.counts == [8, 8, 2, 0] and len(rows) == 32


@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.sampled_from([0, 1, 4, 32]))
def test_pieces_cover_the_rows_of_each_expert(sizes: list[int], block: int):
    counts = [size * block if block else size for size in sizes]
    rows = block * whole_pieces(sum(sizes)) if block else sum(sizes)
    wanted = torch.full((rows,), -1)
    for expert, taken in blocks(counts):
        wanted[taken] = expert
    found = torch.full((rows,), -1)
    for piece in pieces(counts, block, rows):
        piece.of(found.unsqueeze(1)).copy_(piece.expert_Q.view(-1, 1, 1))
    assert torch.equal(found[: sum(counts)], wanted[: sum(counts)]) and not (found < 0).any()


def test_combine_sums_in_float32():
    """bf16 outputs that would vanish beside a large one are kept (official behaviour)."""
    y = torch.tensor([[256.0], [0.5], [0.5]], dtype=torch.bfloat16)
    out = combine(y, torch.ones(1, 3), Slots(torch.arange(3), torch.arange(3), 3))
    assert out.dtype == torch.float32 and out.item() == 257.0


def test_many_bf16_rows_are_combined_as_precisely_as_in_float32():
    torch.manual_seed(0)
    y, weights, places = torch.randn(1024, 1024).bfloat16(), torch.rand(300, 6), torch.randint(1024, (300, 6))
    found, few = weighted_slots(y, places, weights), weighted_slots(y[:, :64].contiguous(), places, weights)
    wanted = (y.double()[places] * weights.unsqueeze(-1).double()).sum(1)
    assert found.dtype == few.dtype == torch.float32
    torch.testing.assert_close(few.double(), wanted[:, :64], rtol=1e-5, atol=1e-5)
    rounded_once = (wanted.bfloat16().double() - wanted).norm()
    assert (found - wanted).norm() < 1.05 * rounded_once


def test_gradients_are_the_same_at_every_run():
    torch.manual_seed(0)
    x, experts = torch.randn(64, 32, requires_grad=True), torch.randint(0, EXPERTS, (64, 3))
    grads = []
    for _ in range(3):
        rows, _, slots = dispatch(x, experts, EXPERTS)
        grads.append(torch.autograd.grad((rows.cumsum(0) * slots.place_S.unsqueeze(-1)).sum(), x)[0])
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("tokens", [1, 7])
def test_routed_experts(tokens: int, monkeypatch: pytest.MonkeyPatch):
    """The whole block against one product an expert and token."""
    model = small_model()
    moe, config = model.model.layers[1].mlp, model.config
    torch.manual_seed(1)
    x = torch.randn(tokens, config.hidden_size)
    scores = torch.randn(tokens, config.n_routed_experts).softmax(-1)
    chosen = choose_experts(config, scores)
    weights = expert_weights(config, scores, chosen)
    wanted = torch.zeros(tokens, config.hidden_size)
    for n in range(tokens):
        for weight, expert in zip(weights[n], chosen[n], strict=True):
            gate, up = (moe.experts.gate_up_proj[expert] @ x[n]).chunk(2)
            wanted[n] += weight * (moe.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(run_experts(moe.experts, x, weights, chosen), wanted)
    monkeypatch.setattr(moe_file, "TOKENS", 3)  # without gradients so many at a time
    with torch.no_grad():
        torch.testing.assert_close(run_experts(moe.experts, x, weights, chosen), wanted)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 40), skew=st.sampled_from([0.0, 3.0]), low=st.booleans())
def test_few_rows_for_each_expert(seed: int, tokens: int, skew: float, low: bool):
    """Padded to one number of rows, experts give what they give one by one."""
    config = small_config(hidden_size=8, moe_intermediate_size=8)
    moe = DeepseekV2Experts(config).requires_grad_(False)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    moe = moe.to(torch.bfloat16 if low else torch.float32)
    tolerance = {"rtol": 2e-2, "atol": 0.2} if low else {"rtol": 1e-5, "atol": 1e-4}
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=generator).to(moe.down_proj.dtype)
    preference = torch.rand(tokens, 8, generator=generator) + skew * torch.arange(8) / 8
    weights, chosen = preference.topk(3)
    routed = Routed(moe, {}, x, weights, chosen)
    with torch.no_grad():
        assert set(place_evenly(chosen, 8)[0].flatten().tolist()) >= set(range(tokens))
        torch.testing.assert_close(by_weights(few_rows_each, routed), one_by_one(routed), **tolerance)
        expected = 3 * tokens >= 8 and int(chosen.flatten().bincount().max()) <= BUSIEST and 3 * tokens <= 8 * BUSIEST
        assert has_few_rows(routed) == expected
        with mock.patch.object(even_groups, "SMALL", 8 * 2 * 8 - 1):
            assert not has_few_rows(routed)
        adapter = ActiveAdapter(torch.zeros(8, 1, 8), torch.zeros(8, 8, 1), 1.0, torch.nn.Identity())
        assert not has_few_rows(routed._replace(adapters={"down_proj": [adapter]}))
        assert not has_few_rows(routed._replace(x_ND=x.double()))
    assert not has_few_rows(routed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_is_not_sorted(dtype: torch.dtype):
    """Its experts give what they give one by one, and so it is computed where nothing but plain weights is needed."""
    moe = DeepseekV2Experts(small_config(hidden_size=8, moe_intermediate_size=8)).requires_grad_(False).to(dtype)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    x, (weights, chosen) = torch.randn(1, 8).to(dtype), torch.rand(1, 8).topk(3)
    routed = Routed(moe, {}, x, weights, chosen)
    with torch.no_grad():
        assert next(name for name, way in WAYS.items() if way.applies(routed)) == "one token"
        torch.testing.assert_close(by_weights(experts_of_one_token, routed), one_by_one(routed), rtol=1e-5, atol=1e-5)
        adapter = ActiveAdapter(torch.zeros(8, 1, 8), torch.zeros(8, 8, 1), 1.0, torch.nn.Identity())
        assert not has_one_token(routed._replace(adapters={"down_proj": [adapter]}))
        assert not has_one_token(routed._replace(x_ND=x.double()))
        assert not has_one_token(routed._replace(x_ND=x.expand(2, 8)))
    assert not has_one_token(routed)


def test_decoding_a_batch_takes_one_product_for_each_weight(monkeypatch: pytest.MonkeyPatch):
    """And gives the logits of one answer at a time."""
    model = small_model(num_hidden_layers=2)
    ids = torch.randint(5, 60, (6, 1))
    with torch.no_grad():
        alone = torch.cat([model(row[None]).logits for row in ids])
        products: list[int] = []
        monkeypatch.setattr(even_groups, "batched_product", lambda x, w: (products.append(len(w)), x @ w.mT)[1])
        torch.testing.assert_close(model(ids).logits, alone)
    assert products == [8, 8]  # gate and up projections, down projections


@pytest.mark.parametrize("autocast", [False, True])
def test_router_is_in_float32(autocast: bool):
    """Official behaviour: bf16 rounding would flip experts."""
    gate = small_model().model.layers[1].mlp.gate.to(torch.bfloat16)
    x = torch.randn(5, gate.weight.shape[1], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = gate(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, x.float() @ gate.weight.float().t())


def test_group_limited_choice():
    """The groups with the best single expert are kept, and the best experts of those (paper, section 2.2.2)."""
    config = small_model(num_hidden_layers=1).config  # 4 groups of 2, 2 kept, 3 experts
    scores = torch.tensor([[0.05, 0.20, 0.19, 0.18, 0.30, 0.01, 0.04, 0.03]])
    assert choose_experts(config, scores)[0].sort().values.tolist() == [0, 1, 4]
    config.topk_method = "greedy"
    assert choose_experts(config, scores)[0].sort().values.tolist() == [1, 2, 4]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("case", ROWS)
def test_adapters_beside_the_product(case: str, dropout: float):
    """Two adapters of different ranks: the values are W + s B A's, the gradients pass gradcheck."""
    rows = ROWS[case]
    torch.manual_seed(0)
    x = torch.randn(len(rows), 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(EXPERTS, 4, 3, dtype=torch.float64, requires_grad=True)
    keep = (torch.rand(x.shape) > dropout).double()
    drop = Fixed(keep) if dropout else torch.nn.Identity()
    factors = [
        torch.randn(EXPERTS, *s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (4, 2), (1, 3), (4, 1))
    ]

    def product(x: torch.Tensor, w: torch.Tensor, a1: Any, b1: Any, a2: Any, b2: Any) -> torch.Tensor:
        return grouped(rows).linear(
            x, w, [ActiveAdapter(a1, b1, 2.0, torch.nn.Identity()), ActiveAdapter(a2, b2, 0.5, drop)]
        )

    a1, b1, a2, b2 = factors
    wanted = looped(x, w + 2.0 * b1 @ a1, rows) + looped(x * keep, 0.5 * b2 @ a2, rows)
    torch.testing.assert_close(product(x, w, *factors), wanted)
    assert torch.autograd.gradcheck(product, (x, w, *factors))


class Fixed(torch.nn.Module):
    """Dropout with a fixed mask."""

    def __init__(self, keep: torch.Tensor):
        super().__init__()
        self.keep = keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.keep


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_the_ragged_kernel_gives_the_same(rank: int):
    """What a GPU runs (`grouped_mm` has a CPU build): any rank, and adapters for some experts only."""
    torch.manual_seed(0)
    rows = [0, 0, 1, 3, 3, 3]
    x, w = torch.randn(len(rows), 16, requires_grad=True), torch.randn(EXPERTS, 8, 16)
    a, b = torch.randn(2, rank, 16, requires_grad=True), torch.randn(2, 8, rank, requires_grad=True)
    adapters = [ActiveAdapter(a, b, 2.0, torch.nn.Identity(), experts=(0, 3))]
    on_cpu, ragged = grouped(rows), grouped(rows)
    ragged.ends, ragged.looped = torch.tensor(on_cpu.counts).cumsum(0).to(torch.int32), False
    found, wanted = (groups.linear(x, w, adapters) for groups in (ragged, on_cpu))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(y, (x, a, b), upstream) for y in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_gradients_of_the_ragged_kernel(rank: int):
    """Written out for training on a GPU: those that autograd finds, on the CPU's build of the kernel."""
    torch.manual_seed(0)
    ends = torch.tensor([2, 3, 3, 6], dtype=torch.int32)
    x, w = torch.randn(6, 16, requires_grad=True), torch.randn(EXPERTS, 8, 16, requires_grad=True)
    a, b = torch.randn(EXPERTS, rank, 16, requires_grad=True), torch.randn(EXPERTS, 8, rank, requires_grad=True)
    shares = [Share(2.0, Factors(None, a, b))]
    y = ragged_product(ends, x, w, shares)
    upstream = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, w, a, b), upstream)
    with torch.no_grad():
        dx, dw, (factors,) = ragged_gradient(ends, upstream, x, w, shares, (True, True))
    for found, expected in zip((dx, dw, factors.a, factors.b), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("few", [True, False])
def test_low_rank_products_in_float32_beside_bf16(few: bool):
    """Where a CPU is faster at them (and with more blocks than experts, where factors are cast at once, or fewer)."""
    torch.manual_seed(0)
    experts = 64 if few else 2
    parts = pieces([8] * 2 + [0] * (experts - 2), 2, 16)
    x, g = torch.randn(16, 6).bfloat16(), torch.randn(16, 5).bfloat16()
    a, b = torch.randn(experts, 3, 6), torch.randn(experts, 5, 3)
    share, y, dx = Share(0.5, Factors(None, a, b)), torch.zeros(16, 5).bfloat16(), torch.zeros(16, 6).bfloat16()
    add_share(parts, share, x, y, torch.float32)
    found = share_gradient(parts, share, x, g, dx, torch.float32)
    expert = torch.arange(2).repeat_interleave(8)
    low = torch.einsum("si,sri->sr", x.float(), a[expert])
    g_low = torch.einsum("so,sor->sr", g.float(), b[expert])
    torch.testing.assert_close(y, (0.5 * torch.einsum("sr,sor->so", low, b[expert])).bfloat16())
    torch.testing.assert_close(dx, (0.5 * torch.einsum("sr,sri->si", g_low, a[expert])).bfloat16())
    outer = torch.einsum("sr,si->sri", 0.5 * g_low, x.float()).unflatten(0, (2, 8)).sum(1)
    torch.testing.assert_close(found.a[:2], outer)
    outer = torch.einsum("so,sr->sor", g.float(), 0.5 * low).unflatten(0, (2, 8)).sum(1)
    torch.testing.assert_close(found.b[:2], outer)
    assert not found.a[2:].any() and not found.b[2:].any()


@pytest.mark.parametrize("trains", ["tokens and gate weights", "experts", "adapters", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_training(trains: str, dtype: torch.dtype):
    """One function of the tokens: values and gradients are those of one product an expert and token; in bf16 with
    groups that are filled up."""
    model = small_model(topk_method="greedy")
    experts, config = model.model.layers[1].mlp.experts.to(dtype).requires_grad_(False), model.config
    torch.manual_seed(1)
    x = torch.randn(5, config.hidden_size, dtype=dtype)
    scores = torch.randn(5, config.n_routed_experts).softmax(-1)
    chosen = choose_experts(config, scores)
    weights = expert_weights(config, scores, chosen)
    shapes = {"gate_up_proj": experts.gate_up_proj.shape, "down_proj": experts.down_proj.shape}
    factors = [torch.randn(e, *s) * 0.1 for e, o, i in shapes.values() for s in ((2, i), (o, 2))]
    sets = {
        "tokens and gate weights": [x, weights],
        "experts": [experts.gate_up_proj, experts.down_proj],
        "adapters": factors,
    }
    leaves = [t.requires_grad_() for name, found in sets.items() if trains in (name, "everything") for t in found]
    adapters = {
        name: [ActiveAdapter(*factors[2 * i : 2 * i + 2], 1.5, torch.nn.Identity())] for i, name in enumerate(shapes)
    }

    def block(gate_up: torch.Tensor, down: torch.Tensor, x: torch.Tensor, a1: Any, b1: Any, a2: Any, b2: Any):
        gate_up, down = gate_up + 1.5 * b1 @ a1, down + 1.5 * b2 @ a2
        out = []
        for n, row in enumerate(chosen):
            halves = [(gate_up[e] @ x[n]).chunk(2) for e in row]
            hidden = [torch.nn.functional.silu(gate) * up for gate, up in halves]
            out.append(sum(w * (down[e] @ h) for w, e, h in zip(weights[n], row, hidden, strict=True)))
        return torch.stack(out)

    routed = Routed(experts, adapters, x, weights, chosen)
    assert trains_plainly(routed)
    found = one_function(routed)
    wanted = block(experts.gate_up_proj.float(), experts.down_proj.float(), x.float(), *factors)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, **close)
    upstream = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(y, leaves, upstream) for y in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one / scale, other / scale, **close)
