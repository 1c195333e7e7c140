"""The devices of this machine, for recipe keys that name one. Imports torch."""

import torch

from conversations.errors import ToolkitError


def devices() -> list[str]:
    """What a recipe can name: cpu, and for accelerators their kind and each one's number."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", accelerator.type, *(f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count()))]


def check_device(key: str, name: str) -> None:
    """Raise ToolkitError if this machine has no such device. key: where the recipe names it."""
    if name not in (known := devices()):
        raise ToolkitError(
            f'{key}: "{name}" is not on this machine, which has {", ".join(known)}; name one of these, or leave it out '
            "for the device of training"
        )
