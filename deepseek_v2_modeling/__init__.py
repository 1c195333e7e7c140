"""DeepSeek-V2 for transformers: latent attention, fine-grained experts, LoRA, in official behaviour.

Importing this package registers the classes with transformers' Auto classes under `deepseek_v2`; the stock
classes stay importable from transformers.models.deepseek_v2.
"""

from .balance import collect_balance
from .cache import LatentCache
from .configuration import DeepseekV2Config
from .errors import ModelError
from .lora import apply_lora, lora_config
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
    "lora_config",
    "record_routing",
    "replay_routing",
]
