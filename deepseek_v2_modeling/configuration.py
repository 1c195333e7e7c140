"""The DeepSeek-V2 config: the fields of stock transformers plus those of the official config that stock lacks.

Stock drops `rope_scaling` and `rope_theta` on save, so readers of the released format (vLLM, llama.cpp, the official
code) then run without YaRN. This config writes both forms and reads either.

Values of a config.json are validated before they reach the constructors of transformers and torch, whose errors are
unclear or absent: a RoPE factor of 0 gives NaN, and a negative one silently gives a different model.
"""

import inspect
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as StockConfig

from .errors import ModelError

VISION = "a vision encoder beside a language model, which has to stand in a directory of its own"
# Architectures whose checkpoints have similar tensor names; some would load and compute wrong logits.
RELATIVES = {
    "deepseek_ocr2": VISION,
    "deepseek_v32": "a sigmoid gate, and attention to the tokens that an indexer picks",
    "deepseek_v4": "compressed attention and another residual stream",
    "deepseek_vl_v2": VISION,  # DeepSeek-VL2 and DeepSeek-OCR
    "kimi_k2": "the architecture of deepseek_v3 and a tokenizer of its own",
    "kimi_linear": "linear attention in most layers",
    "longcat_flash": "two attentions a layer, and experts that do nothing",
    "minicpm3": "scaled embeddings, residuals and logits",
}
FP8_BLOCK = 128
_FP8 = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "weight_block_size": ([FP8_BLOCK, FP8_BLOCK],)}
# By whether attention is latent: the official plain attention is Llama's, which has no YaRN.
ROPE_TYPES = {True: ("default", "linear", "yarn"), False: ("default", "linear")}
SPEED = "bias_update_speed"
CORRECTION_BIAS = "e_score_correction_bias"  # the buffer of a router, float32 in memory and on disk
DEFAULT_THETA = 10000.0
YARN_LENGTH = 4096  # the official default; stock uses max_position_embeddings, which is the length after scaling
BALANCE_LOSSES = ("aux_loss_alpha", "device_aux_loss_alpha", "comm_aux_loss_alpha")
NOT_NEGATIVE = (*BALANCE_LOSSES, SPEED)
# Upper bounds, many times the values of the largest existing models.
LARGEST = {
    "vocab_size": 10_000_000, "hidden_size": 1_000_000, "intermediate_size": 10_000_000,
    "moe_intermediate_size": 10_000_000, "num_hidden_layers": 1_000, "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000, "n_routed_experts": 10_000, "n_shared_experts": 1_000, "num_experts_per_tok": 10_000,
    "kv_lora_rank": 1_000_000, "q_lora_rank": 1_000_000, "qk_nope_head_dim": 100_000, "qk_rope_head_dim": 100_000,
    "v_head_dim": 100_000, "head_dim": 100_000, "max_position_embeddings": 1_000_000_000, "num_labels": 10_000,
    "attention_dropout": 1.0, "num_nextn_predict_layers": 100,
}  # fmt: skip
# Lower bounds; 1 for all other names in LARGEST.
SMALLEST = {
    "n_routed_experts": 0, "n_shared_experts": 0, "num_experts_per_tok": 0, "num_labels": 0, "attention_dropout": 0.0,
    "rms_norm_eps": 0.0, "initializer_range": 0.0, "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
# Settings without an effect where no layer has routed experts, and where attention is plain.
OF_EXPERTS = (
    *BALANCE_LOSSES, "seq_aux", "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "n_group",
    "topk_group",
)  # fmt: skip
OF_LATENTS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# Numbers of the RoPE settings, and whether they may be 0.
ROPE_NUMBERS = {
    "rope_theta": False, "factor": False, "original_max_position_embeddings": False, "beta_fast": False,
    "beta_slow": False, "mscale": True, "mscale_all_dim": True, "attention_factor": True,
}  # fmt: skip
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
# Settings of a single call: stored in a config, other values would change what every forward returns.
OF_A_CALL = {"return_dict": True, "output_attentions": False}
TYPES = {"id2label": dict, "label2id": dict, "num_labels": int}
# Where transformers looks for the language model's settings in the config of a larger model.
PARTS = ("text_config", "text_encoder", "decoder", "encoder", "generator")


def rope_parameters(rope: Any, theta: float) -> dict[str, Any]:
    """RoPE settings of either form in the new form, with `theta` as the default of rope_theta."""
    rope = dict(rope or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope.pop("type", None)
    length = {"original_max_position_embeddings": YARN_LENGTH} if kind == "yarn" else {}
    return {"rope_theta": theta, **length, **rope, "rope_type": kind}


def joined_forms(rope: Any, released_form: dict[str, Any]) -> dict[str, Any]:
    """The RoPE settings in the new form, from a config's `rope_parameters` and those of rope_scaling and rope_theta
    that it also has (released_form).

    Raises:
        ModelError: the two forms disagree, so that one of them would have no effect.
    """
    scaling, theta = released_form.get("rope_scaling"), released_form.get("rope_theta")
    rope_settings = rope_parameters(rope or scaling, DEFAULT_THETA if theta is None else theta)
    if not rope:
        return rope_settings
    released = rope_parameters(scaling, rope_settings["rope_theta"] if theta is None else theta)
    compared = {*rope_settings, *released} if "rope_scaling" in released_form else {"rope_theta"}
    for key in sorted(compared, key=lambda key: (key != "rope_type", key)):
        if rope_settings.get(key) != released.get(key):
            name = "rope_theta" if key == "rope_theta" else f"rope_scaling {key.removeprefix('rope_')}"
            raise ModelError(
                f"{name} is {released.get(key)}, and {key} in rope_parameters is {rope_settings.get(key)}: give the "
                "same settings in both forms, or only one form"
            )
    return rope_settings


class AttentionSizes(NamedTuple):
    """Widths of attention. nope, rope: of a head's queries and keys, the parts without and with RoPE. value: of a
    head's values. cached: of what a cache keeps of a token and layer, in two parts: the latent and the rotary key, or
    with plain attention the values and the keys of all key heads."""

    nope: int
    rope: int
    value: int
    cached: tuple[int, int]

    @property
    def qk(self) -> int:
        return self.nope + self.rope


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise ModelError(
        "config.rope_scaling can be set as a whole only, before the model is made: "
        "config.rope_scaling = {**config.rope_scaling, ...}"
    )


class ReadOnly(dict):
    """The type of `config.rope_scaling`, which is derived from `rope_parameters`: changing an entry would have no
    effect, so it raises ModelError."""

    refuse: Any = _refuse
    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # copies are plain dicts


@strict
class DeepseekV2Config(StockConfig):
    """The config of DeepSeek-V2, V2-Lite, Coder-V2 and their derivatives (`model_type` deepseek_v2).

    Fields that stock lacks, with the official defaults:
        aux_loss_alpha: coefficient of the expert-level balance loss (paper, a1). 0 turns it off.
        device_aux_loss_alpha, comm_aux_loss_alpha: coefficients of the device- and communication-level
            losses (paper, a2 and a3); groups are the `n_group` groups of experts.
        seq_aux: compute the balance losses per sequence and average (True, official), or over the whole batch (False).
        moe_layer_freq: layer i is MoE when i >= first_k_dense_replace and i % moe_layer_freq == 0.
        scoring_func: "softmax"; any other is an error, as in the official code, here also for dense models.
        n_shared_experts: None or 0 means no shared experts.
        use_mla: false for plain multi-head attention instead of latent attention, as in the language models of
            DeepSeek-VL2-tiny and DeepSeek-OCR; the settings of latents then have no effect. Not saved where not set.

    Raises:
        ModelError: a value is rejected by the official model, or cannot work.
    """

    # What differs between the architectures of the family (family.py): the name in messages, for each scoring_func that
    # it has (layers/routing.py) its topk_methods, and the values of use_mla, the first of which is the default.
    architecture = "DeepSeek-V2"
    topk_methods = {"softmax": ("greedy", "group_limited_greedy")}  # noqa: RUF012
    attentions = (True, False)
    # Stock's parallel plans refer to modules that these classes lack, such as its experts, so none can be applied.
    base_model_tp_plan = None
    base_model_ep_plan = None
    base_model_pp_plan = None

    aux_loss_alpha: float | int = 0.001  # int too, since files and recipes write 0 for 0.0
    device_aux_loss_alpha: float | int = 0.0
    comm_aux_loss_alpha: float | int = 0.0
    seq_aux: bool = True
    moe_layer_freq: int = 1
    scoring_func: str = "softmax"
    output_router_logits: bool = False  # in stock since transformers 5.18
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    routed_scaling_factor: float | int = 1.0
    kv_lora_rank: int | None = 512

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like transformers', but the config of another architecture is an error; many would be accepted silently."""
        check_model_type(config_dict, cls.model_type)
        if is_block_fp8(config_dict.get("quantization_config")):  # such weights are read as plain ones
            config_dict = {key: value for key, value in config_dict.items() if key != "quantization_config"}
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any):
        if "use_mla" in kwargs:
            self.use_mla = kwargs.pop("use_mla")
        check_settings_finite({**vars(self), **kwargs})
        check_sizes({**vars(self), **kwargs}, self.uses_latents)
        kwargs.pop("auto_map", None)  # refers to remote code, which is never run here and not part of what is saved
        released_form = {name: kwargs.pop(name) for name in ("rope_scaling", "rope_theta") if name in kwargs}
        check_rope_form("rope_parameters", self.rope_parameters)
        check_rope_form("rope_scaling", released_form.get("rope_scaling"))
        check_rope_number("rope_theta", released_form.get("rope_theta"))
        self.rope_parameters = joined_forms(self.rope_parameters, released_form)
        super().__post_init__(**kwargs)
        if not self.uses_latents:
            self.head_dim = self.hidden_size // self.num_attention_heads  # stock takes it from the sizes of latents
        check_config(self)

    @property
    def uses_latents(self) -> bool:
        """Whether attention is latent, or plain multi-head attention. Raises ModelError if the architecture has not
        that one."""
        use_mla = getattr(self, "use_mla", self.attentions[0])
        if not isinstance(use_mla, bool) or use_mla not in self.attentions:
            known = " or ".join(str(value).lower() for value in self.attentions)
            raise ModelError(f"use_mla is {json.dumps(use_mla)}: for {self.architecture} it must be {known}")
        return use_mla

    @property
    def attention_sizes(self) -> AttentionSizes:
        if self.uses_latents:
            rope = self.qk_rope_head_dim
            return AttentionSizes(self.qk_nope_head_dim, rope, self.v_head_dim, (self.kv_lora_rank or 0, rope))
        width = self.hidden_size // self.num_attention_heads
        all_heads = (self.num_key_value_heads or self.num_attention_heads) * width
        return AttentionSizes(0, width, width, (all_heads, all_heads))

    @property
    def rope(self) -> dict[str, Any]:
        """`rope_parameters` as a plain dict, always with rope_type and rope_theta."""
        return rope_parameters(self.rope_parameters, DEFAULT_THETA)  # from_pretrained sets keywords in either form

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The released form of the RoPE settings, None without scaling. It can only be set as a whole."""
        rope = self.rope
        rope.pop("rope_theta", None)
        kind = rope.pop("rope_type", "default")
        return None if kind == "default" else ReadOnly({**rope, "type": kind})

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        """Used by `from_pretrained`, which sets its keywords on the config."""
        self.rope_parameters = rope_parameters(value, self.rope_theta)

    @property
    def rope_theta(self) -> float:
        return self.rope.get("rope_theta", DEFAULT_THETA)

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**self.rope, "rope_theta": value}

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self._released_form()}

    def to_diff_dict(self) -> dict[str, Any]:
        return {**super().to_diff_dict(), **self._released_form()}

    def _released_form(self) -> dict[str, Any]:
        scaling = self.rope_scaling
        return {"rope_scaling": None if scaling is None else dict(scaling), "rope_theta": self.rope_theta}

    @property
    def has_routed_experts(self) -> bool:
        """Whether any layer is MoE."""
        return any(map(self.is_moe_layer, range(self.num_hidden_layers)))

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether a layer is MoE: from `first_k_dense_replace` on, every `moe_layer_freq`-th layer counted from 0
        (official)."""
        return bool(
            self.n_routed_experts and layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0
        )

    def check_own(self) -> None:
        """Raise ModelError for values of the settings that only this architecture has."""


def check_model_type(values: Mapping[str, Any], expected: str, where: str = "", known: Iterable[str] = ()) -> None:
    """Check the values of a config.json, which `where` names in messages. expected: the model_type of the class that
    is to read it. known: all that are read, where the class was chosen by model_type.

    Raises:
        ModelError: they belong to another architecture.
    """
    model_type, where = values.get("model_type", expected), where and f"{where}: "
    if model_type != expected:
        relative = RELATIVES.get(str(model_type))  # a file can have any value
        difference = f": it has {relative}" if relative else ""
        remedy = f"use one of {', '.join(known)}" if known else "Auto classes choose the class by it"
        raise ModelError(f'{where}model_type is "{model_type}", not "{expected}"{difference}; {remedy}')


def is_block_fp8(settings: Any) -> bool:
    """Whether the quantization_config of a config.json says fp8 with a scale for each block of 128 x 128, which is read
    (checkpoints/lazy_tensors.py)."""
    return isinstance(settings, Mapping) and all(settings.get(key) in known for key, known in _FP8.items())


def check_settings(config: DeepseekV2Config) -> None:
    """Like `check_config`, but fast, for the settings that are read at each forward."""
    methods = config.topk_methods
    if config.scoring_func not in methods:
        known = " or ".join(f'"{name}"' for name in methods)
        raise ModelError(f'scoring_func "{config.scoring_func}" is not supported: {config.architecture} uses {known}')
    if config.topk_method not in methods[config.scoring_func]:
        known = methods[config.scoring_func]
        raise ModelError(f'topk_method "{config.topk_method}" is not supported: use one of {known}')
    if getattr(config, SPEED, 0) and config.topk_method != "noaux_tc":
        raise ModelError(
            f"{SPEED} is {getattr(config, SPEED)!r}: the routers of {config.architecture} have no biases; leave it out"
        )
    for name in NOT_NEGATIVE:
        value = getattr(config, name, 0)
        if not isinstance(value, int | float) or not value >= 0:
            raise ModelError(f"{name} is {value!r}: it must be a number of at least 0")


def check_config(config: DeepseekV2Config) -> None:
    """Raise ModelError for values with which the model would compute wrong results or none."""
    check_settings(config)
    check_settings_finite(vars(config))
    check_parts(config)
    check_attention(config)
    config.check_own()
    rope, rope_types = config.rope, ROPE_TYPES[config.uses_latents]
    if rope["rope_type"] not in rope_types:
        raise ModelError(f'rope_scaling type "{rope["rope_type"]}" is not supported: use one of {rope_types}')
    if rope["rope_type"] != "default" and "factor" not in rope:
        raise ModelError(f'rope_scaling of type "{rope["rope_type"]}" needs a "factor"')
    for key, value in rope.items():
        if key != "rope_type" and not (is_number(value) and 0 <= value < math.inf):
            raise ModelError(f"rope_scaling {key} is {value!r}: it must be a number, at least 0")
    if (part := rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))) not in (None, 1):
        raise ModelError(f"partial_rotary_factor is {part}: all of qk_rope_head_dim is rotated here, so it must be 1")
    if not rope["rope_theta"] > 0 or not rope.get("factor", 1) > 0:
        raise ModelError(f"rope_theta is {rope['rope_theta']} and factor {rope.get('factor', 1)}: both must be over 0")
    if not config.n_routed_experts:
        return
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    if config.moe_layer_freq < 1:
        raise ModelError(f"moe_layer_freq is {config.moe_layer_freq}: it must be at least 1")
    if not top_k or not 1 <= top_k <= experts:
        raise ModelError(f"num_experts_per_tok is {top_k}: it must be from 1 to n_routed_experts ({experts})")
    if config.n_group and experts % config.n_group:
        raise ModelError(f"n_group is {config.n_group}: it must divide n_routed_experts ({experts})")
    if config.topk_method != "greedy":
        groups, kept_groups = config.n_group, config.topk_group
        if not groups:
            raise ModelError(f"n_group is not set: {config.topk_method} needs it")
        if config.topk_method == "noaux_tc" and experts < 2 * groups:
            raise ModelError(f"n_group is {groups}: noaux_tc needs at least 2 of the {experts} experts in each group")
        if not kept_groups or kept_groups > groups or kept_groups * (experts // groups) < top_k:
            raise ModelError(
                f"topk_group is {kept_groups}: it must be at most n_group ({groups}), and its groups must hold "
                f"num_experts_per_tok ({top_k}) experts"
            )


def check_attention(config: DeepseekV2Config) -> None:
    """Raise ModelError for sizes of attention that no model can have."""
    if config.uses_latents:
        if config.kv_lora_rank is None:
            raise ModelError("kv_lora_rank is null: latent attention needs it; a model without it has use_mla: false")
        return
    width, heads, key_heads = config.attention_sizes.rope, config.num_attention_heads, config.num_key_value_heads
    if width % 2:
        raise ModelError(f"the heads' width, hidden_size / num_attention_heads, is {width}: it must be even")
    if not key_heads or heads % key_heads:
        raise ModelError(f"num_key_value_heads is {key_heads}: it must divide num_attention_heads ({heads})")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_sizes(values: Mapping[str, Any], uses_latents: bool = True) -> None:
    """Raise ModelError for implausible numbers: sizes of 0, and sizes so large that building even a meta model would
    take forever. uses_latents: whether the sizes of latents have an effect."""
    values = {name: value for name, value in values.items() if uses_latents or name not in OF_LATENTS}
    for name in {**LARGEST, **SMALLEST}:
        value = values.get(name)
        smallest, largest = SMALLEST.get(name, 1), LARGEST.get(name)
        if not is_number(value):
            continue
        if largest is not None and not value <= largest:
            raise ModelError(f"{name} is {value}: it must be at most {largest:,}")
        if not value >= smallest:
            raise ModelError(f"{name} is {value}: it must be at least {smallest}")
    if (values.get("qk_rope_head_dim") or 0) % 2:
        raise ModelError(f"qk_rope_head_dim is {values['qk_rope_head_dim']}: it must be even")


def check_rope_form(name: str, settings: Any) -> None:
    """Raise ModelError for RoPE settings, in either form, that are not a mapping or have invalid numbers."""
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
    """Raise ModelError unless the value is None or a number above 0 (or equal to 0 if `may_be_zero`)."""
    if value is None:
        return
    if not is_number(value) or not (value >= 0 if may_be_zero else value > 0):
        raise ModelError(f"{name} is {value!r}: it must be a number {'of at least' if may_be_zero else 'above'} 0")


def check_parts(config: Any) -> None:
    """Raise ModelError for an unknown activation, an invalid pad_token_id or invalid class names."""
    if config.hidden_act not in ACT2FN:
        raise ModelError(f'hidden_act "{config.hidden_act}" is not supported; DeepSeek-V2 uses "silu"')
    padding = config.pad_token_id
    if padding is not None and not (is_number(padding) and 0 <= padding < config.vocab_size):
        raise ModelError(
            f"pad_token_id is {padding!r}: it must be from 0 to {config.vocab_size - 1} (vocab_size - 1), or null"
        )
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"architectures is {names!r}: it must be a list of class names")


def check_file_values(values: Any, config_class: type) -> None:
    """Check the raw values of a config.json before a config is created from them.

    Raises:
        ModelError: they are not a JSON object, or contain the name of a method, a setting of a call, or an invalid
        type.
    """
    if not isinstance(values, dict):
        raise ModelError(f"it must be a JSON object, and is {type(values).__name__}")
    for key in values:
        attribute = inspect.getattr_static(config_class, key, None)
        is_read_only = isinstance(attribute, property) and attribute.fset is None
        if is_read_only or inspect.isroutine(attribute) or isinstance(attribute, classmethod | staticmethod):
            raise ModelError(f'"{key}" is not a model setting; remove it')
    for key, kind in TYPES.items():
        if not isinstance(values.get(key), kind | None):
            raise ModelError(f"{key} is {values[key]!r}: it must be {'a number' if kind is int else 'an object'}")
    for key in ("dtype", "torch_dtype"):
        if isinstance(name := values.get(key), str):
            dtype = getattr(torch, name.removeprefix("torch."), None)
            if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ModelError(f'{key} is "{name}": use float32, bfloat16 or float16')
    if parts := [key for key in PARTS if values.get(key) is not None]:
        raise ModelError(f"{parts[0]}: this is the config of a larger model, with DeepSeek-V2 as one part of it")
    for key, default in OF_A_CALL.items():
        if values.get(key) not in (None, default):
            raise ModelError(f"{key} is {values[key]!r}: it belongs to a call, not to a model; remove it")
    for key in ("attn_implementation", "_attn_implementation"):
        name = values.get(key)
        if name is not None and "/" in str(name):
            raise ModelError(
                f"attn_implementation {name} is a kernel of the hub, whose code is never run here; remove it"
            )
        if name not in (None, *ATTENTION):
            raise ModelError(f"{key} is {name!r}: use one of {', '.join(ATTENTION)}")


def check_settings_finite(settings: Mapping[str, Any], where: str = "") -> None:
    """Raise ModelError if a number in the settings of a config, at any depth, is not finite."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            check_settings_finite(value, f"{where}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{where}{key} is {value}: it must be a finite number")
