"""Handles a non-finite loss or gradient in a trainer: stops and reports its source, or skips the update."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..checkpoints.full_disk import whole_checkpoints
from ..errors import ModelError
from ..layers.balance_losses import collect_balance
from ..sharding import whole
from .arguments import RunLimits
from .nan_source import first_bad_gradient, first_bad_module

if TYPE_CHECKING:
    from .checkpoints import CheckpointMixin

    Base = CheckpointMixin
else:
    Base = object

SHOWN_ROWS = 20


class FiniteMixin(Base):
    """The part of `RunTrainerMixin` that checks losses and gradients for non-finite values."""

    limits: RunLimits

    def __init__(self, *args: Any, **kwargs: Any):
        self._update: list[tuple[Any, Any]] = []  # (batch, num_items_in_batch) of the current update
        super().__init__(*args, **kwargs)

    def remember(self, inputs: Any, num_items_in_batch: Any) -> None:
        """Keep a batch of the current update, to find the source of a non-finite value."""
        if self.model.training:
            self._update.append((inputs, num_items_in_batch))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.limits.on_nan == "stop" and not torch.isfinite(loss):
            self._update = self._update[-1:]
            self._stop_at(f"the loss is {loss.item()}", self._bad_module)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm: Any = whole(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not torch.isfinite(torch.as_tensor(norm)):
            if self.limits.on_nan == "stop":
                self._stop_at(f"the gradient's norm is {float(norm)}", self._bad_gradient)
            model.zero_grad(set_to_none=True)  # without gradients the optimizer does not change the weights
            self.skipped_updates += 1
        self._update = []
        return norm

    def _stop_at(self, finding: str, find: Callable[[], str | None]) -> NoReturn:
        """End the run with a message about a non-finite value. finding: what is not finite; find: searches for its
        source."""
        source = None
        with suppress(Exception):  # report the original error even if the search for its source fails
            source = find()
        rows = [name for inputs, _ in self._update for name in self.rows_of(inputs)]
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        message = ". ".join(
            (
                f"{finding} at step {self.state.global_step + 1}",
                *([f"The rows of its batch: {', '.join(rows[:SHOWN_ROWS])}{more}"] if rows else []),
                f"First: {source}" if source else "Every module gives finite numbers when it runs again",
                "Lower training.learning_rate, look at these rows, or set on_nan: skip; "
                f"{whole_checkpoints(self.run_dir)}",
            )
        )
        if not self.is_world_process_zero():  # the main process may not have seen the fault
            print(f"error: {message}", file=sys.stderr, flush=True)
        raise ModelError(message)

    def rows_of(self, inputs: Any) -> list[str]:
        """The origins of a batch's rows, as file:line; empty if the stage does not know them."""
        return []

    def _bad_module(self) -> str | None:
        inputs, items = self._update[-1]
        if self.accelerator.num_processes > 1:  # the full loss may wait for other processes, which are not here
            return first_bad_module(self.model, lambda: self.model(**inputs))
        return first_bad_module(self.model, lambda: self._loss_again(inputs, items))

    def _bad_gradient(self) -> str | None:
        if self.accelerator.num_processes > 1:  # the other processes would have to take part
            return None
        return first_bad_gradient(self.model, lambda: [self._loss_again(*batch).backward() for batch in self._update])

    def _loss_again(self, inputs: Any, items: Any) -> torch.Tensor:
        with self.compute_loss_context_manager(), collect_balance(self.model):
            loss: Any = super().compute_loss(self.model, inputs, num_items_in_batch=items)
        return loss
