"""LoRA for DeepSeek-V2: the possible targets, a stock PEFT config for them, and a table of adapted weights.

Attention projections are `target_modules`. Routed experts, shared experts, dense layers and the router are
`target_parameters`: if `gate_proj` and the like were named as modules, PEFT would adapt the routed experts and silently
skip shared experts and dense layers. Stock PEFT can load the saved adapters.
"""

import copy
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.strict import StrictPreTrainedModel
from ..errors import ModelError
from ..esft.choice import ExpertChoice
from ..layers.quantization import tell_shapes
from .chosen_experts import ChosenWrapper, train_chosen_adapters

Number = int | float
REFERENCE = "ref"


@dataclass(frozen=True)
class Projection:
    """A projection's names for PEFT: suffixes of module names, or of parameter names."""

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


_MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS: dict[str, Projection] = {
    "attention.q": Projection(modules=("q_proj", "q_a_proj", "q_b_proj")),
    "attention.k": Projection(modules=("k_proj",)),
    "attention.v": Projection(modules=("v_proj",)),
    "attention.kv_a": Projection(modules=("kv_a_proj_with_mqa",)),
    "attention.kv_b": Projection(modules=("kv_b_proj",)),
    "attention.o": Projection(modules=("o_proj",)),
    "experts.gate_up": Projection(parameters=("mlp.experts.gate_up_proj",)),
    "experts.down": Projection(parameters=("mlp.experts.down_proj",)),
    "shared_experts": Projection(parameters=tuple(f"mlp.shared_experts.{name}.weight" for name in _MLP)),
    "dense": Projection(parameters=tuple(f"mlp.{name}.weight" for name in _MLP)),
    "router": Projection(parameters=("mlp.gate.weight",)),
    "embeddings": Projection(modules=("embed_tokens",)),
    "lm_head": Projection(modules=("lm_head",)),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": tuple(name for name in PROJECTIONS if name.startswith("attention.")),
    "experts": tuple(name for name in PROJECTIONS if name.startswith("experts.")),
}
# What the group `attention` names that is only in one kind of attention, by whether that is latent.
ONLY_IN = {True: ("attention.kv_a", "attention.kv_b"), False: ("attention.k", "attention.v")}


def expand_target(target: str) -> tuple[str, ...]:
    """A target's projections: ("attention.q", ...) for the group "attention", itself for a single projection. Raises
    ModelError for an unknown target."""
    if target in GROUPS:
        return GROUPS[target]
    if target in PROJECTIONS:
        return (target,)
    raise ModelError(f'unknown LoRA target "{target}": use {", ".join([*GROUPS, *PROJECTIONS])}')


def _per_projection(targets: Iterable[str], value: Number | Mapping[str, Number], field: str) -> dict[str, Number]:
    """{projection: value}; a projection's own entry takes precedence over its group's."""
    targets = list(targets)
    if not isinstance(value, Mapping):
        return {name: value for target in targets for name in expand_target(target)}
    unknown = [key for key in value if not set(expand_target(key)) & {n for t in targets for n in expand_target(t)}]
    if unknown:
        raise ModelError(f'{field} names "{unknown[0]}", which is not among the LoRA targets {targets}')
    values = {name: value[key] for key in value if key in GROUPS for name in expand_target(key)}
    values |= {key: value[key] for key in value if key in PROJECTIONS}
    projections = [name for target in targets for name in expand_target(target)]
    missing = [name for name in projections if name not in values]
    if missing and tuple(missing) not in ONLY_IN.values():  # values for one kind of attention are enough
        raise ModelError(f'{field} gives no value for the LoRA target "{missing[0]}"')
    return {name: values[name] for name in projections if name in values}


def _pattern(values: Mapping[str, Number]) -> dict[str, Number]:
    """PEFT's rank_pattern or alpha_pattern: name suffix -> value."""
    names = {n: (*PROJECTIONS[n].modules, *PROJECTIONS[n].parameters) for n in values}
    return {suffix: value for n, value in values.items() for suffix in names[n]}


def lora_config(
    targets: str | Iterable[str] = ("attention", "experts"),
    r: int | Mapping[str, int] = 16,
    alpha: Number | Mapping[str, Number] | None = None,
    rslora: bool = False,
    task_type: str = "CAUSAL_LM",
    dropout: float = 0.0,
) -> LoraConfig:
    """A stock `peft.LoraConfig` for these targets.

    Args:
        targets: groups (attention, experts) or single projections of `PROJECTIONS`; one target may be a plain string.
            `attention` names the projections of latent and of plain attention; `apply_lora` leaves out the model's
            other kind.
        r, alpha: a number, or one for each target; alpha defaults to 2 r. The scaling is alpha / r, or alpha / sqrt(r)
            with rslora.
        dropout: the dropout that `apply_lora` sets at run time. The config's own `lora_dropout` is 0, in memory and on
            disk, as stock PEFT requires for experts.

    Raises:
        ModelError: a target is unknown, a rank or alpha is given for something that is not a target, or a number is out
            of bounds.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise ModelError("LoRA needs at least one target")
    ranks = _per_projection(targets, r, "r")
    if bad := [n for n, v in ranks.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1]:
        raise ModelError(f'the LoRA rank of "{bad[0]}" is {ranks[bad[0]]!r}: it must be a whole number, at least 1')
    alphas = {n: 2 * v for n, v in ranks.items()} if alpha is None else _per_projection(targets, alpha, "alpha")
    if bad := [n for n, v in alphas.items() if not isinstance(v, Number) or not 0 < v < math.inf]:
        raise ModelError(f'the LoRA alpha of "{bad[0]}" is {alphas[bad[0]]!r}: it must be a number over 0')
    check_dropout(dropout)
    one_rank, one_alpha = len(set(ranks.values())) == 1, len(set(alphas.values())) == 1
    config: Any = LoraConfig(
        r=int(next(iter(ranks.values()))),
        lora_alpha=next(iter(alphas.values())),  # pyright: ignore[reportArgumentType] - PEFT takes floats
        rank_pattern={} if one_rank else _pattern(ranks),
        alpha_pattern={} if one_alpha else _pattern(alphas),
        target_modules=[suffix for n in ranks for suffix in PROJECTIONS[n].modules],
        target_parameters=[suffix for n in ranks for suffix in PROJECTIONS[n].parameters] or None,
        use_rslora=rslora,
        task_type=task_type,
    )
    config.runtime_dropout = dropout  # not a field of the config, so PEFT neither saves nor uses it
    return config


@dataclass(frozen=True)
class LoraSettings:
    """The settings of a recipe's `lora` section."""

    targets: tuple[str, ...]
    r: int | Mapping[str, int] = 16
    alpha: Number | Mapping[str, Number] | None = None
    dropout: float = 0.0
    rslora: bool = False

    def config(self, task_type: str) -> LoraConfig:
        return lora_config(self.targets, self.r, self.alpha, self.rslora, task_type, self.dropout)


def check_dropout(dropout: float) -> None:
    """Raise ModelError unless the dropout is a number from 0 to less than 1."""
    if not isinstance(dropout, Number) or not 0 <= dropout < 1:
        raise ModelError(f"LoRA dropout is {dropout!r}: it must be from 0 to less than 1")


def of_its_attention(config: LoraConfig, settings: Any) -> LoraConfig:
    """A copy without what the group `attention` names for the other kind of attention. settings: the model's config."""
    config = copy.copy(config)
    group = {suffix for name in GROUPS["attention"] for suffix in PROJECTIONS[name].modules}
    if not isinstance(config.target_modules, list | set) or not group <= set(config.target_modules):
        return config
    other = {suffix for name in ONLY_IN[not settings.uses_latents] for suffix in PROJECTIONS[name].modules}
    config.target_modules = type(config.target_modules)(n for n in config.target_modules if n not in other)
    for field in ("rank_pattern", "alpha_pattern"):
        setattr(config, field, {k: v for k, v in getattr(config, field).items() if k not in other})
    return config


def check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise ModelError if one of the config's projections matches nothing in the model, other than projections of the
    other kind of attention (`of_its_attention`)."""
    config = of_its_attention(config, model.config)
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for name, projection in PROJECTIONS.items():
        wanted_modules = set(projection.modules) & set(config.target_modules or ())
        wanted_parameters = set(projection.parameters) & set(config.target_parameters or ())
        if not wanted_modules and not wanted_parameters:
            continue
        matches = any(m.split(".")[-1] in wanted_modules for m in modules) or any(
            p.endswith(f".{w}") for p in parameters for w in wanted_parameters
        )
        if not matches:
            raise ModelError(f'the LoRA target "{name}" matches nothing in this model: leave it out')


def check_new_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise ModelError as `check_targets`, and for embeddings that are the lm_head too: they would differ, so that the
    adapter could not be merged."""
    check_targets(model, config)
    adapted = set(config.target_modules or ())
    tied = [name for name in ("embeddings", "lm_head") if set(PROJECTIONS[name].modules) & adapted]
    if tied and model.config.tie_word_embeddings:
        raise ModelError(
            f'the LoRA target "{tied[0]}": embeddings and lm_head of this model are one (tie_word_embeddings), and '
            "would differ: leave it out"
        )


def apply_lora(
    model: PreTrainedModel, config: LoraConfig, dropout: float | None = None, experts: ExpertChoice | None = None
) -> PeftModel:
    """Wrap the model in a stock `PeftModel`, whose expert adapters are computed for the routed tokens only.

    Args:
        dropout: dropout on the input of every adapter at run time; None uses that of `lora_config`. It is not saved.
            Adapters on embeddings have none, as in PEFT, since their input is token ids.
        experts: the routed experts that get adapters; None for all.

    Raises:
        ModelError: the model is not one of this package or has adapters already, a target matches nothing in it or is
            tied to another weight, or experts do not exist.
    """
    runtime_dropout: float = getattr(config, "runtime_dropout", 0.0) if dropout is None else dropout
    check_model(model)
    check_new_targets(model, config)
    peft_model = wrap(model, config)
    if experts is not None:
        train_chosen_adapters(peft_model, experts)
    train_in_float32(peft_model)
    set_dropout(peft_model, runtime_dropout)
    return peft_model


def add_reference(model: PeftModel) -> None:
    """Add a frozen copy of the adapter, named as by TRL's GRPOTrainer: what the KL is measured against in RL."""
    model.add_adapter(REFERENCE, model.peft_config["default"])
    own = dict(model.named_parameters())
    for name in own:
        if f".{REFERENCE}." in name:
            module, _, last = name.rpartition(".")
            copied = own[name.replace(f".{REFERENCE}.", ".default.")].detach().clone()
            model.get_submodule(module).register_parameter(last, nn.Parameter(copied, requires_grad=False))


def wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`get_peft_model` after `check_model` and `check_targets`, with a copy of the config (`of_its_attention`)."""
    check_model(model)
    config = of_its_attention(config, model.config)
    check_targets(model, config)
    for holder, name in ((config, "base_model_name_or_path"), (model, "name_or_path")):  # PEFT compares the two
        setattr(holder, name, absolute_base(getattr(holder, name)))
    tell_shapes(model)
    with warnings.catch_warnings():
        # PEFT checks the keys of rank_pattern against modules only, and warns that keys for parameters are ignored,
        # although it uses them.
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")
        return get_peft_model(model, config)  # pyright: ignore[reportReturnType]


def check_model(model: nn.Module) -> None:
    """Raise ModelError for a model that already has adapters, or is not one of this package."""
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ModelError(
            "this model has LoRA adapters already; a further one of the same targets is added with PEFT's "
            "add_adapter(name, config), and merge_and_unload() gives a model without"
        )
    if not isinstance(model, StrictPreTrainedModel):
        kind = type(model)
        raise ModelError(
            f"{kind.__module__}.{kind.__name__} is not a model of this package; load it with "
            "deepseek_v2_modeling.DeepseekV2ForCausalLM.from_pretrained, or use PEFT itself"
        )


def absolute_base(base: str | None) -> str | None:
    """The base's name for an adapter's config: an absolute path for a directory, a hub name unchanged."""
    return os.path.abspath(base) if base and os.path.isdir(base) else base


def train_in_float32(model: nn.Module) -> None:
    """Convert trainable weights to float32, since small updates are lost in bf16. PEFT converts adapters, but not a
    score head."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Set the run-time dropout of all LoRA adapters except those on embeddings, where PEFT's forward has none."""
    check_dropout(dropout)
    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, Embedding):
            for name in list(module.lora_dropout):
                module.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()


@dataclass
class AdaptedRow:
    """One row of the table of adapted weights. experts, of_experts: the number of experts with adapters, and of all
    experts in these layers; None if all have adapters."""

    projection: str
    layers: int
    rank: int
    alpha: float
    scaling: float
    dropout: float
    parameters: int = 0
    experts: int | None = None
    of_experts: int | None = None


def adapted_modules(model: nn.Module, adapter: str = "default") -> list[dict]:
    """Rows {projection, layers, rank, alpha, scaling, dropout, parameters} of the weights that have LoRA adapters, with
    {experts, of_experts} if only chosen experts have them. dropout: at run time."""
    rows: dict[str, AdaptedRow] = {}
    for name, module in model.named_modules():
        if not (isinstance(module, LoraLayer) and isinstance(module, nn.Module) and adapter in module.r):
            continue
        path = name.replace(".base_layer", "")
        suffix = f".{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
        kind = ".".join(part for part in (path + suffix).split(".layers.")[-1].split(".") if not part.isdigit())
        kind = kind.removeprefix("base_model.model.").removeprefix("model.")
        numbers = (module.r[adapter], float(module.lora_alpha[adapter]), float(module.scaling[adapter]))
        row = rows.setdefault(kind, AdaptedRow(kind, 0, *numbers, getattr(module.lora_dropout[adapter], "p", 0.0)))
        row.layers += 1
        own = [(n.split("."), p) for n, p in module.named_parameters()]
        row.parameters += sum(p.numel() for n, p in own if n[0] != "base_layer" and adapter in n)
        if isinstance(module, ChosenWrapper):
            row.experts = (row.experts or 0) + len(module.chosen)
            row.of_experts = (row.of_experts or 0) + module.num_experts
    return [{key: value for key, value in asdict(row).items() if value is not None} for row in rows.values()]
