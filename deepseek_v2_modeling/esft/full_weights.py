"""Full fine-tuning of chosen experts: float32 copies of their weights are trained, and everything else is frozen.

The fused weights keep their dtype, and before every product the chosen experts' part is overwritten with the trained
copy. So the product is the usual one, but its gradient is computed for the chosen experts only, [n, O, I]. Saved models
have the usual files.

E experts, n of them chosen, S rows (token-expert slots, sorted by expert), I inputs, O outputs.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..configuration import CORRECTION_BIAS
from ..errors import ModelError
from ..kernels.grouped_products import ActiveAdapter, Groups, blocks
from ..layers.moe import DeepseekV2Experts, DeepseekV2MoE
from .choice import ExpertChoice

FUSED = ("gate_up_proj", "down_proj")
TRAINED = "trained.safetensors"  # in a checkpoint: the trained weights in float32, which the model's files may round


class ChosenExperts(DeepseekV2Experts):
    """The routed experts of a layer, some of which are trained, as `chosen_gate_up_proj` [n, 2F, D] and
    `chosen_down_proj` [n, D, F], both float32."""

    chosen: torch.Tensor

    def choose(self, chosen: tuple[int, ...]) -> None:
        """Create the trainable copies of the chosen experts' weights."""
        device = self.gate_up_proj.device
        self.register_buffer("chosen", torch.tensor(chosen, dtype=torch.long, device=device), persistent=False)
        for name in FUSED:
            copy = getattr(self, name).detach()[self.chosen].float()
            self.register_parameter(f"chosen_{name}", nn.Parameter(copy))

    def linear(self, name: str, groups: Groups, x_SI: torch.Tensor, adapters: list[ActiveAdapter]) -> torch.Tensor:
        self.put_back(name)
        y_SO = super().linear(name, groups, x_SI, adapters)
        return _WithGradient.apply(y_SO, x_SI.detach(), getattr(self, f"chosen_{name}"), groups, self.chosen)

    def put_back(self, name: str) -> None:
        """Write the trained weights into the fused ones."""
        # Through .data, so that autograd does not see saved tensors change; within a step the values stay the same.
        getattr(self, name).data[self.chosen] = getattr(self, f"chosen_{name}").data.to(getattr(self, name).dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in FUSED:
            self.put_back(name)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in FUSED:
            del destination[f"{prefix}chosen_{name}"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in FUSED:
            fused = state_dict.get(f"{prefix}{name}")
            if fused is not None:
                state_dict[f"{prefix}chosen_{name}"] = fused[self.chosen.to(fused.device)]
        super()._load_from_state_dict(state_dict, prefix, *args)


class _WithGradient(torch.autograd.Function):
    """Returns y and makes it depend on the chosen experts' weights, whose gradient is g^T x over their rows."""

    @staticmethod
    def forward(
        ctx: Any, y_SO: torch.Tensor, x_SI: torch.Tensor, w_nOI: torch.Tensor, groups: Groups, chosen: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x_SI, chosen)
        ctx.groups, ctx.dtype = groups, w_nOI.dtype
        return y_SO.view_as(y_SO)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x_SI, chosen = ctx.saved_tensors
        g_SO = grads[0]
        gradient = _looped if ctx.groups.looped else _grouped
        return g_SO, None, gradient(ctx.groups, g_SO, x_SI.to(g_SO.dtype), chosen).to(ctx.dtype), None, None


def _looped(groups: Groups, g_SO: torch.Tensor, x_SI: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The weights' gradient [n, O, I] on a CPU: one product per chosen expert that has rows."""
    dw_nOI = g_SO.new_zeros(len(chosen), g_SO.shape[1], x_SI.shape[1])
    rows = dict(blocks(groups.counts))
    for place, expert in enumerate(chosen.tolist()):
        if expert in rows:
            torch.mm(g_SO[rows[expert]].t(), x_SI[rows[expert]], out=dw_nOI[place])
    return dw_nOI


def _grouped(groups: Groups, g_SO: torch.Tensor, x_SI: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The weights' gradient [n, O, I] on a GPU, without waiting for the group sizes: sorts the chosen experts' rows to
    the front and ignores the others."""
    if not len(chosen):
        return g_SO.new_zeros(0, g_SO.shape[1], x_SI.shape[1])
    ends_E = groups.ends
    place_E = ends_E.new_full(ends_E.shape, len(chosen))
    place_E[chosen] = torch.arange(len(chosen), dtype=place_E.dtype, device=place_E.device)
    expert_S = torch.searchsorted(ends_E, torch.arange(len(g_SO), dtype=ends_E.dtype, device=ends_E.device), right=True)
    order_S = place_E[expert_S.clamp(max=len(ends_E) - 1)].argsort(stable=True)
    sizes_n = ends_E.diff(prepend=ends_E.new_zeros(1))[chosen]
    return F.grouped_mm(g_SO[order_S].t(), x_SI[order_S], offs=sizes_n.cumsum(0).to(torch.int32))


def train_chosen_experts(model: PreTrainedModel, choice: ExpertChoice) -> None:
    """Freeze the model except for the chosen experts and, in a reward model, the score head.

    Raises:
        ModelError: the choice does not fit the model.
    """
    config: Any = model.config
    choice.check(config)
    model.requires_grad_(False)
    if isinstance(head := getattr(model, "score", None), nn.Module):
        head.requires_grad_(True)
    layers: Any = model.get_decoder().layers
    for layer, chosen in choice.layers.items():
        block: DeepseekV2MoE = layers[layer].mlp
        experts: Any = block.experts
        experts.__class__ = ChosenExperts
        experts.choose(chosen)


def trained_experts(model: nn.Module) -> dict[str, ChosenExperts]:
    """{name: experts} of the layers that train chosen experts."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ChosenExperts)}


def trained_rows(model: nn.Module) -> list[dict[str, Any]]:
    """Rows {projection, layers, parameters, experts, of_experts} of the table of trained weights; empty unless the
    model trains chosen experts."""
    modules = trained_experts(model).values()
    return [
        {
            "projection": f"mlp.experts.{name}",
            "layers": len(modules),
            "parameters": sum(getattr(module, f"chosen_{name}").numel() for module in modules),
            "experts": sum(len(module.chosen) for module in modules),
            "of_experts": sum(module.num_experts for module in modules),
        }
        for name in FUSED
        if modules
    ]


def _trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights and the routers' biases, and for each layer the indices of its chosen experts."""
    tensors = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name.endswith(CORRECTION_BIAS)}
    return tensors | {f"{name}.chosen": module.chosen for name, module in trained_experts(model).items()}


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the trained weights into a checkpoint, for `load_trained`; a no-op unless the model trains chosen
    experts."""
    if trained_experts(model):
        tensors = {name: tensor.cpu().contiguous() for name, tensor in _trained_tensors(model).items()}
        save_file(tensors, folder / TRAINED, metadata={"format": "pt"})


def load_trained(model: nn.Module, folder: Path) -> bool:
    """Load the trained weights from a checkpoint; False, and a no-op, unless the model trains chosen experts.

    Raises:
        ModelError: the checkpoint's run trained different experts.
    """
    if not trained_experts(model):
        return False
    tensors, saved = _trained_tensors(model), load_file(folder / TRAINED)
    chosen = [name for name in tensors if name.endswith(".chosen")]
    if differs := [n for n in chosen if not torch.equal(saved.get(n, torch.empty(0)), tensors[n].cpu())]:
        raise ModelError(f"{folder}: this run trained other experts of {differs[0]}; put the old experts file back")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
    return True
