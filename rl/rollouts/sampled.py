"""Samples the answers of a rollout: from which weights, in which dtype, and how many side by side."""

import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from conversations.generation.decoding import adjustment, asked_of
from deepseek_v2_modeling.adapters import copied_bytes, merged_copy
from deepseek_v2_modeling.inference import AfterTurn, cache_bytes, decoding_dtype, generate_answers
from deepseek_v2_modeling.training import is_sharded
from rl.config import RolloutSection
from rl.rollouts.acting import engine_of, not_applied
from rl.rollouts.memory import free_bytes

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """How a run samples: decided at its first rollout and kept in checkpoints, because free memory differs from start
    to start, and answers sampled side by side in other numbers differ in their last bits.

    copy: sample from a copy of the weights with the adapters merged in. dtype: that of the copy, None for each weight's
    own. cache_bytes: the limit on the cache, None for none.
    """

    copy: bool
    dtype: str | None
    cache_bytes: int | None


def plan_rollouts(
    settings: RolloutSection, model: Any, rows: int, tokens: int, compute_dtype: torch.dtype, free: int | None
) -> Plan:
    """The plan for rollouts of `rows` answers of up to `tokens` tokens each, prompts included.

    Args:
        compute_dtype: in which the model computes in training.
        free: bytes of free memory, None if unknown.
    """
    shared = is_sharded(model)  # of which no process has a copy to make
    dtype = None if shared else decoding_dtype(model, compute_dtype, rows)
    copied = 0 if shared else copied_bytes(model, dtype)
    one = cache_bytes(model, tokens, dtype)
    fits = free is None or copied + min(rows, settings.few) * one <= settings.merged_share * free
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate moves its weights about
    useful = (copied > 0 or dtype is not None) and not hooked
    copy = useful and (fits if settings.merge == "auto" else settings.merge)
    if not copy:
        dtype, copied = None, 0
    if settings.max_cache_gb is not None:
        limit: int | None = int(settings.max_cache_gb * GB)
    else:
        one = cache_bytes(model, tokens, dtype)
        limit = None if free is None else max(one, int(settings.cache_share * (free - copied)))
    return Plan(copy, str(dtype).removeprefix("torch.") if dtype else None, limit)


class SampledRollouts(GRPOTrainer if TYPE_CHECKING else object):
    """The part of `PolicyTrainer` that samples answers by `generate_answers`, with transformers' logits processors for
    what `training` asks beside a temperature. What that loop cannot do goes to TRL, and a message says so."""

    # Of many types in transformers and TRL.
    args: Any
    accelerator: Any
    _tokenizer: Any
    generation_config: Any
    rollout: RolloutSection
    plan: Plan | None = None
    after_turn: AfterTurn | None = None
    warned: bool = False

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if (engine := engine_of(self.args)) is not None or (unknown := not_applied(self.args)):
            if engine is None and not self.warned and self.is_world_process_zero():
                self.warned = True
                names = ", ".join(f"training.{name}" for name in unknown)
                print(f"rl: rollouts use transformers' generate, which is slower, because of {names}", file=sys.stderr)
            with self.accelerator.autocast():  # PeftModel.generate bypasses the forward that accelerate wraps
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self._sample(prompt_ids), None

    def _sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        policy, config = self.accelerator.unwrap_model(self.model_wrapped), self.generation_config
        plan = self._plan(policy, prompt_ids)
        dtype = getattr(torch, plan.dtype) if plan.dtype else None
        temperature = float(config.temperature) if config.do_sample else 0.0
        ends = config.eos_token_id
        seeds = torch.randint(2**62, (len(prompt_ids),)).tolist()  # from the state that checkpoints restore
        with self.accelerator.autocast() if dtype is None else nullcontext():
            return generate_answers(
                merged_copy(policy, dtype) if plan.copy else policy,
                prompt_ids,
                pad_token_id=self._tokenizer.pad_token_id,
                eos_token_id=ends,
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
                batch_size=len(prompt_ids),
                max_cache_bytes=plan.cache_bytes,
                seeds=seeds,
                adjust=adjustment(asked_of(config), temperature, ends),
                after_turn=self.after_turn,
            )

    def _plan(self, policy: Any, prompt_ids: list[list[int]]) -> Plan:
        if self.plan is None:
            weights = next(policy.parameters())
            low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
            tokens = max(map(len, prompt_ids)) + self.generation_config.max_new_tokens
            free = free_bytes(weights.device)
            self.plan = plan_rollouts(self.rollout, policy, len(prompt_ids), tokens, low or weights.dtype, free)
            if self.is_world_process_zero():
                print(f"rl: rollouts {described(self.plan)}", file=sys.stderr)
        return self.plan

    def saved_plan(self) -> dict[str, Any] | None:
        """For a checkpoint."""
        return None if self.plan is None else asdict(self.plan)

    def restore_plan(self, saved: dict[str, Any] | None) -> None:
        self.plan = None if saved is None else Plan(**saved)


def described(plan: Plan) -> str:
    """In words, for the user."""
    merged = "from a copy with the adapters merged" if plan.copy else "from the model itself"
    cache = "" if plan.cache_bytes is None else f"; their cache takes up to {plan.cache_bytes / GB:.3g} GB"
    return f"sample {merged}{f', in {plan.dtype}' if plan.dtype else ''}{cache}"
