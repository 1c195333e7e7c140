"""Small models, stock twins of them, and the golden sets of `reference/`."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as stock

from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForCausalLM, apply_lora

REFERENCE = Path(__file__).parents[1] / "reference"
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
# Weights far from zero, so that a wrong factor anywhere shows in the logits.
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.0,
    "aux_loss_alpha": 0.02,
    "initializer_range": 0.15,
    "max_position_embeddings": 163840,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_scaling": YARN,
}
# Rows of whole blocks of 64 values, as quantised weights must have.
IN_BLOCKS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "kv_lora_rank": 64, "q_lora_rank": 64,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip


def small_config(**changes: Any) -> DeepseekV2Config:
    return DeepseekV2Config(**{**SMALL, **changes})


def small_model(cls: type[PreTrainedModel] = DeepseekV2ForCausalLM, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model in eval mode, the same for the same arguments."""
    torch.manual_seed(seed)
    return cls(small_config(**changes)).eval()


def random_ids(rows: int, length: int, seed: int = 1, vocab: int = SMALL["vocab_size"]) -> torch.Tensor:
    """[rows, length], without bos (0) and eos (1)."""
    return torch.randint(2, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: torch.Tensor, pads: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids with eos in the first pads[row] places, attention_mask, position_ids as `generate` makes them)."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return torch.where(mask.bool(), ids, 1), mask, positions


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def stock_twin(directory: Path, cls: type[PreTrainedModel] = stock.DeepseekV2ForCausalLM) -> Any:
    """The written directory in stock transformers, every tensor accounted for."""
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    faults = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    assert not faults, faults
    return model.eval()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 difference."""
    return ((found - wanted).norm() / wanted.norm()).item()


def random_adapter(model: Any, config: Any, dropout: float = 0.0, seed: int = 3) -> Any:
    """The model under `apply_lora` in eval mode, with B far from zero."""
    torch.manual_seed(seed)
    peft_model = apply_lora(model, config, dropout).eval()
    shake(peft_model, seed)
    return peft_model


def shake(peft_model: Any, seed: int, adapter: str = "default") -> None:
    """Random numbers for all factors of an adapter, by name: the same in every model that has it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(peft_model.named_parameters()):
        if "lora_" in name and (f".{adapter}." in name or name.endswith(f".{adapter}")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token; as many as the small models have."""
    words = {"<bos>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, SMALL["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
