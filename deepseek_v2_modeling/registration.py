"""Registers our classes with transformers' Auto classes and weight conversion."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .model_classes import CLASSES


def register() -> None:
    """Register the classes; called at import, and idempotent."""
    mapping = get_checkpoint_conversion_mapping("deepseek_v2")
    assert mapping is not None
    for config, classes in CLASSES.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, classes[None], exist_ok=True)
        AutoModelForCausalLM.register(config, classes["causal_lm"], exist_ok=True)
        AutoModelForSequenceClassification.register(config, classes["score"], exist_ok=True)
        # transformers applies its mapping from the hub's per-expert tensors to fused experts only to its own classes.
        # Without it the experts would stay randomly initialised, and only a table in the log would say so.
        register_checkpoint_conversion_mapping(config.model_type, mapping, overwrite=True)
