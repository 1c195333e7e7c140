"""Packed documents train as the same documents do in rows of their own: the loss and every gradient, token by token.

Through the real trainer: TRL's packing (bfd) and collator, its count of labels, and our compute_loss.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from conversations.errors import ToolkitError
from deepseek_v2_modeling.training.mixin import RunLimits
from recipes.recipe.schema import validate
from sft.data import encode_rows
from sft.stage import leaves_padding_out, sft_config
from sft.trainer import ChatTrainer, documents_of

from ..helpers.stages import SECTIONS, assistant, byte_tokenizer, chat_model, user

MAX_LENGTH = 96
ALONE = {"max_length": MAX_LENGTH, "per_device_train_batch_size": 64, "padding_free": False}  # one padded batch
LAYOUTS: dict[str, dict[str, Any]] = {
    "one pack a batch": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 64},
    "several packs a batch": {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 64},
    "all packs in one batch": {"packing": True, "per_device_train_batch_size": 64},
    "without padding, not packed": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 64},
    "several batches without padding": {
        "padding_free": True,
        "max_length": None,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 64,
    },
}


def rows() -> list[dict[str, Any]]:
    """Conversations of one to three exchanges and plain text, one longer than the limit (its parts begin trained)."""
    found: list[dict[str, Any]] = [
        {"messages": [m for k in range(1 + n % 3) for m in (*user(f"say {n * 7} {k}"), *assistant("x" * (n * 5 % 11)))]}
        for n in range(8)
    ]
    return [*found, {"text": "a text " * 30}, {"text": "short"}]


def encoded(train_on: str) -> Dataset:
    settings = {"max_length": MAX_LENGTH, "too_long": "split", "train_on": train_on}
    return encode_rows(rows(), byte_tokenizer(), **settings)[0]


def gradients(folder: Path, train_on: str, **training: Any) -> tuple[float, dict[str, torch.Tensor], list[list[int]]]:
    """The loss of one update over all rows, its gradients, and the documents as the batches hold them."""
    recipe = validate({**SECTIONS, "stage": "sft", "output_dir": str(folder), "training": {**ALONE, **training}})
    model = chat_model(aux_loss_alpha=0.0)  # its balance losses are means over micro-batches
    trainer = ChatTrainer(
        model=model,
        args=sft_config(recipe, folder),
        train_dataset=encoded(train_on),
        processing_class=byte_tokenizer(),
        limits=RunLimits(),
        probes=[],
    )
    loader = trainer.get_train_dataloader()
    batches, items = trainer.get_batch_samples(iter(loader), len(loader), trainer.args.device)
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)), num_items_in_batch=items)
        loss.backward()
        total += loss.item()
    documents = [document for batch in batches for document in documents_of(batch)]
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, documents


@pytest.mark.parametrize("train_on", ["all_assistant", "last_assistant"])
def test_loss_and_gradients_are_those_of_rows_alone(tmp_path: Path, train_on: str) -> None:
    wanted, wanted_gradients, documents = gradients(tmp_path, train_on)
    assert len(documents) > 10
    layouts = LAYOUTS if train_on == "all_assistant" else {"several packs a batch": LAYOUTS["several packs a batch"]}
    for name, layout in layouts.items():
        loss, found, packed = gradients(tmp_path, train_on, **layout)
        assert sorted(packed) == sorted(documents), name
        assert loss == pytest.approx(wanted, rel=1e-5), name
        assert found.keys() == wanted_gradients.keys()
        for weight, gradient in found.items():
            torch.testing.assert_close(
                gradient, wanted_gradients[weight], rtol=1e-4, atol=2e-6, msg=f"{name}: {weight}"
            )


def test_packs_are_filled_by_best_fit(tmp_path: Path) -> None:
    recipe = validate(
        {**SECTIONS, "stage": "sft", "output_dir": "o", "training": {"packing": True, "max_length": MAX_LENGTH}}
    )
    data = encoded("all_assistant")
    trainer = ChatTrainer(
        model=chat_model(), args=sft_config(recipe, tmp_path), train_dataset=data, processing_class=byte_tokenizer(),
        limits=RunLimits(), probes=[],
    )  # fmt: skip
    packs = [sum(lengths) for lengths in trainer.train_dataset["seq_lengths"]]
    tokens = sum(len(ids) for ids in data["input_ids"])
    assert sum(packs) == tokens and max(packs) <= MAX_LENGTH
    assert len(packs) == -(-tokens // MAX_LENGTH)  # no pack could be saved


@pytest.mark.parametrize(
    ("training", "model", "padded"),
    [
        ({}, {}, False),
        ({"per_device_train_batch_size": 2, "packing": False}, {"attn_implementation": "sdpa"}, False),
        ({"padding_free": False}, {}, True),
        ({"per_device_train_batch_size": 1}, {}, True),
        ({"torch_compile": True}, {}, True),
        ({"neftune_noise_alpha": 5.0}, {}, True),
        ({}, {"attn_implementation": "eager"}, True),
    ],
)
def test_batches_on_a_cpu_are_not_padded(
    tmp_path: Path, training: dict[str, Any], model: dict[str, Any], padded: bool
) -> None:
    sections = {**SECTIONS, "model": {**SECTIONS["model"], **model}, "training": {**training, "use_cpu": True}}
    recipe = validate({**sections, "stage": "sft", "output_dir": "o"})
    assert sft_config(recipe, tmp_path).padding_free is not padded


def test_batches_on_a_gpu_are_padded_unless_asked(tmp_path: Path) -> None:
    recipe = validate({**SECTIONS, "stage": "sft", "output_dir": "o"})
    assert not leaves_padding_out(recipe, {"use_cpu": False})


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "wrapped cuts conversations anywhere; use bfd"),
        ({"eval_packing": True}, "training.eval_packing needs training.packing"),
        ({"packing": True, "max_length": None}, "training.packing needs training.max_length"),
    ],
)
def test_what_would_let_documents_see_one_another_is_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolkitError, match=message):
        validate({**SECTIONS, "stage": "sft", "output_dir": "o", "training": training})
