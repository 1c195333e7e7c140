"""Support for weights that accelerate offloads to the CPU or to disk (`device_map`), in modules whose forward is
bypassed.

accelerate loads a module's weights when its own `forward` is called. That of the routed experts is never called, and
absorbed decoding reads kv_b_proj's weight directly, so the parent modules have to load these weights.
"""

from typing import Any

from torch import nn

from ..layers.attention import DeepseekV2Attention
from ..layers.moe import DeepseekV2MoE

READ_DIRECTLY = {DeepseekV2MoE: "experts", DeepseekV2Attention: "kv_b_proj"}


def keep_readable(model: nn.Module) -> None:
    """Make the parents of modules whose weights are read directly load them, if offloaded, around their forward."""
    for module in model.modules():
        name = READ_DIRECTLY.get(type(module))  # pyright: ignore[reportArgumentType]
        part: Any = getattr(module, name) if name else None
        if getattr(getattr(part, "_hf_hook", None), "offload", False):
            bring_with(module, part)


def bring_with(owner: nn.Module, part: Any) -> None:
    """Run the accelerate hook of `part` around the forward of `owner`."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class BringPart(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            part._hf_hook.pre_forward(part)
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            part._hf_hook.post_forward(part, None)
            return output

    add_hook_to_module(owner, BringPart(), append=True)
