"""Bounds of the numeric fields of TRL's configs. No torch.

TRL and transformers do not check most of them: `max_length: -1` would cut off every end token, and accumulation over 0
batches ends in a ZeroDivisionError in the middle of a run. A test checks the table against the configs' fields.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from conversations.errors import ToolkitError

LARGEST = 10**12  # for any of them; much larger values do not fit into 64 bits, or overflow in the first step


class Bounds(NamedTuple):
    """low <= value <= high; with `open_low`, low < value. also: values outside the bounds with a special meaning."""

    low: float = 0
    high: float = math.inf
    open_low: bool = False
    also: tuple[float, ...] = ()

    def hold(self, value: float) -> bool:
        inside = (value > self.low if self.open_low else value >= self.low) and value <= self.high
        return _is_finite(value) and (inside or value in self.also)

    def __str__(self) -> str:
        low = f"{'over' if self.open_low else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"at most {self.high:g}" if self.high < math.inf else ""
        words = " and ".join(filter(None, (low, high))) or "a finite number"
        return " or ".join([words, *(f"{value:g}" for value in self.also)])


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # an integer of 400 digits has no float


_COUNT = Bounds(1)
_FROM_0 = Bounds(0)
_OVER_0 = Bounds(0, open_low=True)
_SHARE = Bounds(0, 1)
_PORT = Bounds(1, 65535)

BOUNDS: dict[str, Bounds] = {
    # Lengths in tokens. A trained token needs one before it.
    "max_length": Bounds(2),
    "max_completion_length": _COUNT,
    "pad_to_multiple_of": _COUNT,
    "vllm_max_model_length": _COUNT,
    # Batches and steps.
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "eval_accumulation_steps", "generation_batch_size", "steps_per_generation", "num_iterations",
            "num_generations_eval", "save_total_limit", "torch_empty_cache_steps", "ref_model_sync_steps",
            "dataset_num_proc", "dataloader_prefetch_factor", "num_completions_to_print", "ddp_timeout",
            "ddp_bucket_cap_mb", "vllm_tensor_parallel_size", "precompute_ref_batch_size",
        ),
        _COUNT,
    ),
    "num_generations": Bounds(2),  # advantages are relative to the group's mean
    "max_steps": Bounds(1, also=(-1,)),
    "num_train_epochs": _OVER_0,
    "max_tool_calling_iterations": _FROM_0,
    "dataloader_num_workers": _FROM_0,
    "eval_delay": _FROM_0,
    "padding_value": _FROM_0,
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _OVER_0),  # under 1: shares of the run
    "warmup_steps": _FROM_0,
    # The optimizer.
    "learning_rate": _OVER_0,
    "weight_decay": _FROM_0,
    "adam_beta1": Bounds(0, math.nextafter(1, 0)),
    "adam_beta2": Bounds(0, math.nextafter(1, 0)),
    "adam_epsilon": _OVER_0,
    "max_grad_norm": _FROM_0,  # 0 disables clipping
    "label_smoothing_factor": _SHARE,
    "neftune_noise_alpha": _FROM_0,
    # Rewards and policies.
    "center_rewards_coefficient": _FROM_0,
    "beta": _FROM_0,
    "ld_alpha": _SHARE,
    "label_smoothing": Bounds(0, math.nextafter(0.5, 0)),  # from one half on preferences are turned round
    "discopop_tau": _OVER_0,
    **dict.fromkeys(("desirable_weight", "undesirable_weight", "cpo_alpha", "simpo_gamma"), _FROM_0),
    **dict.fromkeys(("alpha", "f_alpha_divergence_coef"), Bounds(-math.inf)),
    "delta": _OVER_0,
    "epsilon": _FROM_0,
    "epsilon_high": _FROM_0,
    **dict.fromkeys(("entropy_coef", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min"), _FROM_0),
    "entropy_target": _FROM_0,
    "off_policy_mask_threshold": _FROM_0,
    "ref_model_mixup_alpha": _SHARE,
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), _OVER_0),
    **dict.fromkeys(("vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos"), _OVER_0),
    # Sampling.
    "temperature": _OVER_0,  # log-probabilities are divided by it
    "top_p": Bounds(0, 1, open_low=True),
    "top_k": Bounds(0, also=(-1,)),
    "min_p": _SHARE,
    "repetition_penalty": _OVER_0,
    "top_entropy_quantile": Bounds(0, 1, open_low=True),
    # A vLLM server.
    "vllm_gpu_memory_utilization": Bounds(0, 1, open_low=True),
    "vllm_group_port": _PORT,
    "vllm_server_port": _PORT,
    "vllm_server_timeout": _OVER_0,
    **dict.fromkeys(
        ("vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
        _FROM_0,
    ),
}  # fmt: skip


def check_bounds(training: Mapping[str, Any]) -> None:
    """Check the numbers in a recipe's `training`, whose types have been checked already.

    Raises:
        ToolkitError: a number is outside its bounds, or not finite.
    """
    for key, value in training.items():
        bounds = BOUNDS.get(key)
        if not bounds or not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if not bounds.hold(value):
            raise ToolkitError(f"training.{key}: must be {bounds}, not {value!r}")
        if abs(value) > LARGEST:
            raise ToolkitError(f"training.{key}: must be at most {LARGEST:,}, not {value!r}")
