"""Weights that are sharded over processes, from which no answers can be sampled here."""

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.grpo_config import GRPOConfig

from conversations.errors import ToolkitError
from deepseek_v2_modeling.training import launched_sharding


def check_whole_weights(args: GRPOConfig) -> None:
    """Raises ToolkitError for FSDP and DeepSpeed's ZeRO-3. Processes sample answers of different lengths, so that they
    would wait for one another's shards at different steps: forever."""
    by_fsdp = args.fsdp or launched_sharding() == "FSDP"
    used = "FSDP" if by_fsdp else "DeepSpeed ZeRO-3" if is_deepspeed_zero3_enabled() else None
    if used is not None:
        raise ToolkitError(
            f"{used} shards the weights over processes, and answers are sampled from whole ones; leave it out: several "
            "processes (--processes N) then hold a copy each, and adapters (lora) keep gradients and optimizer small"
        )
