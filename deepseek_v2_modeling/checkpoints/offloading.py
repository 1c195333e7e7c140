"""Weights that accelerate keeps on the CPU or on disk (`device_map`), for modules that others read directly.

accelerate brings a module's weights when its own `forward` is called. The routed experts' is never called, and
absorbed decoding reads kv_b_proj's weight: their owners have to bring them, or they would compute with nothing.
"""

from typing import Any

from torch import nn

from ..layers.attention import DeepseekV2Attention
from ..layers.moe import DeepseekV2MoE

READ_DIRECTLY = {DeepseekV2MoE: "experts", DeepseekV2Attention: "kv_b_proj"}


def keep_readable(model: nn.Module) -> None:
    """Makes the owners of modules that are read directly bring their offloaded weights, for the owner's forward."""
    for module in model.modules():
        name = READ_DIRECTLY.get(type(module))  # pyright: ignore[reportArgumentType]
        part: Any = getattr(module, name) if name else None
        if getattr(getattr(part, "_hf_hook", None), "offload", False):
            bring_with(module, part)


def bring_with(owner: nn.Module, part: Any) -> None:
    """Runs the hook of `part` around the forward of `owner`."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class BringPart(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            part._hf_hook.pre_forward(part)
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            part._hf_hook.post_forward(part, None)
            return output

    add_hook_to_module(owner, BringPart(), append=True)
