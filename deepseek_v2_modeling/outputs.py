"""What the model's forwards return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast


@dataclass
class DeepseekV2ModelOutput(MoeModelOutputWithPast):
    """Stock's output and `aux_loss`: the sum of the balance losses, coefficients included, or None."""

    aux_loss: torch.Tensor | None = None
