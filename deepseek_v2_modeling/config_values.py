"""Values of a config that cannot be a model's, found before anything is made of them.

Whatever stands in a config.json reaches transformers' and torch's constructors, which fail in ways of their own, or not
at all: a RoPE factor of 0 gives NaN, a negative one another model.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers.activations import ACT2FN

from .errors import ModelError

# Many times those of the largest models there are.
LARGEST = {
    "vocab_size": 10_000_000, "hidden_size": 1_000_000, "intermediate_size": 10_000_000,
    "moe_intermediate_size": 10_000_000, "num_hidden_layers": 1_000, "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000, "n_routed_experts": 10_000, "n_shared_experts": 1_000, "num_experts_per_tok": 10_000,
    "kv_lora_rank": 1_000_000, "q_lora_rank": 1_000_000, "qk_nope_head_dim": 100_000, "qk_rope_head_dim": 100_000,
    "v_head_dim": 100_000, "head_dim": 100_000, "max_position_embeddings": 1_000_000_000, "num_labels": 10_000,
    "attention_dropout": 1.0,
}  # fmt: skip
# Of the numbers above 1, but for these.
SMALLEST = {
    "n_routed_experts": 0, "n_shared_experts": 0, "num_experts_per_tok": 0, "num_labels": 0, "attention_dropout": 0.0,
    "rms_norm_eps": 0.0, "initializer_range": 0.0, "first_k_dense_replace": 0,
}  # fmt: skip
# Numbers of the RoPE settings, and whether they may be 0.
ROPE_NUMBERS = {
    "rope_theta": False, "factor": False, "original_max_position_embeddings": False, "beta_fast": False,
    "beta_slow": False, "mscale": True, "mscale_all_dim": True, "attention_factor": True,
}  # fmt: skip
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
# Settings of a single call: made a model's own, they change what its forward returns.
OF_A_CALL = {"return_dict": True, "output_attentions": False}
TYPES = {"id2label": dict, "label2id": dict, "num_labels": int}
# Where transformers looks for the language model's settings in the config of a larger model.
PARTS = ("text_config", "text_encoder", "decoder", "encoder", "generator")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_sizes(values: Mapping[str, Any]) -> None:
    """Raises ModelError for numbers that no model has: a size of 0, and those so large that building even an outline
    would take for ever."""
    for name in {**LARGEST, **SMALLEST}:
        value = values.get(name)
        least, most = SMALLEST.get(name, 1), LARGEST.get(name)
        if not is_number(value):
            continue
        if most is not None and not value <= most:
            raise ModelError(f"{name} is {value}: it must be at most {most:,}")
        if not value >= least:
            raise ModelError(f"{name} is {value}: it must be at least {least}")
    if (values.get("qk_rope_head_dim") or 0) % 2:
        raise ModelError(f"qk_rope_head_dim is {values['qk_rope_head_dim']}: it must be even")


def check_rope_form(name: str, settings: Any) -> None:
    """Raises ModelError for RoPE settings, in either form, that are no mapping, or whose numbers are none."""
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise ModelError(f"{name} is {settings!r}: it must be an object, such as {{type: yarn, factor: 40}}, or null")
    for key, may_be_zero in ROPE_NUMBERS.items():
        check_rope_number(f"{name}.{key}", settings.get(key), may_be_zero)
    for key in ("type", "rope_type"):
        if not isinstance(settings.get(key), str | None):
            raise ModelError(f"{name}.{key} is {settings[key]!r}: it must be a name")


def check_rope_number(name: str, value: Any, may_be_zero: bool = False) -> None:
    """Raises ModelError for anything but None or a number above 0 (or 0, where it may be)."""
    if value is None:
        return
    if not is_number(value) or not (value >= 0 if may_be_zero else value > 0):
        raise ModelError(f"{name} is {value!r}: it must be a number {'of at least' if may_be_zero else 'above'} 0")


def check_parts(config: Any) -> None:
    """Raises ModelError for names and token ids of a config that stand for nothing."""
    if config.hidden_act not in ACT2FN:
        raise ModelError(f'hidden_act "{config.hidden_act}" is not known; DeepSeek-V2 has "silu"')
    padding = config.pad_token_id
    if padding is not None and not (is_number(padding) and 0 <= padding < config.vocab_size):
        raise ModelError(
            f"pad_token_id is {padding!r}: it must be from 0 to {config.vocab_size - 1} (vocab_size - 1), or null"
        )
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"architectures is {names!r}: it must be a list of class names")


def check_file_values(values: Any, config_class: type) -> None:
    """Values as they stand in a config.json, before a config is made of them.

    Raises:
        ModelError: they are no JSON object, carry the name of a method, or a setting that belongs to a call.
    """
    if not isinstance(values, dict):
        raise ModelError(f"it must be a JSON object, and is {type(values).__name__}")
    for key in values:
        found = inspect.getattr_static(config_class, key, None)
        no_setting = isinstance(found, property) and found.fset is None
        if no_setting or inspect.isroutine(found) or isinstance(found, classmethod | staticmethod):
            raise ModelError(f'"{key}" is no setting of a model; take it out')
    for key, kind in TYPES.items():
        if not isinstance(values.get(key), kind | None):
            raise ModelError(f"{key} is {values[key]!r}: it must be {'a number' if kind is int else 'an object'}")
    for key in ("dtype", "torch_dtype"):
        if isinstance(name := values.get(key), str):
            found = getattr(torch, name.removeprefix("torch."), None)
            if not (isinstance(found, torch.dtype) and found.is_floating_point):
                raise ModelError(f'{key} is "{name}": use float32, bfloat16 or float16')
    if parts := [key for key in PARTS if values.get(key) is not None]:
        raise ModelError(f"{parts[0]}: the settings of a part: this is a larger model, of which DeepSeek-V2 is a part")
    for key, only in OF_A_CALL.items():
        if values.get(key) not in (None, only):
            raise ModelError(f"{key} is {values[key]!r}: it belongs to a call, not to a model; take it out")
    for key in ("attn_implementation", "_attn_implementation"):
        name = values.get(key)
        if name is not None and "/" in str(name):
            raise ModelError(
                f"attn_implementation {name} is a kernel of the hub, whose code is never run here; take it out"
            )
        if name not in (None, *ATTENTION):
            raise ModelError(f"{key} is {name!r}: use one of {', '.join(ATTENTION)}")


def check_settings_finite(settings: Mapping[str, Any], where: str = "") -> None:
    """Raises ModelError for a number among the settings of a config, at any depth, that is not finite."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            check_settings_finite(value, f"{where}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{where}{key} is {value}: it must be a finite number")
