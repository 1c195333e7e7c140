"""Routing replay: keep the experts that a forward chose and use them again.

Policy-gradient training recomputes the log-probabilities of tokens that were sampled before. A router that
flips in between makes the ratio noisy; replaying the recorded choice removes that, while the weights of the
chosen experts still come from the gate and still get gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Routes = list[list[torch.Tensor]]  # one list a forward: the experts of each MoE layer, [B, T, K]


def _backbone(model: nn.Module) -> Any:
    for module in model.modules():
        if getattr(module, "keeps_balance", False):
            return module
    raise ValueError(f"{type(model).__name__} holds no DeepseekV2Model")


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Routes]:
    """Keeps the chosen experts of every forward made while it is open, in order (`generate` makes one a token).

    A recording inside another one is part of both.
    """
    backbone, routes = _backbone(model), list[list[torch.Tensor]]()
    outer = backbone.recordings
    backbone.recordings = (*outer, routes)
    try:
        yield routes
    finally:
        backbone.recordings = outer


@contextmanager
def replay_routing(model: nn.Module, routes: Routes) -> Iterator[None]:
    """The n-th forward made while it is open uses the experts of the n-th entry of `routes`.

    Raises:
        ValueError: at a forward whose shape or number of MoE layers is not the recording's, or past its end; at the
            end, where the recording has more forwards than were made; where a replay is open on this model already.
    """
    backbone = _backbone(model)
    if backbone.replayed_routes is not None:
        raise ValueError("a routing replay is open on this model already")
    rest = backbone.replayed_routes = iter(list(routes))
    try:
        yield
    finally:
        backbone.replayed_routes = None
    if left := len(list(rest)):
        raise ValueError(
            f"{left} of the {len(routes)} forwards of the recorded routing were not replayed: make as many forwards "
            "as were recorded, or replay a part of the recording"
        )


def next_routes(
    replayed: Iterator[list[torch.Tensor]] | None, layers: int, shape: tuple[int, int, int]
) -> list[torch.Tensor] | None:
    """The experts to use in this forward, checked against (B, T, K); None when nothing is replayed."""
    if replayed is None:
        return None
    routes = next(replayed, None)
    if routes is None:
        raise ValueError("the recorded routing has no entry left for this forward")
    shapes = {tuple(r.shape) for r in routes}
    if len(routes) != layers or shapes - {shape}:
        raise ValueError(
            f"the recorded routing has {len(routes)} layers of shape {sorted(shapes)}, "
            f"this forward has {layers} of shape {shape}"
        )
    return routes
