"""Weights that are sharded over processes, from which no answers can be sampled here."""

import os

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.grpo_config import GRPOConfig

from conversations.errors import ToolkitError

BY_LAUNCH = "ACCELERATE_USE_FSDP"  # of accelerate launch


def check_whole_weights(args: GRPOConfig) -> None:
    """Raises ToolkitError for FSDP and DeepSpeed's ZeRO-3. Processes sample answers of different lengths, so that they
    would wait for one another's shards at different steps: forever."""
    launched = os.environ.get(BY_LAUNCH, "").lower() in ("1", "true", "yes")
    used = "FSDP" if args.fsdp or launched else "DeepSpeed ZeRO-3" if is_deepspeed_zero3_enabled() else None
    if used is not None:
        raise ToolkitError(
            f"{used} shards the weights over processes, and answers are sampled from whole ones; leave it out: several "
            "processes (--processes N) then hold a copy each, and adapters (lora) keep gradients and optimizer small"
        )
