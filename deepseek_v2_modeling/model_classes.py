"""The model classes of each architecture of the family.

The classes of another architecture are those of DeepSeek-V2 under another name: what they compute is decided by the
config, and the name is what a config.json has in `architectures`.
"""

from typing import Any

from transformers import PreTrainedModel

from .checkpoints.sources import Head
from .configuration import DeepseekV2Config
from .family import CONFIGS
from .modeling import DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification, DeepseekV2Model

PARTS: dict[Head | None, type[PreTrainedModel]] = {
    None: DeepseekV2Model, "causal_lm": DeepseekV2ForCausalLM, "score": DeepseekV2ForSequenceClassification,
}  # fmt: skip


def _named(base: type[PreTrainedModel], config: type[DeepseekV2Config]) -> Any:
    """The class `base` for another config, such as DeepseekV3Model for DeepseekV2Model and DeepseekV3Config."""
    if config is base.config_class:
        return base
    name = base.__name__.replace("DeepseekV2", config.__name__.removesuffix("Config"))
    namespace = {"config_class": config, "__module__": __name__, "__qualname__": name}
    return type(name, (base,), {**namespace, "__doc__": f"`{base.__name__}` of {config.architecture}."})


# Config class -> head (None for the backbone) -> model class.
CLASSES: dict[type[DeepseekV2Config], dict[Head | None, Any]] = {
    config: {head: _named(base, config) for head, base in PARTS.items()} for config in CONFIGS.values()
}
globals().update({cls.__name__: cls for classes in CLASSES.values() for cls in classes.values()})  # for pickle


def model_class(config: DeepseekV2Config, head: Head | None) -> Any:
    """The model class for a config; head None is the backbone."""
    return CLASSES[type(config)][head]
