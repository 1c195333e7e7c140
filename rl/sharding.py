"""Weights that are sharded over processes, from which answers are sampled only as the recipe's `parallel` shards."""

from collections.abc import Iterable

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.grpo_config import GRPOConfig

from conversations.errors import ToolkitError
from deepseek_v2_modeling.training import launched_sharding


def check_sharding(args: GRPOConfig, parallel: bool, other_loops: Iterable[str]) -> None:
    """Raises ToolkitError for FSDP and DeepSpeed's ZeRO-3 by other means than `parallel`, and for `parallel` where
    answers are not sampled by our own loop. Processes sample answers of different lengths, so that they would wait for
    one another's shards at different steps: forever.

    other_loops: fields of `training` by which another loop samples.
    """
    other = next(iter(other_loops), None)
    if parallel and other is not None:
        raise ToolkitError(
            f"parallel needs rollouts by the toolkit's own loop, which training.{other} rules out; leave one of the "
            "two out"
        )
    by_fsdp = args.fsdp or launched_sharding() == "FSDP"
    used = "FSDP" if by_fsdp else "DeepSpeed ZeRO-3" if is_deepspeed_zero3_enabled() else None
    if used is not None:
        raise ToolkitError(
            f"{used} shards the weights over processes, and answers are sampled from whole ones; leave it out: several "
            "processes (--processes N) then hold a copy each, or share the weights by parallel: {fsdp: N} in the recipe"
        )
