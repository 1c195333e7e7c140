"""DeepSeek-V2 for transformers: latent attention, fine-grained experts, LoRA, in official behaviour.

Importing this package registers the classes with transformers' Auto classes under `deepseek_v2`; the stock
classes stay importable from transformers.models.deepseek_v2.
"""

from .balance import collect_balance
from .cache import LatentCache
from .configuration import DeepseekV2Config
from .errors import ModelError
from .exporting import export_adapter
from .importing import import_adapter
from .lora import apply_lora, lora_config
from .merge import merge_lora
from .modeling import DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification, DeepseekV2Model
from .registration import register
from .routing import record_routing, replay_routing

register()

__all__ = [
    "DeepseekV2Config",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2Model",
    "LatentCache",
    "ModelError",
    "apply_lora",
    "collect_balance",
    "export_adapter",
    "import_adapter",
    "lora_config",
    "merge_lora",
    "record_routing",
    "replay_routing",
]
