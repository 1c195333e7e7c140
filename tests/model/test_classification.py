"""The score is read off each row's last real token."""

from typing import Any

import pytest
import torch

from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForSequenceClassification, record_routing
from deepseek_v2_modeling.inference import pad_batch, score_sequences, unpad_batch
from deepseek_v2_modeling.kernels.float32_products import float32_is_faster
from deepseek_v2_modeling.presets import PRESETS

from ..helpers.models import logits_of, random_ids, small_model

PAD = 1  # eos too, as many set it
LENGTHS = [7, 4, 1]


def scored(num_labels: int = 1) -> DeepseekV2ForSequenceClassification:
    return small_model(DeepseekV2ForSequenceClassification, num_labels=num_labels, pad_token_id=PAD)


def batch(side: str, ends_in_eos: bool) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(rows without padding, padded ids, attention_mask)"""
    rows = [random_ids(1, n, seed=n)[0] for n in LENGTHS]
    if ends_in_eos:
        rows = [torch.cat((row, torch.tensor([PAD]))) for row in rows]
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return rows, ids, mask


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("ends_in_eos", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_last_real_token_by_the_mask(side: str, ends_in_eos: bool, num_labels: int):
    """With pad = eos a real eos at the end is a token like any other."""
    model = scored(num_labels)
    rows, ids, mask = batch(side, ends_in_eos)
    found = logits_of(model, ids, attention_mask=mask)
    assert found.shape == (len(rows), num_labels)
    for score, row in zip(found, rows, strict=True):
        with torch.no_grad():
            wanted = model.score(model.model(row.unsqueeze(0)).last_hidden_state[0, -1])
        torch.testing.assert_close(score, wanted, rtol=0, atol=1e-5)


def test_without_a_mask_the_padding_id_tells():
    """On the right: on the left attention sees the padding, and there is no value to compare with."""
    model = scored()
    rows, ids, _ = batch("right", ends_in_eos=False)
    found = logits_of(model, ids)
    for score, row in zip(found, rows, strict=True):
        torch.testing.assert_close(score, logits_of(model, row.unsqueeze(0))[0], rtol=0, atol=1e-5)


def test_from_embeddings():
    model, ids = scored(), random_ids(2, 5)
    found = model(inputs_embeds=model.model.embed_tokens(ids)).logits
    torch.testing.assert_close(found, model(ids).logits)


def test_with_a_cache_the_mask_covers_the_past():
    model, ids = scored(), random_ids(2, 6)
    first = model(ids[:, :4], use_cache=True)
    found = model(ids[:, 4:], attention_mask=torch.ones(2, 6), past_key_values=first.past_key_values)
    torch.testing.assert_close(found.logits, model(ids).logits, rtol=0, atol=1e-5)


def bf16_scores(model: DeepseekV2ForSequenceClassification, rows: list[list[int]], how: str) -> torch.Tensor:
    """[rows]"""
    ids, mask = pad_batch(rows, PAD, left=how == "left")
    if how == "packed":
        packed = unpad_batch(ids, mask)
        return logits_of(model, packed["input_ids"], position_ids=packed["position_ids"])[:, 0]
    if how == "embedded":
        with torch.no_grad():
            return model(inputs_embeds=model.model.embed_tokens(ids), attention_mask=mask).logits[:, 0]
    if how == "one by one":
        return torch.cat(
            [logits_of(model, torch.tensor([row]), attention_mask=torch.ones(1, len(row)))[0] for row in rows]
        )
    return logits_of(model, ids, attention_mask=mask)[:, 0]


@pytest.mark.parametrize("seed", range(3))
def test_in_bf16_neither_padding_nor_the_batch_changes_a_score(seed: int):
    model = small_model(DeepseekV2ForSequenceClassification, seed, num_labels=1, pad_token_id=PAD).to(torch.bfloat16)
    rows = [random_ids(1, n, seed=n + seed)[0].tolist() for n in (37, 5, 64, 12, 50, 21, 1, 33)]
    rows[1][-1] = PAD
    wanted = bf16_scores(model, rows, "right")
    for how in ("left", "packed", "one by one", "embedded"):
        torch.testing.assert_close(bf16_scores(model, rows, how), wanted, rtol=0, atol=1e-3)
    listed = torch.tensor(score_sequences(model, rows, pad_token_id=PAD, batch_size=3))
    torch.testing.assert_close(listed, wanted, rtol=0, atol=1e-3)
    assert wanted.dtype == torch.float32 and (wanted != wanted.bfloat16()).any()  # on no grid of bf16


@pytest.mark.skipif(float32_is_faster(), reason="few rows are multiplied in another precision than many")
def test_in_bf16_v2_lite_mini_gives_the_same_scores_in_any_batch():
    torch.manual_seed(0)
    config = DeepseekV2Config(**{**PRESETS["v2-lite-mini"], "num_labels": 1, "pad_token_id": PAD})
    model = DeepseekV2ForSequenceClassification(config).to(torch.bfloat16).eval()
    rows = [random_ids(1, n, seed=n)[0].tolist() for n in (92, 60, 117, 25, 131, 48, 77, 20)]
    wanted = bf16_scores(model, rows, "right")
    for how in ("left", "one by one"):
        torch.testing.assert_close(bf16_scores(model, rows, how), wanted, rtol=0, atol=1e-5)
    listed = torch.tensor(score_sequences(model, rows, pad_token_id=PAD, batch_size=3))
    torch.testing.assert_close(listed, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", [[[1, 1, 0, 1], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 1, 1, 1]]])
def test_a_mask_that_leaves_no_plain_row_is_taken_as_it_is(mask: list[list[int]]):
    """A gap, and a row without a token: one score a row, and positions count the gap."""
    model, ids, given = scored(), random_ids(2, 4), torch.tensor(mask)
    found = logits_of(model, ids, attention_mask=given)
    torch.testing.assert_close(found[1:], logits_of(model, ids[1:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, logits_of(model, ids, attention_mask=given, use_cache=True), rtol=0, atol=1e-5)


def test_what_has_the_shape_of_the_batch_keeps_it():
    model, (_, ids, mask) = scored(), batch("left", ends_in_eos=True)
    plain = logits_of(model, ids, attention_mask=mask)
    for asked in ({"output_hidden_states": True}, {"use_cache": True}):
        out = model(ids, attention_mask=mask, **asked)
        torch.testing.assert_close(out.logits, plain, rtol=0, atol=1e-5)
        kept = out.hidden_states[0].shape[:2] if out.hidden_states else (3, out.past_key_values.get_seq_length())
        assert tuple(kept) == tuple(ids.shape)


def test_the_last_block_leaves_out_what_has_no_score():
    """Where nothing else needs its values: neither gradients, nor a recording of routes, nor all hidden states."""
    model, (_, ids, mask) = scored(), batch("left", ends_in_eos=True)
    tokens: list[int] = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2].numel()))
    plain = logits_of(model, ids, attention_mask=mask)
    model(ids, attention_mask=mask)
    with torch.no_grad(), record_routing(model):
        recorded = model(ids, attention_mask=mask).logits
    assert tokens == [len(LENGTHS), mask.sum(), ids.numel()]
    torch.testing.assert_close(recorded, plain, rtol=0, atol=1e-5)


# Packed


def pack(*rows: list[int]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(documents of these lengths, each ending in the padding id, ids, position_ids)"""
    ids = random_ids(len(rows), sum(rows[0]))
    documents = [part for row, lengths in zip(ids, rows, strict=True) for part in row.split(lengths)]
    for document in documents:
        document[-1] = PAD
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    return documents, ids, positions


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("ones", [False, True])
def test_one_score_a_document(num_labels: int, ones: bool):
    """Row by row; a document's end is a token like any other, also when it has the padding id."""
    model = scored(num_labels)
    documents, ids, positions = pack([4, 1, 6], [2, 5, 4])
    mask = torch.ones_like(ids) if ones else None
    found = logits_of(model, ids, position_ids=positions, attention_mask=mask)
    assert found.shape == (6, num_labels)
    torch.testing.assert_close(found, torch.cat([read_off(model, d) for d in documents]), rtol=0, atol=1e-5)


def read_off(model: DeepseekV2ForSequenceClassification, document: torch.Tensor) -> torch.Tensor:
    """[1, num_labels], with a mask: without one a last token with the padding id would not count."""
    mask = torch.ones(1, len(document), dtype=torch.int64)
    return logits_of(model, document.unsqueeze(0), attention_mask=mask)


LIMITS = torch.tensor([0, 4, 5, 11], dtype=torch.int32)


@pytest.mark.parametrize(
    "given",
    [
        {"cu_seq_lens_q": LIMITS, "cu_seq_lens_k": LIMITS},
        {"cu_seq_lens": LIMITS},
        {"seq_idx": torch.tensor([[0] * 4 + [1] + [2] * 6])},
    ],
)
def test_documents_by_their_boundaries(given: dict[str, Any]):
    model = scored()
    documents, ids, _ = pack([4, 1, 6])
    found = logits_of(model, ids, **given)
    torch.testing.assert_close(found, torch.cat([read_off(model, d) for d in documents]), rtol=0, atol=1e-5)


def test_padding_beside_documents_has_no_score():
    model = scored()
    documents, ids, positions = pack([4, 3, 4])
    ids[0, 7:], positions[0, 7:] = PAD, 0
    mask = torch.tensor([[1] * 7 + [0] * 4])
    found = logits_of(model, ids, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(found, torch.cat([read_off(model, d) for d in documents[:2]]), rtol=0, atol=1e-5)


def test_positions_of_a_left_padded_batch_are_no_documents():
    model = scored()
    rows, ids, mask = batch("left", ends_in_eos=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found, torch.cat([read_off(model, row) for row in rows]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled(packed: bool):
    """Padding without a mask, told by its id: compiled code cannot know that positions which go on are no documents."""
    torch.compiler.reset()
    model = scored()
    _, ids, positions = pack([4, 1, 6])
    if not packed:
        ids, positions = batch("right", ends_in_eos=False)[1], torch.arange(max(LENGTHS)).unsqueeze(0)
    run: Any = torch.compile(model, backend="eager")
    found = logits_of(run, ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(found, logits_of(model, ids, position_ids=positions), rtol=0, atol=1e-5)
    torch.compiler.reset()


def test_labels_of_documents():
    model = scored()
    _, ids, positions = pack([4, 1, 6])
    labels = torch.tensor([1.0, -1.0, 0.5])
    out = model(ids, position_ids=positions, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.mse_loss(out.logits.squeeze(-1), labels))


@pytest.mark.parametrize(
    ("num_labels", "labels", "loss"),
    [
        (1, torch.tensor([0.5, -1.0]), lambda x, y: torch.nn.functional.mse_loss(x.squeeze(-1), y)),
        (3, torch.tensor([2, 0]), torch.nn.functional.cross_entropy),
    ],
)
def test_loss(num_labels: int, labels: torch.Tensor, loss):
    model, ids = scored(num_labels), random_ids(2, 6)
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, loss(out.logits, labels))
