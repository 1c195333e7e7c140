"""Registers our classes with transformers' Auto classes and weight conversion."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .configuration import DeepseekV2Config
from .modeling import DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification, DeepseekV2Model


def register() -> None:
    """Register the classes; called at import, and idempotent."""
    AutoConfig.register("deepseek_v2", DeepseekV2Config, exist_ok=True)
    AutoModel.register(DeepseekV2Config, DeepseekV2Model, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekV2Config, DeepseekV2ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(DeepseekV2Config, DeepseekV2ForSequenceClassification, exist_ok=True)
    # transformers applies its mapping from the hub's per-expert tensors to fused experts only to its own classes.
    # Without it the experts would stay randomly initialised, and only a table in the log would say so.
    mapping = get_checkpoint_conversion_mapping("deepseek_v2")
    assert mapping is not None
    register_checkpoint_conversion_mapping("deepseek_v2", mapping, overwrite=True)
