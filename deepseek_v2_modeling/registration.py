"""Makes transformers' Auto classes and weight conversion know our classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .configuration import DeepseekV2Config
from .modeling import DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification, DeepseekV2Model


def register() -> None:
    """Idempotent. Called at import."""
    AutoConfig.register("deepseek_v2", DeepseekV2Config, exist_ok=True)
    AutoModel.register(DeepseekV2Config, DeepseekV2Model, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekV2Config, DeepseekV2ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(DeepseekV2Config, DeepseekV2ForSequenceClassification, exist_ok=True)
    # Stock's mapping between the hub's per-expert files and fused experts is skipped for classes that it did
    # not ship: without this the experts would load as random numbers with no more than a table in the log.
    mapping = get_checkpoint_conversion_mapping("deepseek_v2")
    assert mapping is not None
    register_checkpoint_conversion_mapping("deepseek_v2", mapping, overwrite=True)
