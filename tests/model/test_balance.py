"""Balance losses against a slow transcription of the paper, and how they enter a model's loss."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v2_modeling import (
    DeepseekV2Config,
    DeepseekV2ForSequenceClassification,
    apply_lora,
    collect_balance,
    lora_config,
    modeling,
    record_routing,
)
from deepseek_v2_modeling.layers.balance_losses import RouterOutput, balance_losses, expert_counts
from deepseek_v2_modeling.layers.moe import choose_experts

from ..helpers.models import REFERENCE, SMALL, left_padded, random_ids, small_config, small_model

EXPERTS = 8


# The formulas


def slow_losses(
    config: DeepseekV2Config, sequence: list[tuple[torch.Tensor, list[int]]]
) -> dict[str, torch.Tensor | float]:
    """Eq. 23-31 for one sequence of (scores [E], chosen experts), index by index; f is a number, no tensor."""
    tokens, groups = len(sequence), config.n_group or 1
    size, k, m = EXPERTS // groups, config.num_experts_per_tok, config.topk_group or groups
    assert k
    f, p = [], []
    for i in range(EXPERTS):
        f.append(EXPERTS / (k * tokens) * sum(1 for _, chosen in sequence if i in chosen))  # eq. 24
        p.append(sum(scores[i] for scores, _ in sequence) / tokens)  # eq. 25
    expert = device = communication = 0.0
    for i in range(EXPERTS):
        expert = expert + f[i] * p[i]  # eq. 23
    for d in range(groups):
        members = range(d * size, (d + 1) * size)
        p_group = sum(p[i] for i in members)  # eq. 28, 31
        device = device + sum(f[i] for i in members) / size * p_group  # eq. 26, 27
        sent = sum(1 for _, chosen in sequence if any(i in chosen for i in members))
        communication = communication + groups / (m * tokens) * sent * p_group  # eq. 29, 30
    return {
        "expert": config.aux_loss_alpha * expert,
        "device": config.device_aux_loss_alpha * device,
        "communication": config.comm_aux_loss_alpha * communication,
    }


def slow_total(
    config: DeepseekV2Config,
    logits: torch.Tensor,
    chosen: torch.Tensor,
    mask: list[list[int]],
    documents: list[list[int]],
) -> dict[str, Any]:
    """logits [B, T, E], chosen [B, T, K]: the mean over the documents that have a real token, or over the batch."""
    sequences: dict[Any, list[tuple[torch.Tensor, list[int]]]] = {}
    for b, row in enumerate(mask):
        for t, real in enumerate(row):
            if real:
                where = (b, documents[b][t]) if config.seq_aux else "batch"
                sequences.setdefault(where, []).append((logits[b, t].softmax(-1), chosen[b, t].tolist()))
    parts = [slow_losses(config, sequence) for sequence in sequences.values()]
    return {name: sum(part[name] for part in parts) / max(1, len(parts)) for name in parts[0]} if parts else {}


@st.composite
def routed_batches(draw: st.DrawFn) -> dict[str, Any]:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    kept = draw(st.integers(1, groups))
    alphas = st.sampled_from([0.0, 0.003, 1.0])
    config = small_config(
        n_routed_experts=EXPERTS,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, kept * (EXPERTS // groups))),
        topk_method=draw(st.sampled_from(["greedy", "group_limited_greedy"])),
        aux_loss_alpha=draw(alphas),
        device_aux_loss_alpha=draw(alphas),
        comm_aux_loss_alpha=draw(alphas),
        seq_aux=draw(st.booleans()),
    )
    bits = st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=rows, max_size=rows)
    return {
        "config": config,
        "shape": (rows, length),
        "mask": draw(st.none() | bits),
        "steps": draw(st.none() | bits),  # 1 where a document starts
        "seed": draw(st.integers(0, 10**6)),
    }


@settings(max_examples=60, deadline=None)
@given(routed_batches())
def test_losses_are_the_papers(batch: dict[str, Any]):
    config, (rows, length) = batch["config"], batch["shape"]
    generator = torch.Generator().manual_seed(batch["seed"])
    layers = [torch.randn(rows, length, EXPERTS, generator=generator).requires_grad_() for _ in range(2)]
    routers = [
        RouterOutput(x.flatten(0, 1), choose_experts(config, x.detach().flatten(0, 1).softmax(-1))) for x in layers
    ]
    mask = torch.tensor(batch["mask"]) if batch["mask"] else None
    documents = torch.tensor(batch["steps"]).cumsum(-1) if batch["steps"] else None
    if documents is not None:
        documents = documents - documents[:, :1]
    found = balance_losses(config, routers, (rows, length), mask, documents)

    ones, zeros = [[1] * length] * rows, [[0] * length] * rows
    plain_documents = zeros if documents is None else documents.tolist()
    alphas = (config.aux_loss_alpha, config.device_aux_loss_alpha, config.comm_aux_loss_alpha)
    names = {name for name, alpha in zip(("expert", "device", "communication"), alphas, strict=True) if alpha}
    assert set(found) == names
    wanted = dict.fromkeys(names, torch.zeros(()))
    for logits, router in zip(layers, routers, strict=True):
        chosen = router.experts.view(rows, length, -1)
        slow = slow_total(config, logits, chosen, batch["mask"] or ones, plain_documents)
        wanted = {name: wanted[name] + slow.get(name, 0.0) for name in names}
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-7)

    counts = expert_counts(routers, mask)
    for row, router in zip(counts, routers, strict=True):
        real = torch.tensor(batch["mask"] or ones).flatten().bool()
        assert row.tolist() == torch.bincount(router.experts[real].flatten(), minlength=EXPERTS).tolist()

    if names and any(any(row) for row in batch["mask"] or ones):
        ours = torch.autograd.grad(sum(found.values()), layers)
        theirs = torch.autograd.grad(sum(wanted.values()), layers)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_even_load_costs_the_coefficients():
    """With all experts equally likely and equally used each loss is its coefficient: f and P are 1 and 1/E."""
    config = small_config(aux_loss_alpha=0.003, device_aux_loss_alpha=0.05, comm_aux_loss_alpha=0.02, topk_group=4)
    chosen = torch.tensor([[0, 2, 4], [6, 1, 3], [5, 7, 0], [2, 4, 6], [1, 3, 5], [7, 0, 2], [4, 6, 1], [3, 5, 7]])
    found = balance_losses(config, [RouterOutput(torch.zeros(8, EXPERTS), chosen)], (1, 8))
    assert found["expert"].item() == pytest.approx(0.003)
    assert found["device"].item() == pytest.approx(0.05)
    # Three groups of four are reached by each token, of the M = 4 that it might use.
    assert found["communication"].item() == pytest.approx(0.02 * 3 / 4)


# In a model


ALL_ON = {"aux_loss_alpha": 0.02, "device_aux_loss_alpha": 0.05, "comm_aux_loss_alpha": 0.03}
ALL_OFF = dict.fromkeys(ALL_ON, 0.0)


def gradients(model: Any, **inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("seq_aux", [True, False])
def test_loss_is_cross_entropy_and_balance(seq_aux: bool):
    ids = random_ids(2, 9)
    plain = small_model(**ALL_OFF).train()(ids, labels=ids)
    assert plain.aux_loss is None
    out = small_model(**ALL_ON, seq_aux=seq_aux).train()(ids, labels=ids)
    assert out.aux_loss.item() > 0.05
    torch.testing.assert_close(out.loss, plain.loss + out.aux_loss)
    without_labels = small_model(**ALL_ON, seq_aux=seq_aux).train()(ids)
    assert without_labels.loss is None
    torch.testing.assert_close(without_labels.aux_loss, out.aux_loss)


def test_each_kind_of_loss_is_in_the_sum():
    ids, model = random_ids(2, 9), small_model(**ALL_ON).train()
    whole = model(ids).aux_loss.item()
    parts = []
    for name, value in ALL_ON.items():
        for key, number in {**ALL_OFF, name: value}.items():
            setattr(model.config, key, number)
        parts.append(model(ids).aux_loss.item())
    assert whole == pytest.approx(sum(parts), rel=1e-5)
    assert min(parts) > 0


def test_balance_loss_reaches_the_gate():
    ids = random_ids(2, 9)
    _, plain = gradients(small_model(**ALL_OFF).train(), input_ids=ids, labels=ids)
    _, with_loss = gradients(small_model(**ALL_ON).train(), input_ids=ids, labels=ids)
    gate = "model.layers.2.mlp.gate.weight"
    assert (with_loss[gate] - plain[gate]).norm() > 1e-3 * plain[gate].norm()
    assert torch.equal(with_loss["lm_head.weight"], plain["lm_head.weight"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str):
    """The same as the mean of the rows alone."""
    model, plain = small_model(**ALL_ON).train(), random_ids(2, 8)
    if side == "left":
        ids, mask, positions = left_padded(plain, [0, 3])
        rows = [ids[:1], ids[1:, 3:]]
        found = model(ids, attention_mask=mask, position_ids=positions).aux_loss
    else:
        mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
        rows = [plain[:1], plain[1:, :5]]
        found = model(torch.where(mask.bool(), plain, 1), attention_mask=mask).aux_loss
    wanted = torch.stack([model(row).aux_loss for row in rows]).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("all_ones", [False, True])
def test_packed_documents_are_sequences(attention: str, all_ones: bool):
    model, ids = small_model(**ALL_ON, attn_implementation=attention).train(), random_ids(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    mask = torch.ones_like(ids) if all_ones else None
    found = model(ids, position_ids=positions, attention_mask=mask).aux_loss
    wanted = torch.stack([model(ids[:, :5]).aux_loss, model(ids[:, 5:]).aux_loss]).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_no_balance_loss_outside_of_training():
    ids, model = random_ids(2, 6), small_model(**ALL_ON)
    assert model(ids, labels=ids).aux_loss is None
    model.train()
    with torch.no_grad():
        assert model(ids, labels=ids).aux_loss is None


def test_dense_model_has_none():
    ids = random_ids(1, 6)
    out = small_model(n_routed_experts=None).train()(ids, labels=ids)
    assert out.aux_loss is None and out.loss is not None


# Gradient accumulation


def test_micro_batches_sum_to_their_weighted_mean():
    """With num_items_in_batch each micro-batch weighs as many labels as it has: N of them do not count N times."""
    model = small_model(**ALL_ON).train()
    ids = random_ids(3, 9)
    labels = ids.clone()
    labels[0, :6] = -100
    labels[2, :2] = -100
    items = (labels[:, 1:] != -100).sum()
    found, wanted = torch.zeros(()), torch.zeros(())
    for row in range(3):
        one = {"input_ids": ids[row : row + 1], "labels": labels[row : row + 1]}
        found = found + model(**one, num_items_in_batch=items).loss
        wanted = wanted + model(**one).loss * (one["labels"][:, 1:] != -100).sum() / items
    torch.testing.assert_close(found, wanted)


def test_equal_micro_batches_give_the_loss_of_one():
    model, ids = small_model(**ALL_ON).train(), random_ids(1, 9)
    alone, grads = gradients(model, input_ids=ids, labels=ids)
    model.zero_grad()
    total = torch.zeros(())
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(4 * 8)).loss
        loss.backward()
        total = total + loss.detach()
    torch.testing.assert_close(total, alone.loss.detach())
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_of_labels_that_are_shifted_already():
    model, ids = small_model(**ALL_ON).train(), random_ids(1, 9)
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    items = {"num_items_in_batch": torch.tensor(4 * 8)}
    wanted = model(ids, labels=ids, **items).loss
    for labels in (ids, torch.full_like(ids, -100)):
        torch.testing.assert_close(model(ids, labels=labels, shift_labels=shifted, **items).loss, wanted)


# Losses that nobody adds


@pytest.fixture
def warnings_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages passed to `warning_once`, including repeated ones."""
    texts: list[str] = []
    monkeypatch.setattr(modeling.logger, "warning_once", texts.append)
    return texts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loss_that_nobody_adds_is_said(warnings_once: list[str], checkpointing: bool):
    """TRL's trainers call the backbone past the model's own forward."""
    model, ids = small_model(**ALL_ON).train(), random_ids(1, 7)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    with collect_balance(model):
        model.model(ids)
        model(ids)
    with torch.no_grad():
        model.model(ids)
    model.eval().model(ids)
    assert warnings_once == []
    model.train().model(ids).last_hidden_state.sum().backward()
    model(ids).logits.sum().backward()
    assert len(warnings_once) == 2 and all(
        "class MyTrainer(RunTrainerMixin, SFTTrainer)" in text for text in warnings_once
    )


def test_without_coefficients_nothing_is_said(warnings_once: list[str]):
    model, ids = small_model(**ALL_OFF).train(), random_ids(1, 7)
    model.model(ids)
    assert warnings_once == []


def test_a_score_without_labels_is_said(warnings_once: list[str]):
    """TRL's RewardTrainer makes its loss from the logits."""
    model = small_model(DeepseekV2ForSequenceClassification, num_labels=1, pad_token_id=1, **ALL_ON).train()
    model(random_ids(2, 6), labels=torch.zeros(2))
    assert warnings_once == []
    model(random_ids(2, 6))
    assert len(warnings_once) == 1


# Gradient checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool):
    ids = random_ids(2, 9)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])}
    plain, wanted = gradients(small_model(**ALL_ON).train(), **inputs)
    model = small_model(**ALL_ON).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs: list[int] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with collect_balance(model) as ledger:
        model(**inputs).logits.sum().backward()
    assert len(runs) == 2, "not recomputed: the test proves nothing"
    assert len(ledger.losses) == 1 and ledger.expert_counts.sum() == 15 * 3 * 2
    out, found = gradients(model, **inputs)
    torch.testing.assert_close(out.loss, plain.loss)
    assert set(found) == set(wanted)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, msg=name)


# The ledger


def test_ledger():
    model, ids = small_model(**ALL_ON).train(), random_ids(2, 7)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    plain = small_model(**ALL_OFF).train()(ids, attention_mask=mask, labels=ids).loss
    with collect_balance(model) as ledger:
        assert ledger.losses == [] and ledger.parts == {} and ledger.expert_counts is None
        with record_routing(model) as routes:
            first = model(ids, attention_mask=mask, labels=ids)
        second = model(ids[:1], labels=ids[:1])
    torch.testing.assert_close(first.loss, plain)
    assert [loss.item() for loss in ledger.losses] == [first.aux_loss.item(), second.aux_loss.item()]
    assert set(ledger.parts) == {"expert", "device", "communication"}
    assert sum(ledger.parts.values()).item() == pytest.approx(sum(ledger.losses).item())
    assert all(loss.requires_grad for loss in ledger.losses)
    assert not any(part.requires_grad for part in ledger.parts.values())

    alone = [torch.bincount(r[mask.bool()].flatten(), minlength=EXPERTS) for r in routes[0]]
    with collect_balance(model) as again:
        model(ids[:1])
    assert torch.equal(ledger.expert_counts, torch.stack(alone) + again.expert_counts)
    assert not ledger.expert_counts.is_floating_point()


def test_ledger_counts_training_forwards_only():
    """RL also runs the old policy and the reference, without gradients."""
    model, ids = small_model(**ALL_ON).train(), random_ids(1, 7)
    with collect_balance(model) as ledger:
        with torch.no_grad():
            model(ids)
        model.eval()(ids)
        model.generate(ids, max_new_tokens=2)
        assert ledger.losses == [] and ledger.expert_counts is None
        model.train()(ids)
        assert len(ledger.losses) == 1


def test_ledger_with_all_coefficients_zero():
    """The load is still counted."""
    model, ids = small_model(**ALL_OFF).train(), random_ids(1, 7)
    with collect_balance(model) as ledger:
        model(ids)
    assert ledger.losses == [] and ledger.expert_counts.sum() == 7 * 3 * 2


def test_padding_before_a_cached_prefix_does_not_count():
    """The mask covers the cached tokens too; only its end speaks of the new ones."""
    model, (ids, mask, positions) = small_model(**ALL_ON), left_padded(random_ids(2, 9), [0, 6])
    with torch.no_grad():
        past = model(ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5]).past_key_values
    model.train()
    with collect_balance(model) as ledger:
        model(ids[:, 5:], attention_mask=mask, position_ids=positions[:, 5:], past_key_values=past)
    assert ledger.expert_counts.sum() == (4 + 3) * 3 * 2


def test_ledger_closes():
    model, ids = small_model(**ALL_ON).train(), random_ids(1, 7)
    with pytest.raises(RuntimeError, match="stop"), collect_balance(model):
        raise RuntimeError("stop")
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, small_model(**ALL_OFF).train()(ids, labels=ids).loss + out.aux_loss)


def test_ledger_is_found_under_a_wrapper():
    model = apply_lora(small_model(**ALL_ON), lora_config(["experts"], r=2)).train()
    with collect_balance(model) as ledger:
        model(input_ids=random_ids(1, 7))
    assert len(ledger.losses) == 1


def test_wrong_use_of_the_ledger():
    model = small_model()
    with collect_balance(model), pytest.raises(ValueError, match="open"), collect_balance(model):
        pass
    with pytest.raises(ValueError, match="Linear"), collect_balance(torch.nn.Linear(1, 1)):
        pass


def test_reward_model():
    ids, labels = random_ids(2, 6), torch.tensor([0.5, -1.0])
    plain = small_model(DeepseekV2ForSequenceClassification, num_labels=1, pad_token_id=1, **ALL_OFF).train()
    model = small_model(DeepseekV2ForSequenceClassification, num_labels=1, pad_token_id=1, **ALL_ON).train()
    wanted = plain(ids, labels=labels).loss
    with collect_balance(model) as ledger:
        torch.testing.assert_close(model(ids, labels=labels).loss, wanted)
    torch.testing.assert_close(model(ids, labels=labels).loss, wanted + ledger.losses[0])


def test_release_settings_are_what_the_golden_sets_say():
    """The reference's alpha is taken from the released config, not from a default."""
    for name in ("lite", "full"):
        config = DeepseekV2Config.from_pretrained(REFERENCE / name)
        assert config.aux_loss_alpha == json.loads((REFERENCE / name / "meta.json").read_text())["aux_loss_alpha"]
        assert config.seq_aux and config.device_aux_loss_alpha == config.comm_aux_loss_alpha == 0
    assert SMALL["n_routed_experts"] == EXPERTS
