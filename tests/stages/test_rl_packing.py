"""Packed rows of prompts and answers: log-probabilities and gradients are those of TRL's padded ones, whether a
prompt is read with each answer or once for its group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer

from deepseek_v2_modeling import collect_balance, record_routing
from deepseek_v2_modeling.adapters import apply_lora
from deepseek_v2_modeling.errors import ModelError
from deepseek_v2_modeling.loading import LoraSettings
from deepseek_v2_modeling.training import IGNORED
from rl.packing import pack_rows
from rl.trainer import PolicyTrainer

from ..helpers.models import random_ids
from ..helpers.rl import Vowels, run, trainer_for, untimed
from ..helpers.stages import chat_model, lines

LORA = LoraSettings(("attention", "experts", "shared_experts"), 4, 8)
PROMPTS = [9, 9, 9, 6, 2, 2, 12, 12, 1, 1]  # tokens of the prompts of rows; equal ones in a row are a group
ANSWERS = [6, 1, 3, 4, 6, 2, 5, 6, 2, 3]


class Spread(Vowels):
    """A reward by all characters, so that hardly two answers have the same."""

    def judge(self, answers):
        return [sum(map(ord, answer.text)) % 97 / 10 for answer in answers]


def test_packed_log_probabilities_are_trls_own(tmp_path):
    trainer = trainer_for(tmp_path, model=chat_model(aux_loss_alpha=0.5))
    model = trainer.model.train()
    ids = random_ids(4, 12, vocab=200)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, 9:], mask[2, :3], mask[2, 8:] = 0, 0, 0, 0  # 6 columns of prompt, 6 of answer
    ids = ids.masked_fill(mask == 0, 2)
    grads = {}
    for which, logps_of in (("ours", PolicyTrainer), ("trl", GRPOTrainer)):
        model.zero_grad()
        with collect_balance(model) as ledger:
            settings = {"batch_size": 2, "compute_entropy": True}
            found = logps_of._get_per_token_logps_and_entropies(trainer, model, ids, mask, 6, **settings)
        kept = [value * mask[:, 6:] for value in found[:2]]
        (kept[0].sum() + torch.stack(ledger.losses).mean()).backward()
        grads[which] = (*kept, *(p.grad.clone() for p in model.parameters() if p.grad is not None))
    for ours, trl in zip(grads["ours"], grads["trl"], strict=True):
        torch.testing.assert_close(ours, trl, atol=2e-5, rtol=2e-4)


def batch(prompts=PROMPTS, answers=ANSWERS):
    """(ids, mask): prompts padded on the left, answers on the right."""
    width, longest = max(prompts), max(answers)
    ids = random_ids(len(prompts), width + longest, vocab=200)
    for row, size in enumerate(prompts[1:], 1):
        if size == prompts[row - 1]:
            ids[row, :width] = ids[row - 1, :width]
    columns = torch.arange(width + longest)
    sizes = zip(prompts, answers, strict=True)
    mask = torch.stack([(columns >= width - p) & (columns < width + a) for p, a in sizes]).long()
    return ids.masked_fill(mask == 0, 2), mask


def logps_and_gradients(trainer, cls, ids, mask, keep, weigh, size=None):
    trainer.model.zero_grad()
    settings = {"batch_size": size, "compute_entropy": True}
    logps, entropy, _ = cls._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, keep, **settings)
    own = mask[:, -keep:]
    (logps * own * weigh).sum().backward()
    gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    return logps * own, entropy * own, *gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_prompt_read_once_gives_trls_log_probabilities_and_gradients(tmp_path, lora, attention):
    model = chat_model(aux_loss_alpha=0.0, attn_implementation=attention)
    if lora:
        model = apply_lora(model, LORA.config("CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    trainer = trainer_for(tmp_path, model=model, training={"beta": 0.0})
    trainer.model.train()
    read = []
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda m, i, o: read.append(o.shape)) if lora else (
        model.model.embed_tokens.register_forward_hook(lambda m, i, o: read.append(o.shape))
    )
    ids, mask = batch()
    weigh = torch.randn(mask.shape[0], max(ANSWERS), generator=torch.Generator().manual_seed(1))
    for size in (None, 4):
        read.clear()
        ours = logps_and_gradients(trainer, PolicyTrainer, ids, mask, max(ANSWERS), weigh, size)
        assert sum(shape[0] * shape[1] for shape in read) < mask.sum() - (16 if size is None else 8)
        trl = logps_and_gradients(trainer, GRPOTrainer, ids, mask, max(ANSWERS), weigh, size)
        assert len(ours) == len(trl) > 20
        for one, other in zip(ours, trl, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_tokens_that_are_read_are_those_that_differ(tmp_path):
    ids, mask = batch()
    packed = pack_rows(ids, mask, max(ANSWERS))
    saved = 2 * (9 - 1) + 1 * (2 - 1) + 1 * (12 - 1)
    assert packed.inputs["input_ids"].shape == (1, int(mask.sum()) - saved)
    assert packed.inputs["prefix_documents"].tolist() == [-1, 0, 0, 0, -1, -1, 5, 5, -1, 8, 8, -1, -1]
    apart = pack_rows(ids, mask, max(ANSWERS), share=False)
    assert apart.inputs["input_ids"].shape == (1, int(mask.sum())) and apart.inputs.keys() == {
        "input_ids", "position_ids", "labels"
    }  # fmt: skip


@given(data=st.data())
def test_rows_that_are_not_read_change_nothing_for_the_others(data: st.DataObject):
    ids, mask = batch()
    out = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(mask), max_size=len(mask))))
    out[data.draw(st.integers(0, len(mask) - 1))] = False
    some = pack_rows(ids, mask.masked_fill(out[:, None], 0), max(ANSWERS))
    alone = pack_rows(ids[~out], mask[~out], max(ANSWERS))
    assert some.inputs.keys() == alone.inputs.keys()
    assert all(torch.equal(some.inputs[key], value) for key, value in alone.inputs.items())
    values = torch.randn(1, some.inputs["input_ids"].shape[1] - 1)
    assert torch.equal(some.unpack(values)[~out], alone.unpack(values)) and not some.unpack(values)[out].any()


def test_balance_losses_count_a_prompt_once_as_a_sequence_of_its_own():
    model = chat_model(aux_loss_alpha=1.0, seq_aux=True)
    ids, mask = batch()
    inputs = {key: value for key, value in pack_rows(ids, mask, max(ANSWERS)).inputs.items() if key != "labels"}
    with collect_balance(model) as ledger, record_routing(model) as routes:
        model.model(**inputs)
    assert ledger.expert_counts is not None
    tokens, experts = inputs["input_ids"].shape[1], model.config.num_experts_per_tok
    assert set(ledger.expert_counts.sum(-1).tolist()) == {tokens * experts}
    documents = inputs["seq_idx"][0]
    apart = [int(routes[0][0][0, documents == d].numel() / experts) for d in documents.unique()]
    assert apart == [8, 7, 2, 4, 10, 1, 7, 3, 11, 6, 7, 3, 4] and len(ledger.losses) == 1


def test_short_prompts_are_read_with_each_answer():
    ids, mask = batch([2] * 4, [60] * 4)
    assert "prefix_documents" not in pack_rows(ids, mask, 60).inputs


def test_documents_are_continued_in_one_row_and_not_by_flash_kernels():
    model = chat_model().model
    ids, continued = torch.tensor([[5, 6, 7, 8]] * 2), torch.tensor([-1, 0])
    documents = torch.tensor([[0, 0, 1, 1]] * 2)
    with pytest.raises(ValueError, match="one packed row, not of 2"):
        model(ids, seq_idx=documents, prefix_documents=continued)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="prefix_documents needs sdpa or eager"):
        model(ids[:1], seq_idx=documents[:1], prefix_documents=continued)


def test_runs_that_read_prompts_once_are_those_that_do_not(tmp_path, monkeypatch):
    """All of a run: reference, several updates on a rollout, whole groups in micro-batches."""
    settings = {"num_iterations": 2, "per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 3}
    monkeypatch.setattr(PolicyTrainer, "shares_prompts", True)
    run(tmp_path / "once", model=chat_model(aux_loss_alpha=0.0), rewards=[Spread("spread")], training=settings)
    monkeypatch.setattr(PolicyTrainer, "shares_prompts", False)
    run(tmp_path / "each", model=chat_model(aux_loss_alpha=0.0), rewards=[Spread("spread")], training=settings)
    # A micro-batch of equal rewards would have a gradient of rounding errors, of which Adam makes whole steps.
    assert lines(tmp_path / "once" / "metrics.jsonl")[0]["frac_reward_zero_std"] == 0
    for one, other in zip(*(lines(tmp_path / name / "metrics.jsonl")[:3] for name in ("once", "each")), strict=True):
        loads = {key for key in one if key.startswith("expert_load")}  # tokens that are read
        one, other = ({k: v for k, v in untimed(line).items() if k not in loads} for line in (one, other))
        assert one.keys() == other.keys()
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


@given(data=st.data())
def test_packed_rows_score_answers_and_never_a_rows_first_token(data: st.DataObject):
    """Whatever the padding: the last token of one row must not be taken to predict the first one of the next."""
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 8))
    answer = data.draw(st.integers(1, width))
    mask = torch.zeros(rows, width, dtype=torch.long)
    for row in mask:
        start = data.draw(st.integers(0, width - 1))
        row[start : data.draw(st.integers(start + 1, width))] = 1
    ids = torch.arange(1, rows * width + 1).view(rows, width)
    rows_packed = pack_rows(ids, mask, answer)
    packed = rows_packed.inputs
    first = mask.bool() & (mask.cumsum(-1) == 1)
    scored = mask.bool() & ~first & (torch.arange(width) >= width - answer)
    assert packed["labels"][packed["labels"] != IGNORED].tolist() == ids[scored].tolist()
    assert packed["input_ids"][0].tolist() == ids[mask.bool()].tolist()
    assert [p for p in packed["position_ids"][0].tolist() if p == 0] == [0] * rows
    values = packed["input_ids"][:, 1:].float()
    assert torch.equal(rows_packed.unpack(values)[:, -answer:][scored[:, -answer:]], ids[scored].float())
