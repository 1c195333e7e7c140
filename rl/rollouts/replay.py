"""Routing replay: the update uses the experts of an earlier forward instead of choosing them again.

With `update` the earlier forward is that of the old log-probabilities (R2, "Stabilizing Reinforcement Learning with
LLMs", arXiv 2512.01374); with `rollout` it is the rollout's own (R3, arXiv 2510.11370), and the old log-probabilities
use its experts, too. The weights of the chosen experts are computed again and get gradients. The reference chooses for
itself.

B rows, P columns of prompt, A of answer, T = P + A, N packed tokens, L MoE layers, K experts a token.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from trl.trainer.grpo_trainer import GRPOTrainer

from conversations.errors import ToolkitError
from conversations.row import Row
from deepseek_v2_modeling import record_routing, replay_routing
from rl.config import Replay
from rl.packing import PackedRows
from rl.rollouts.acting import engine_of, not_applied
from rl.rollouts.groups import JudgedAnswer, padded_routes

BY_ROLLOUT, BY_UPDATE = "rollout_routes", "update_routes"  # in the batch of a rollout
KEYS: dict[Replay, str | None] = {"off": None, "update": BY_UPDATE, "rollout": BY_ROLLOUT}


class ReplayedRoutes(GRPOTrainer if TYPE_CHECKING else object):
    """The part of `PolicyTrainer` that keeps the experts of a rollout's tokens, in its batch, and uses them again: [B,
    T, L, K] int16, -1 where there is none. For `routes_agree`, those of the answers alone are kept, too: [B, A, L, K].

    answers: while TRL makes a batch of them. old_routes: then, the experts of the old log-probabilities' forwards so
    far, a part of the rows each. updating: the micro-batch of an update.
    """

    # Of many types in transformers and TRL.
    accelerator: Any
    model: Any
    ref_model: Any
    args: Any
    routing_replay: Replay
    answers: Sequence[JudgedAnswer]
    updating: dict[str, Any] | None
    old_routes: tuple[torch.Tensor, ...] = ()

    def check_replay(self) -> None:
        """Raises ToolkitError where sampling does not say which experts it used."""
        names = [name for name in (engine_of(self.args), *not_applied(self.args)) if name]
        if self.routing_replay == "rollout" and names:
            raise ToolkitError(
                "routing_replay: rollout needs the experts of the tokens that were sampled, which only the toolkit's "
                f"own sampling gives: use update, or leave out {', '.join(f'training.{name}' for name in names)}"
            )

    @property
    def replays_nothing(self) -> bool:
        """Whether the experts of the old log-probabilities' forward are asked for, and updates are that forward."""
        args = self.args
        aligned = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0
        scored = args.use_vllm and args.vllm_importance_sampling_correction
        return self.routing_replay == "update" and aligned and not scored

    def is_policy(self, model: nn.Module) -> bool:
        """Whether a forward is the policy's; the reference's may be on its weights, with other adapters."""
        policy = self.accelerator.unwrap_model(self.model)
        if model is self.ref_model or not hasattr(policy, "peft_config"):
            return model is not self.ref_model
        return policy.has_active_enabled_adapter and "ref" not in policy.active_adapters

    @contextmanager
    def routing(self, model: nn.Module, packed: PackedRows, rows: slice, length: int) -> Iterator[Any]:
        """Around a forward over these rows of the batch: replays what is to be replayed, and gives the recording of the
        experts if they are needed, else None. length: A."""
        scoring = self.updating is None and bool(self.answers) and self.is_policy(model)
        keep = scoring and self.routing_replay == "update"
        with ExitStack() as stack:
            if (replayed := self._replayed(rows, packed.index.shape[1], length, scoring)) is not None:
                layers = packed.pack(replayed).unbind(1)
                stack.enter_context(replay_routing(self.model, [[layer[None] for layer in layers]]))
            needed = keep or (self.updating is not None and BY_ROLLOUT in self.updating)
            routes = stack.enter_context(record_routing(self.model)) if needed else None
            yield routes
        if keep and routes and routes[0]:
            self.old_routes += (packed.spread(joined(routes[0]).short(), nothing=-1),)

    def _replayed(self, rows: slice, width: int, length: int, scoring: bool) -> torch.Tensor | None:
        """The experts to use in a forward over these rows, [B, T, L, K]. width: T; scoring: whether it is the policy's
        before any update."""
        if self.updating is not None:
            key = KEYS[self.routing_replay]
            return self.updating.get(key) if key else None
        if not scoring or self.routing_replay != "rollout":
            return None
        return _on(self.accelerator.device, padded_routes(self.answers[rows], length, width - length))

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        """The batch that TRL makes of the answers, with the experts to keep."""
        batch = super()._generate_and_score_completions(inputs)
        length, prompt = batch["completion_ids"].shape[1], batch["prompt_ids"].shape[1]
        by_rollout = padded_routes(self.answers, length, prompt if self.routing_replay == "rollout" else 0)
        by_update, self.old_routes = torch.cat(self.old_routes) if self.old_routes else None, ()
        found = {BY_ROLLOUT: _on(self.accelerator.device, by_rollout), BY_UPDATE: by_update}
        return batch | {name: routes for name, routes in found.items() if routes is not None}


def joined(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """The experts of each MoE layer [1, N, K] as one tensor [N, L, K]."""
    return torch.stack([layer[0].to(layers[0].device) for layer in layers], dim=1)


def _on(device: torch.device, routes: torch.Tensor | None) -> torch.Tensor | None:
    return None if routes is None else routes.to(device)
