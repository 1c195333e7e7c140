"""DeepSeek-V2 for transformers: latent attention, fine-grained experts and LoRA, with the official model's behaviour.

Importing this package registers its classes with transformers' Auto classes under `deepseek_v2`; the stock classes
remain importable from transformers.models.deepseek_v2.
"""

from typing import TYPE_CHECKING, Any

from .adapters import apply_lora, export_adapter, import_adapter, load_adapter, lora_config, merge_lora
from .cache import LatentCache
from .configuration import DeepseekV2Config
from .errors import ModelError
from .family import DeepseekV3Config
from .layers.balance_losses import collect_balance
from .modeling import DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification, DeepseekV2Model
from .presets import PRESETS, build_model, preset_config, released_config
from .registration import register
from .routing_replay import record_routing, replay_routing

if TYPE_CHECKING:
    from .training.mixin import RunTrainerMixin

__version__ = "0.1.0"  # the version of the whole toolkit, stated nowhere else

register()


def __getattr__(name: str) -> Any:
    """Import RunTrainerMixin lazily, because importing transformers' Trainer is slow."""
    if name != "RunTrainerMixin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .training.mixin import RunTrainerMixin

    return RunTrainerMixin


__all__ = [
    "PRESETS",
    "DeepseekV2Config",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2Model",
    "DeepseekV3Config",
    "LatentCache",
    "ModelError",
    "RunTrainerMixin",
    "apply_lora",
    "build_model",
    "collect_balance",
    "export_adapter",
    "import_adapter",
    "load_adapter",
    "lora_config",
    "merge_lora",
    "preset_config",
    "record_routing",
    "released_config",
    "replay_routing",
]
