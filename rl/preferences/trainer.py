"""TRL's trainers of preferences (DPO, KTO, CPO for SimPO, ORPO) on packed rows, with the reference computed once.

TRL pads all rows of a batch to the longest, runs the reference with every batch, and in CPO and ORPO makes all logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from conversations.generation.probes import ProbedTrainerMixin
from conversations.rendering.encoded import lengths_of
from conversations.row_cache import RowCache
from deepseek_v2_modeling.inference import evaluation_mode
from deepseek_v2_modeling.training import IGNORED, HeadSettings, held_out_loader, is_sharded, with_fused_head
from rl.packing import pack_rows
from rl.preferences.data import column_hash
from rl.preferences.own_reference import own_reference

_STORED = "reference.safetensors"
_NOT_LOGGED = ("logits/chosen", "logits/rejected")  # they would need all logits
IDS = ("chosen_ids", "rejected_ids", "input_ids")
_LIKEWISE = ("log_probs", "entropy", "is_top1")


def score_rows(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, share: bool = True
) -> Any:
    """Score rows [B, T] without their padding; all answers begin in the same column (see `padded`). The balance losses
    count a prompt that is read once as one sequence.

    share: whether a pair's prompt is read once; the second half of the rows answers the prompts of the first half.

    Returns:
        The fused head's outputs, [B, T - 1] each, 0 where there is no label.
    """
    order = torch.arange(len(input_ids), device=input_ids.device)
    if share and len(order) % 2 == 0:
        order = order.view(2, -1).t().flatten()  # both answers to a prompt side by side
    ids, mask, wanted = input_ids[order], attention_mask[order], labels[order]
    prompt_columns = int((labels != IGNORED).any(0).int().argmax())
    packed = pack_rows(ids, mask, ids.shape[1] - prompt_columns, share)
    wanted = wanted.masked_fill(mask.cumsum(-1) == 1, IGNORED)  # nothing of its row predicts a first token
    packed.inputs["labels"] = torch.stack((torch.full_like(wanted, IGNORED), wanted), dim=1)[packed.places][None]
    scored = model(**packed.inputs, fused_lm_head=True)
    for name in _LIKEWISE:
        scored[name] = packed.unpack(scored[name])[order.argsort()][:, 1:]
    return scored


class PackedModel:
    """A model, as TRL's trainers call it, that reads its rows without padding. share: see `score_rows`."""

    def __init__(self, model: Any, share: bool = True):
        self.model, self.share = model, share

    def __call__(self, **inputs: Any) -> Any:
        scored = score_rows(self.model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"], self.share)
        # Sums over long answers are rounded in float32 by more than the first steps' differences of them.
        scored.log_probs = scored.log_probs.double()
        scored.mean_logits = torch.zeros_like(scored.log_probs)  # asked for by metrics in _NOT_LOGGED alone
        return scored


class EncodedDataset(Dataset):
    """Rows that are token ids already: whatever a trainer would map them to, they stay as they are."""

    @classmethod
    def of(cls, data: Dataset) -> "EncodedDataset":
        return cls(data.data, data.info, data.split)  # not shuffled: these are all rows in their order

    def map(self, *args: Any, **kwargs: Any) -> "EncodedDataset":
        return self


class PreferenceMixin(ProbedTrainerMixin):
    """Put it before a TRL trainer: encoded rows go in as they are, and the head scores trained tokens only."""

    columns: tuple[str, ...]
    _metrics: Any

    def __init__(self, model: Any, args: Any, *, cache: RowCache | None = None, **kwargs: Any):
        self.cache = cache or RowCache()
        with with_fused_head(model, HeadSettings()):
            super().__init__(model=model, args=args, **kwargs)

    @property
    def shares_prompts(self) -> bool:
        """Whether the prompt of a pair is read once; flash kernels cannot."""
        return not self.model.config._attn_implementation.startswith("flash")

    def tokens_a_row(self) -> float:
        return float(sum(lengths_of(self.train_dataset, name).mean() for name in self.columns if name in IDS))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.columns)


class ReferenceMixin(PreferenceMixin):
    """For DPOTrainer and KTOTrainer: the reference is the model that the run starts from, and scores each row once.

    compute_ref_log_probs gives two tensors, which become the columns `reference_columns`.
    """

    reference_columns: tuple[str, str]
    _precompute_model_hash: str | None
    compute_ref_log_probs: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

    def __init__(self, model: Any, args: Any, **kwargs: Any):
        with own_reference(model):
            super().__init__(model, args, **kwargs)
        if is_sharded(model):  # each process has hashed its part
            self._precompute_model_hash = str(gather_object([self._precompute_model_hash]))
        self.train_dataset = self._with_reference(self.train_dataset, held_out=False)
        if self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset, held_out=True)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset  # too early: the head is TRL's own still

    def _with_reference(self, data: Any, held_out: bool) -> Dataset:
        """The data set with the reference's log-probabilities, from the cache if it has them."""
        key = {
            "rows": column_hash(data),
            "model": self._precompute_model_hash,
            "config": self.model.config.to_diff_dict(),
            "adapter": {name: sorted(map(str, config.to_dict().items())) for name, config in self._adapters().items()},
            "computed": [
                self.args.bf16,
                self.args.fp16,
                getattr(self.args, "ld_alpha", None),
                [self._size(held_out), self.accelerator.num_processes, held_out] if self.whole_batches else None,
            ],
        }
        key["config"] = str(sorted(key["config"].items()))
        values: dict[str, torch.Tensor] = {}
        if self._agreed(not self.cache.has("reference", key))[0]:
            values = self._reference_values(data, held_out)
        entry = self.cache.entry("reference", key, lambda folder: save_file(values, folder / _STORED))
        stored = load_file(Path(entry.folder) / _STORED)
        return concatenate_datasets([data, Dataset.from_dict({k: v.numpy() for k, v in stored.items()})], axis=1)

    def _adapters(self) -> dict[str, Any]:
        return getattr(self.accelerator.unwrap_model(self.model), "peft_config", {})

    def _size(self, held_out: bool) -> int:
        return self.args.per_device_eval_batch_size if held_out else self.args.per_device_train_batch_size

    def _reference_values(self, data: Any, held_out: bool) -> dict[str, torch.Tensor]:
        """Each process scores its share, in the batches in which the rows are read later."""
        size, readers = self._size(held_out), repeat(1)
        loader: Any = DataLoader(data, batch_size=size, collate_fn=self.data_collator)
        if held_out:
            loader = held_out_loader(loader, size, self.accelerator, self.whole_batches)
            readers = loader.batch_sampler.readers
        else:
            loader = self.accelerator.prepare(loader)
        found: list[tuple[torch.Tensor, ...]] = []
        self.ref_model = self.model  # so that TRL scores with its adapter, not without any
        with evaluation_mode(self.model):
            for batch, copies in zip(loader, readers, strict=False):
                parts = [part for part in self.compute_ref_log_probs(self.model, batch) if part is not None]
                gathered: Any = self.accelerator.gather_for_metrics(parts)
                found.append(tuple(part[: len(part) // copies].cpu() for part in gathered))
        self.ref_model = None
        columns = map(torch.cat, zip(*found, strict=True))
        return {name: column.contiguous() for name, column in zip(self.reference_columns, columns, strict=False)}


class PairTrainer(ReferenceMixin, DPOTrainer):
    """DPO and IPO, and DPOTrainer's other losses."""

    columns = (
        "chosen_ids",
        "chosen_labels",
        "rejected_ids",
        "rejected_labels",
        "ref_chosen_logps",
        "ref_rejected_logps",
    )
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        return super().compute_ref_log_probs(PackedModel(model, self.shares_prompts), inputs)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        loss = super()._compute_loss(PackedModel(model, self.shares_prompts), inputs, False)
        _drop_unlogged(self)
        return (loss, None) if return_outputs else loss


class SingleTrainer(ReferenceMixin, KTOTrainer):
    """KTO: answers one by one, each with a label."""

    columns = ("input_ids", "labels", "label", "ref_logps", "ref_KL_logps")
    reference_columns = ("ref_logps", "ref_KL_logps")
    whole_batches = True  # KL rows join an answer with the prompt after it in the batch

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        return super().compute_ref_log_probs(PackedModel(model, share=False), inputs)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        with _gathered_as_doubles(self.accelerator):
            loss = super()._compute_loss(PackedModel(model, share=False), inputs, False)
        _drop_unlogged(self)
        return (loss, None) if return_outputs else loss


@contextmanager
def _gathered_as_doubles(accelerator: Any) -> Iterator[None]:
    """Context for KTOTrainer's figures, which are float32 on a process whose batch has only good or only bad answers,
    and float64 on the others: they could not be gathered."""
    gather = accelerator.gather_for_metrics
    accelerator.gather_for_metrics = lambda value: gather(value.double())
    try:
        yield
    finally:
        del accelerator.gather_for_metrics


def _drop_unlogged(trainer: Any) -> None:
    for logged in trainer._metrics.values():
        for name in _NOT_LOGGED:
            logged.pop(name, None)


class WithoutReference(PreferenceMixin):
    """For CPOTrainer and ORPOTrainer, which TRL calls experimental."""

    columns = ("chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels")
    loss_is_scaled_for_ga = False
    average_logps = True
    whole_rows = False  # whether the language-model loss takes the chosen rows' prompts too
    beside = True  # whether there is a language-model loss

    def __init__(self, model: Any, args: Any, **kwargs: Any):
        self._total_train_tokens = 0
        kwargs = {
            name: EncodedDataset.of(value) if isinstance(value, Dataset) else value for name, value in kwargs.items()
        }
        super().__init__(model, args, **kwargs)
        self.use_dpo_data_collator = True  # what evaluation needs of the batch is there

    def concatenated_forward(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """(log-probabilities of chosen and of rejected answers [B], two unused, the language-model loss on chosen)."""
        ids, real, answers = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
        pairs = len(ids) // 2
        scored_at = answers.clone()
        if self.whole_rows:
            scored_at[:pairs] = real[:pairs]
        labels = ids.masked_fill(scored_at == 0, IGNORED)
        logps = score_rows(model, ids, real, labels, share=self.shares_prompts and not self.whole_rows).log_probs
        answered, read = answers[:, 1:], scored_at[:pairs, 1:]
        sums = (logps * answered).sum(-1)
        by_answer = sums / answered.sum(-1) if self.average_logps else sums
        unused = logps.new_zeros(1)
        nll = -(logps[:pairs] * read).sum() / read.sum() if self.beside else unused[0]
        return by_answer[:pairs], by_answer[pairs:], unused, unused, nll

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: Any = "train") -> Any:
        parent: Any = super()
        loss, metrics = parent.get_batch_loss_metrics(model, batch, train_eval)
        if train_eval == "train":
            counted: Any = self.accelerator.gather(batch["attention_mask"].sum())
            self._total_train_tokens += int(counted.sum())
        kept = {key: value for key, value in metrics.items() if key.removeprefix("eval_") not in _NOT_LOGGED}
        return loss, kept

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, *args, **kwargs)


class SimpoTrainer(WithoutReference, CPOTrainer):
    """SimPO, and CPOTrainer's other losses that a recipe adds to it."""

    @property
    def beside(self) -> bool:
        return self.cpo_alpha != 0


class OrpoTrainer(WithoutReference, ORPOTrainer):
    """ORPO. As in the authors' code, its language-model loss takes the prompt too."""

    whole_rows = True


TRAINERS: dict[str, Any] = {
    "dpo": PairTrainer,
    "ipo": PairTrainer,
    "kto": SingleTrainer,
    "simpo": SimpoTrainer,
    "orpo": OrpoTrainer,
}
