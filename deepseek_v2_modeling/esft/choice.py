"""The routed experts to train (ESFT, arXiv 2407.01906): the file that lists them, and their choice from scores.

The file is JSON, `{"experts": {"1": [12, 40], "2": [35]}, ...}`: the index of each MoE layer and its experts to train.
The expert configs of the official repository have the same form; their switches `shared_experts` and
`non_expert_modules` must be false here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..configuration import DeepseekV2Config
from ..errors import ModelError

OFFICIAL_SWITCHES = ("shared_experts", "non_expert_modules")


@dataclass(frozen=True)
class ExpertChoice:
    """layers: {index of a MoE layer: its experts to train, in ascending order}. where: the file, for messages."""

    layers: Mapping[int, tuple[int, ...]]
    where: str = "experts"

    @property
    def count(self) -> int:
        return sum(map(len, self.layers.values()))

    def check(self, config: DeepseekV2Config) -> None:
        """Raise ModelError unless the layers are exactly the model's MoE layers and all experts exist."""
        layers, experts = moe_layers(config), config.n_routed_experts or 0
        model_layers = f"this model's MoE layers are {', '.join(map(str, layers)) or 'none'}"
        if unknown := sorted(set(self.layers) - set(layers)):
            raise ModelError(f"{self.where}: there is no MoE layer {unknown[0]}; {model_layers}")
        if missing := [layer for layer in layers if layer not in self.layers]:
            raise ModelError(f"{self.where}: layer {missing[0]} is missing (an empty list trains none); {model_layers}")
        for layer, chosen in self.layers.items():
            if chosen and chosen[-1] >= experts:
                raise ModelError(
                    f"{self.where}: layer {layer} names expert {chosen[-1]}; this model's are 0 to {experts - 1}"
                )


def moe_layers(config: DeepseekV2Config) -> list[int]:
    """The indices of the model's MoE layers."""
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]


def read_choice(path: str | Path) -> ExpertChoice:
    """Read the choice in an experts file; `ExpertChoice.check` then checks it against a model.

    Raises:
        ModelError: the file does not exist, is not JSON, has another form, or names no expert.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such experts file; make one with: dsv2 experts RECIPE") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable experts file ({error})") from error
    listed = content.get("experts") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f'{path}: not an experts file: it needs {{"experts": {{"1": [0, 5], ...}}}}, layer by layer')
    for switch in OFFICIAL_SWITCHES:
        if content.get(switch):
            raise ModelError(f"{path}: {switch} is true; only routed experts can be chosen: set it to false")
    layers = {_layer(key, path): _experts(key, value, path) for key, value in listed.items()}
    if len(layers) < len(listed):
        raise ModelError(f"{path}: experts names a layer twice, such as 1 and 01")
    choice = ExpertChoice(dict(sorted(layers.items())), str(path))
    if not choice.count:
        raise ModelError(f"{path}: it names no experts")
    return choice


def _layer(key: str, path: str | Path) -> int:
    if not key.isdecimal():
        raise ModelError(f'{path}: experts has the key "{key}", which is not a layer number')
    return int(key)


def _experts(key: str, value: Any, path: str | Path) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else [value]
    if bad := [n for n in numbers if not isinstance(n, int) or isinstance(n, bool) or n < 0]:
        raise ModelError(f"{path}: layer {key} names {bad[0]!r}, which is not an expert's number")
    if not isinstance(value, list) or len(set(numbers)) < len(numbers):
        raise ModelError(f"{path}: layer {key} must be a list of different experts, not {value}")
    return tuple(sorted(numbers))


def smallest_set(scores_E: Sequence[float] | torch.Tensor, threshold: float) -> list[int]:
    """The smallest set of experts, best first, whose scores sum to at least `threshold` (0 to 1) of the total.

    Among equal scores the expert with the lower index comes first. Scores must not be negative, nor all 0.
    """
    scores = torch.as_tensor(scores_E, dtype=torch.float64)
    order = scores.argsort(descending=True, stable=True)
    cumulative = scores[order].cumsum(0)
    needed = threshold * cumulative[-1] * (1 - 1e-12)  # allow for rounding errors in the sum
    count = int(torch.searchsorted(cumulative, needed)) + 1
    return order[:count].tolist()
