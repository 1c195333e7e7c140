"""The routed experts for one token on a CPU, without gradients, as when one answer is decoded: each chosen expert's
weights are read where they lie, and nothing is sorted.

K experts, E experts in all, D hidden, F expert width.
"""

import torch
from torch import nn


def experts_of_one_token(
    x_1D: torch.Tensor,
    weights_1K: torch.Tensor,
    experts_1K: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    activation: nn.Module,
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, [1, D] float32; x is in the dtype of the weights."""
    chosen = experts_1K[0].tolist()
    with torch.autocast("cpu", enabled=False):
        gate_KF, up_KF = torch.cat([torch.mm(x_1D, gate_up_E2FD[e].t()) for e in chosen]).chunk(2, dim=-1)
        hidden_KF = activation(gate_KF) * up_KF
        y_KD = torch.cat([torch.mm(h, down_EDF[e].t()) for h, e in zip(hidden_KF.split(1), chosen, strict=True)])
        return weights_1K.float() @ y_KD.float()
