"""A small model with a byte tokenizer, and rows, for tests of the stages."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepseek_v2_modeling import DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification

from .models import small_model

SPECIAL = ("<bos>", "<eos>", "<pad>")
TINY: dict[str, Any] = {
    "vocab_size": 256 + len(SPECIAL),
    "num_hidden_layers": 2,
    "pad_token_id": 2,
    "initializer_range": 0.1,
    "rope_scaling": None,
}
# The least that a recipe must say; the path plays no part where the model is handed in.
SECTIONS: dict[str, Any] = {"model": {"path": "unused"}, "data": [{"path": "unused"}]}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; ids 0, 1, 2 are begin, end and padding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def chat_model(seed: int = 0, **changes: Any) -> Any:
    return small_model(DeepseekV2ForCausalLM, seed, **{**TINY, **changes}).train()


def score_model(seed: int = 0, **changes: Any) -> Any:
    return small_model(DeepseekV2ForSequenceClassification, seed, **{**TINY, "num_labels": 1, **changes}).train()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def conversations(n: int) -> list[dict[str, Any]]:
    return [
        {"messages": user(f"{i} + 1") + assistant(str(i + 1)), "reference": str(i + 1), "meta": {"kind": "sum"}}
        for i in range(n)
    ]


def pairs(n: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": user(f"ask {i}"),
            "chosen": assistant("yes, gladly"),
            "rejected": assistant("no"),
            "meta": {"kind": "even" if i % 2 == 0 else "odd"},
        }
        for i in range(n)
    ]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(first: Any, second: Any) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def stopped_after(checkpoint: Path, folder: Path) -> Path:
    """A copy of the checkpoint's run as it was when that checkpoint had just been written; the copy's checkpoint."""
    shutil.copytree(checkpoint.parent, folder, ignore=lambda _, names: {n for n in names if n == "final"})
    for other in folder.glob("checkpoint-*"):
        if other.name != checkpoint.name:
            shutil.rmtree(other)
    return folder / checkpoint.name


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
