"""GRPO (paper eq. 32-34) on TRL's trainer, with our chat template, reference model and packed log-probabilities."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from conversations import render_conversation
from conversations.answers.prompts import answer_text, prompt_text
from conversations.environments.loading import Environment
from conversations.errors import ToolkitError
from conversations.rewards.base import Reward
from conversations.row import Row
from conversations.run_files import SAMPLES
from deepseek_v2_modeling.inference import end_tokens
from deepseek_v2_modeling.training import (
    HeadSettings,
    RunTrainerMixin,
    append_lines,
    frozen_copy,
    fuse_head,
    is_sharded,
    with_fused_head,
)
from rl.config import Curriculum, Replay, RolloutCorrection, RolloutSection
from rl.held_out import HeldOutPrompts
from rl.packing import pack_rows
from rl.phases import PHASES, PhaseClock
from rl.rollouts.curriculum import CurriculumPrompts
from rl.rollouts.groups import OtherPrompts
from rl.rollouts.judged import JudgedRollouts
from rl.rollouts.mismatch import CorrectedRollouts
from rl.rollouts.replay import ReplayedRoutes
from rl.rollouts.sampled import SampledRollouts
from rl.rollouts.vllm_engine import send_hub_weights
from rl.run_warnings import Warnings

SAMPLED_STEPS = 25  # roughly how many steps of a run write samples
SAMPLES_A_STEP = 4
PATIENCE = 8  # first batches for which a reward may give no score at all


class PolicyTrainer(
    RunTrainerMixin,
    HeldOutPrompts,
    CorrectedRollouts,
    JudgedRollouts,
    ReplayedRoutes,
    SampledRollouts,
    GRPOTrainer,
):
    """GRPOTrainer whose prompts are rendered by `render_conversation`.

    The KL reference is the policy at the start of the run: for full fine-tuning a frozen copy made here (TRL would load
    transformers' stock class from the path), for an adapter the copy named "ref" that TRL makes.

    Args:
        max_rounds: of dynamic sampling; 0 for none.
        rollout: how answers are sampled.
        rollout_correction: for what the rollout's probabilities differ from the policy's; None for none.
        environment: in which answers of several turns are sampled; None for none.
        routing_replay: which forward's experts the update uses.
        curriculum: which prompts are drawn more often; None takes them in the order of the data loader.
    """

    def __init__(
        self,
        model: Any,
        args: GRPOConfig,
        rewards: Sequence[Reward],
        *,
        max_rounds: int = 0,
        rollout: RolloutSection | None = None,
        rollout_correction: RolloutCorrection | None = None,
        environment: Environment | None = None,
        routing_replay: Replay = "off",
        curriculum: Curriculum | None = None,
        **kwargs: Any,
    ):
        beta, sync, shared = args.beta, args.sync_ref_model, is_sharded(model)
        own_reference = beta != 0 and not hasattr(model, "peft_config")
        copied = frozen_copy if shared else copy.deepcopy
        reference = copied(model) if own_reference else None  # before TRL patches the policy's forward
        if own_reference or shared:  # shared adapters were loaded with their reference
            args.beta, args.sync_ref_model = 0.0, False
        self.head_settings = HeadSettings(args.temperature, args.cast_lm_head_to_fp32)
        with with_fused_head(model, self.head_settings):
            super().__init__(model=model, args=args, reward_funcs=list(rewards), **kwargs)
        args.beta, args.sync_ref_model = beta, sync
        self.beta = beta
        self.eos_token_ids = end_tokens(model, self._tokenizer)
        if not args.use_vllm and "eos_token_id" not in (args.generation_kwargs or {}):
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        if args.use_vllm:
            send_hub_weights(self.vllm_generation)
        if reference is not None:
            self.ref_model = self._prepare_reference(reference)
            if sync:
                self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        self.clock = PhaseClock(self.accelerator.device, self._log_phases)
        self.add_callback(self.clock)
        self.warnings = Warnings()
        self.add_callback(self.warnings)
        self.max_rounds, self.rollout = max_rounds, rollout or RolloutSection()
        self.rollout_correction, self.routing_replay = rollout_correction, routing_replay
        self.check_correction()
        self.check_replay()
        self.act_in(environment)
        self.rollout_func = self.given_answers
        self.check_dynamic_sampling()
        self.other_prompts = OtherPrompts(self.train_dataset, args.seed)
        if curriculum is not None:
            self.other_prompts = CurriculumPrompts(self.train_dataset, args.seed, curriculum.target)
        self.rewards = list(rewards)
        self.silent_batches = [0] * len(rewards)
        self.unwritten = False  # whether there are completions since the last samples were written

    def _prepare_reference(self, reference: Any) -> nn.Module:
        """Prepare the reference model as GRPOTrainer prepares one that it loads itself."""
        reference.requires_grad_(False).eval()
        disable_dropout_in_model(reference)
        fuse_head(reference, self.head_settings)
        return self.accelerator.prepare_model(
            reference, device_placement=not is_sharded(reference), evaluation_mode=True
        )

    @property
    def tokens(self) -> int:
        return int(self.state.num_input_tokens_seen) * self.num_iterations

    def _log_phases(self, seconds: dict[str, float]) -> None:
        """Into the means of the next log. `step_time` becomes their sum: TRL's leaves the optimizer out."""
        metrics = self._metrics["train"]
        for phase in PHASES:
            metrics[f"seconds/{phase}"].append(seconds[phase])
        metrics["step_time"] = [sum(step) for step in zip(*(metrics[f"seconds/{p}"] for p in PHASES), strict=True)]

    # --- rollouts -----------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[list[Row]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Token ids of the prompts. Each prompt occurs num_generations times but is rendered only once."""
        rendered: dict[tuple[tuple[str, str], ...], list[int]] = {}
        ids = []
        for prompt in prompts:
            key = tuple((message["role"], message["content"]) for message in prompt)
            if key not in rendered:
                encoded = render_conversation(prompt, self._tokenizer, add_generation_prompt=True)
                rendered[key] = encoded["input_ids"]
            ids.append(rendered[key])
        return ids, None, {}

    @property
    def shares_prompts(self) -> bool:
        """Whether the prompt of several answers is read once; flash kernels cannot."""
        return not self.model.config._attn_implementation.startswith("flash")

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-probabilities [B, logits_to_keep] and entropies, as TRL expects them, computed on packed rows: prompts
        are padded on the left and answers on the right, so more than half of a batch can be padding, and the answers of
        a group have one prompt."""
        size = batch_size or len(input_ids)
        if self.unread is not None:
            attention_mask = attention_mask.masked_fill(self.unread.unsqueeze(1), 0)
        logps, entropies = [], []
        with self.clock.phase("update" if torch.is_grad_enabled() else "reference"):
            for start in range(0, len(input_ids), size):
                rows = slice(start, start + size)
                packed = pack_rows(input_ids[rows], attention_mask[rows], logits_to_keep, self.shares_prompts)
                with self.accelerator.autocast(), self.routing(model, packed, rows, logits_to_keep) as routes:
                    scored = model(**packed.inputs, fused_lm_head=True)
                logps.append(packed.unpack(scored.log_probs)[:, -logits_to_keep:])
                self.compare(logps[-1], routes, packed.index[:, -logits_to_keep:])
                if compute_entropy:
                    entropies.append(packed.unpack(scored.entropy)[:, -logits_to_keep:])
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    # --- rewards ------------------------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: list[Row], prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        answers = self.answers
        values = self.accelerator.gather(self._values(answers))
        self._log_completion_extra("truncated", [not answer.finished for answer in answers])
        turns = [answer.episode.turns for answer in answers if answer.episode]
        if turns:
            self._log_completion_extra("turns", turns)
        for i, reward in enumerate(self.rewards):
            if reward.gives_reasons:
                self._log_completion_extra(f"reason/{reward.name}", [answer.reasons[i] for answer in answers])
        self._require_scores(values)
        self.unwritten = True
        return values

    def _require_scores(self, values: torch.Tensor) -> None:
        """Raise ToolkitError if no reward, or for too long one of them, scores any completion.

        TRL would silently train such batches on nothing, or on the remaining rewards. values: [completions of all
        processes, rewards], NaN where a reward gave no score.
        """
        silent = values.isnan().all(0).tolist()
        if all(silent):
            raise ToolkitError(
                f"no reward gave a score for any of {len(values)} completions (step {self.state.global_step + 1}); "
                "look at the rewards' on_error and at the references of the data"
            )
        for i, is_silent in enumerate(silent):
            has_scored = self.silent_batches[i] < 0
            self.silent_batches[i] = -1 if has_scored or not is_silent else self.silent_batches[i] + 1
            if self.silent_batches[i] >= PATIENCE:
                raise ToolkitError(
                    f"the reward {self.reward_func_names[i]} gave no score for any completion of the first "
                    f"{PATIENCE} batches; leave it out, or give the data what it needs"
                )

    # --- log and checkpoints ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        every = max(1, self.state.max_steps // SAMPLED_STEPS)
        due = self.state.global_step % every == 0 or self.state.global_step in (1, self.state.max_steps)
        if "loss" in logs and due and self.unwritten and self.is_world_process_zero():
            append_lines(self.run_dir / SAMPLES, self._samples())
            self.unwritten = False

    def _samples(self) -> list[Row]:
        """Completions of the last batch, for different prompts, each with the score of every reward."""
        prompts = list(self._logs["prompt"])
        chosen = range(0, len(prompts), max(1, len(prompts) // SAMPLES_A_STEP))[:SAMPLES_A_STEP]
        advantages = list(self._logs["advantages"])
        rewards = {name: list(values) for name, values in self._logs["rewards"].items()}
        extra = {name: list(values) for name, values in self._logs["extra"].items()}
        completions = extra.get("turns") or list(self._logs["completion"])
        reasons = {name: extra[key] for name in rewards if (key := f"reason/{name}") in extra}
        return [
            {
                "step": self.state.global_step,
                "prompt": prompt_text(prompts[i]),
                "completion": answer_text(completions[i][-1]["content"]),
                **({"turns": extra["turns"][i]} if "turns" in extra else {}),
                "truncated": extra["truncated"][i],
                "rewards": {name: values[i] for name, values in rewards.items()},
                **({"reasons": {name: texts[i] for name, texts in reasons.items() if texts[i]}} if reasons else {}),
                "advantage": advantages[i],
            }
            for i in chosen
        ]

    def _rollouts_file(self, folder: Path) -> Path:
        return folder / f"rollouts_{self.accelerator.process_index}.pt"

    def _save_extra(self, folder: Path) -> None:
        """Save the completions too: a checkpoint may fall between two updates on the same rollout."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {"micro_step": self._step, "inputs": self._buffered_inputs, "prompts": self.other_prompts.state()}
        torch.save({**state, "rollout_plan": self.saved_plan()}, self._rollouts_file(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = torch.load(self._rollouts_file(Path(resume_from_checkpoint)), weights_only=True)
        self._step, self._buffered_inputs = saved["micro_step"], saved["inputs"]
        self.other_prompts.restore(saved["prompts"])
        self.restore_plan(saved.get("rollout_plan"))
