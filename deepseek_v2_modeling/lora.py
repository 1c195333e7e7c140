"""LoRA for DeepSeek-V2: what can be adapted, a stock peft config for it, and the table of what was adapted.

Attention projections are `target_modules`. Routed experts, shared experts, dense layers and the router are
`target_parameters`: naming `gate_proj` and the like as modules makes PEFT take the routed experts and drop the
shared ones and the dense layers without a word. Stock PEFT reloads the adapters as they are saved.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from .chosen_lora import ChosenWrapper, train_chosen_adapters
from .errors import ModelError
from .expert_choice import ExpertChoice

Number = int | float


@dataclass(frozen=True)
class Projection:
    """How one projection is named: suffixes of module names, or of parameter names."""

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


_MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS: dict[str, Projection] = {
    "attention.q": Projection(modules=("q_proj", "q_a_proj", "q_b_proj")),
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


def expand_target(target: str) -> tuple[str, ...]:
    """A target's projections: ("attention.q", ...) for "attention", itself for a single one."""
    if target in GROUPS:
        return GROUPS[target]
    if target in PROJECTIONS:
        return (target,)
    raise ModelError(f'unknown LoRA target "{target}": use {", ".join([*GROUPS, *PROJECTIONS])}')


def _per_projection(targets: Iterable[str], value: Number | Mapping[str, Number], what: str) -> dict[str, Number]:
    """{projection: value}; a single projection's own entry wins over its group's."""
    targets = list(targets)
    if not isinstance(value, Mapping):
        return {name: value for target in targets for name in expand_target(target)}
    unknown = [key for key in value if not set(expand_target(key)) & {n for t in targets for n in expand_target(t)}]
    if unknown:
        raise ModelError(f'{what} names "{unknown[0]}", which is not among the LoRA targets {targets}')
    found = {name: value[key] for key in value if key in GROUPS for name in expand_target(key)}
    found |= {key: value[key] for key in value if key in PROJECTIONS}
    wanted = [name for target in targets for name in expand_target(target)]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ModelError(f'{what} gives no value for the LoRA target "{missing[0]}"')
    return {name: found[name] for name in wanted}


def _pattern(values: Mapping[str, Number]) -> dict[str, Number]:
    """PEFT's rank_pattern or alpha_pattern: name suffix -> value."""
    names = {n: (*PROJECTIONS[n].modules, *PROJECTIONS[n].parameters) for n in values}
    return {suffix: value for n, value in values.items() for suffix in names[n]}


def lora_config(
    targets: Iterable[str] = ("attention", "experts"),
    r: int | Mapping[str, int] = 16,
    alpha: Number | Mapping[str, Number] | None = None,
    rslora: bool = False,
    task_type: str = "CAUSAL_LM",
) -> LoraConfig:
    """A stock `peft.LoraConfig` for these targets.

    targets: groups (attention, experts) or single projections of `PROJECTIONS`.
    r, alpha: a number, or one for each target; alpha defaults to 2 r. Scaling is alpha / r, or alpha / sqrt(r)
        with rslora.
    The config's `lora_dropout` is 0, as stock PEFT demands for experts; see `apply_lora` for dropout.

    Raises:
        ModelError: an unknown target, or a rank or alpha for something that is not a target.
    """
    targets = list(targets)
    if not targets:
        raise ModelError("LoRA needs at least one target")
    ranks = _per_projection(targets, r, "r")
    alphas = {n: 2 * v for n, v in ranks.items()} if alpha is None else _per_projection(targets, alpha, "alpha")
    if bad := [n for n, v in ranks.items() if v < 1]:
        raise ModelError(f'the LoRA rank of "{bad[0]}" is {ranks[bad[0]]}: it must be at least 1')
    one_rank, one_alpha = len(set(ranks.values())) == 1, len(set(alphas.values())) == 1
    return LoraConfig(
        r=int(next(iter(ranks.values()))),
        lora_alpha=next(iter(alphas.values())),  # pyright: ignore[reportArgumentType] - PEFT takes floats
        rank_pattern={} if one_rank else _pattern(ranks),
        alpha_pattern={} if one_alpha else _pattern(alphas),
        target_modules=[suffix for n in ranks for suffix in PROJECTIONS[n].modules],
        target_parameters=[suffix for n in ranks for suffix in PROJECTIONS[n].parameters] or None,
        use_rslora=rslora,
        task_type=task_type,
    )


def check_targets(model: nn.Module, config: LoraConfig) -> None:
    """Raises ModelError when one of the config's projections matches nothing in the model."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for name, projection in PROJECTIONS.items():
        wanted_modules = set(projection.modules) & set(config.target_modules or ())
        wanted_parameters = set(projection.parameters) & set(config.target_parameters or ())
        if not wanted_modules and not wanted_parameters:
            continue
        hit = any(m.split(".")[-1] in wanted_modules for m in modules) or any(
            p.endswith(f".{w}") for p in parameters for w in wanted_parameters
        )
        if not hit:
            raise ModelError(f'the LoRA target "{name}" matches nothing in this model: leave it out')


def apply_lora(
    model: PreTrainedModel, config: LoraConfig, dropout: float = 0.0, experts: ExpertChoice | None = None
) -> PeftModel:
    """A stock `PeftModel` around the model, whose expert adapters run on the routed tokens only.

    dropout acts on the input of every adapter (of embeddings there is none) at run time; it is not written to disk.
    experts: the routed experts that get adapters; all without.

    Raises:
        ModelError: a target matches nothing in the model, or the experts are not there.
    """
    peft_model = wrap(model, config)
    if experts is not None:
        train_chosen_adapters(peft_model, experts)
    train_in_float32(peft_model)
    set_dropout(peft_model, dropout)
    return peft_model


def wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`get_peft_model` after `check_targets`."""
    check_targets(model, config)
    with warnings.catch_warnings():
        # PEFT looks for the keys of rank_pattern among modules only and says that those of parameters, which it
        # uses all the same, are ignored.
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")
        return get_peft_model(model, config)  # pyright: ignore[reportReturnType]


def train_in_float32(model: nn.Module) -> None:
    """PEFT makes adapters float32 on its own, but not a score head."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Sets the run-time dropout of all LoRA adapters."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in list(module.lora_dropout):
                module.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()


@dataclass
class AdaptedRow:
    """One line of the table of what is adapted. experts: those that train, of all in these layers; None for all."""

    projection: str
    layers: int
    rank: int
    alpha: float
    parameters: int
    experts: int | None = None
    of_experts: int | None = None


def adapted_modules(model: nn.Module, adapter: str = "default") -> list[dict]:
    """Rows {projection, layers, rank, alpha, parameters} of what LoRA adapts in this model; {experts, of_experts} too
    where chosen ones train."""
    rows: dict[str, AdaptedRow] = {}
    for name, module in model.named_modules():
        if not (isinstance(module, LoraLayer) and isinstance(module, nn.Module) and adapter in module.r):
            continue
        path = name.replace(".base_layer", "")
        suffix = f".{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
        kind = ".".join(part for part in (path + suffix).split(".layers.")[-1].split(".") if not part.isdigit())
        kind = kind.removeprefix("base_model.model.").removeprefix("model.")
        row = rows.setdefault(kind, AdaptedRow(kind, 0, module.r[adapter], float(module.lora_alpha[adapter]), 0))
        row.layers += 1
        own = [(n.split("."), p) for n, p in module.named_parameters()]
        row.parameters += sum(p.numel() for n, p in own if n[0] != "base_layer" and adapter in n)
        if isinstance(module, ChosenWrapper):
            row.experts = (row.experts or 0) + len(module.chosen)
            row.of_experts = (row.of_experts or 0) + module.num_experts
    return [{key: value for key, value in asdict(row).items() if value is not None} for row in rows.values()]
