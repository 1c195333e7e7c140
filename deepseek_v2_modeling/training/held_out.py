"""Evaluation of held-out rows on any number of processes: each row counts once, as on one process.

accelerate fills up the last batches with rows from the beginning, which then count twice.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, has_length


class HeldOutBatches:
    """The batches of one of several processes, as sampler of a DataLoader. All processes have the same number of
    batches, of the same sizes. Of rows that do not make a batch for each of them, each process has an equal part; what
    is left then is read by all.

    rows: how many there are. size: of a batch. whole: rows stay with those of their block of `size`, so that there are
    no such parts.
    readers: of each batch, how many processes read it.
    """

    def __init__(self, rows: int, size: int, process: int = 0, processes: int = 1, whole: bool = False):
        part = 0 if whole else rows % (size * processes) // processes
        sizes = [size] * (rows // (size * processes)) + [part] * (part > 0)
        starts = [0, *accumulate(processes * count for count in sizes)]
        own = [
            range(start + process * count, start + (process + 1) * count)
            for start, count in zip(starts, sizes, strict=False)
        ]
        common = [range(start, min(start + size, rows)) for start in range(starts[-1], rows, size)]
        self.batches = own + common
        self.readers = [1] * len(own) + [processes] * len(common)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def held_out_loader(loader: Any, size: int, accelerator: Any, whole: bool = False) -> Any:
    """A loader of the same rows that gives this process its `HeldOutBatches`."""
    places = accelerator.process_index, accelerator.num_processes
    ours: Any = DataLoader(
        loader.dataset,
        batch_sampler=HeldOutBatches(len(loader.dataset), size, *places, whole=whole),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        prefetch_factor=loader.prefetch_factor,
        multiprocessing_context=loader.multiprocessing_context,
    )
    return prepare_data_loader(ours, accelerator.device, num_processes=1, process_index=0, put_on_device=True)


class HeldOutMixin(Trainer if TYPE_CHECKING else object):
    """The part of `RunTrainerMixin` that evaluates: losses and TRL's figures are means over rows, whatever the sizes of
    batches and the number of processes.

    held_out_loss: (sum, weight) of the losses of the last evaluation, over all processes.
    """

    accelerator: Any
    args: Any
    _metrics: Any
    _stored_metrics: Any
    whole_batches = False  # whether a row's figures depend on the other rows of its batch

    def __init__(self, *args: Any, **kwargs: Any):
        self.held_out_loss = torch.zeros(2, dtype=torch.float64)
        self._rounds: Iterator[tuple[int, int]] | None = None  # (rows, readers) of the batches to come
        self._sums: dict[str, torch.Tensor] = {}  # (sum, weight) of what TRL has logged since its last log
        super().__init__(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        loader = super().get_eval_dataloader(eval_dataset)
        if not has_length(loader.dataset):
            return loader
        return held_out_loader(loader, self.args.eval_batch_size, self.accelerator, self.whole_batches)

    def loss_weight(self, inputs: Any, rows: int) -> int:
        """What a batch's loss and figures are means of: its rows."""
        return rows

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        batches = dataloader.batch_sampler
        self._rounds = None
        if isinstance(batches, HeldOutBatches):  # not of a data set without a length, nor for `predict`
            self._rounds = zip(map(len, batches.batches), batches.readers, strict=True)
        self.held_out_loss = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._rounds is None:
            return output
        summed: Any = self.accelerator.reduce(self.held_out_loss.to(self.accelerator.device))
        self.held_out_loss = summed.cpu()
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = mean_of(self.held_out_loss)
        logged = self._logged()
        logged.update({name: [mean_of(sums)] for name, sums in self._sums.items() if name in logged})
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._rounds is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        before = {name: len(values) for name, values in self._logged().items()}
        result: Any = super().prediction_step(model, inputs, *args, **kwargs)
        rows, readers = next(self._rounds)
        weight = self.loss_weight(inputs, rows)
        if weight:  # otherwise the loss is no mean of anything
            self.held_out_loss += _part(result[0].item(), weight / readers)
        every: Any = self.accelerator.reduce(torch.tensor(weight / readers, device=self.accelerator.device))
        for name, values in self._logged().items():
            if len(values) == before.get(name, 0) + 1:
                earlier = self._sums[name] if before.get(name) else torch.zeros(2, dtype=torch.float64)
                self._sums[name] = earlier + _part(values[-1], every.item())
        return result

    def _logged(self) -> dict[str, list[Any]]:
        """TRL's lists, with a value for each batch, of which `log` takes the means."""
        if hasattr(self, "_metrics"):
            return self._metrics["eval"]
        return self._stored_metrics["eval"] if hasattr(self, "_stored_metrics") else {}


def _part(value: float, weight: float) -> torch.Tensor:
    """(sum, weight) [2] of one mean."""
    return torch.tensor([value * weight, weight], dtype=torch.float64)


def mean_of(sums: torch.Tensor) -> float:
    """The mean of (sum, weight) [2]; 0 without any weight."""
    return (sums[0] / sums[1]).item() if sums[1] else 0.0
