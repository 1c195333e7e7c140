"""Routing replay: records the experts chosen in a forward and uses them again in a later one.

Policy-gradient training recomputes the log-probabilities of tokens that were sampled earlier. If the router then
chooses other experts, the ratio becomes noisy. Replaying the recorded choice avoids this; the gate weights of the
chosen experts are still computed and still get gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Routes = list[list[torch.Tensor]]  # one list per forward: the experts of each MoE layer, [B, T, K]


def _backbone(model: nn.Module) -> Any:
    for module in model.modules():
        if getattr(module, "keeps_balance", False):
            return module
    raise ValueError(f"{type(model).__name__} holds no DeepseekV2Model")


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Routes]:
    """Context manager that records the chosen experts of every forward, in order (`generate` makes one forward per
    token).

    In nested recordings a forward is recorded in all of them.
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
    """Context manager in which the n-th forward uses the experts of the n-th entry of `routes`. For a token whose
    experts are -1 the router chooses.

    Raises:
        ValueError: a replay is open on this model already; a forward differs from the recording in shape or number of
            MoE layers, or exceeds it; or, on exit, the recording has more forwards than were made.
    """
    backbone = _backbone(model)
    if backbone.replayed_routes is not None:
        raise ValueError("a routing replay is open on this model already")
    remaining = backbone.replayed_routes = iter(list(routes))
    try:
        yield
    finally:
        backbone.replayed_routes = None
    if unused := len(list(remaining)):
        raise ValueError(
            f"{unused} of the {len(routes)} forwards of the recorded routing were not replayed: make as many forwards "
            "as were recorded, or replay a part of the recording"
        )


def next_routes(
    replayed: Iterator[list[torch.Tensor]] | None, layers: int, shape: tuple[int, int, int]
) -> list[torch.Tensor] | None:
    """The experts to use in this forward, checked against the shape (B, T, K); None if nothing is replayed."""
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
