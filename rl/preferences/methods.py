"""Methods that train on preferences without sampling: what each is made of, and what it cannot take. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conversations.answers.judging import is_pair
from conversations.answers.usable_rows import no_pair, not_judged
from conversations.row import Refuse, Row


@dataclass(frozen=True)
class PreferenceMethod:
    """How a method uses TRL.

    config: its config class. fixed: fields that make the method what it is. defaults: fields that differ from TRL's
    unless the recipe states them. figures: of an evaluation. single: whether it trains on answers one by one.
    reference: whether it compares with the model that the run starts from.
    """

    config: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    figures: tuple[str, ...] = ()
    single: bool = False
    reference: bool = True

    def settings(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's fields with those of the method."""
        return {**self.defaults, **training, **self.fixed}

    def refusal(self) -> Refuse:
        return _no_verdict if self.single else no_pair


_OF_PAIRS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
_PACKED = {"padding_free": False}

METHODS: dict[str, PreferenceMethod] = {
    "dpo": PreferenceMethod("DPOConfig", {"precompute_ref_log_probs": True, **_PACKED}, figures=_OF_PAIRS),
    "ipo": PreferenceMethod(
        "DPOConfig", {"loss_type": ["ipo"], "precompute_ref_log_probs": True, **_PACKED}, figures=_OF_PAIRS
    ),
    "kto": PreferenceMethod(
        "KTOConfig", {"precompute_ref_log_probs": True, "train_sampling_strategy": "sequential"}, single=True
    ),
    "simpo": PreferenceMethod(
        "trl.experimental.cpo:CPOConfig",
        {"loss_type": "simpo"},
        {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},  # the paper's; TRL's default adds a language-model loss
        figures=_OF_PAIRS,
        reference=False,
    ),
    "orpo": PreferenceMethod("trl.experimental.orpo:ORPOConfig", figures=_OF_PAIRS, reference=False),
}

# Fields of `training` that have no effect, or another than they say.
_REFUSED = {
    "sync_ref_model": "the reference's log-probabilities are computed once",
    "ref_model_mixup_alpha": "the reference's log-probabilities are computed once",
    "ref_model_sync_steps": "the reference's log-probabilities are computed once",
    "use_weighting": "the weights of WPO are not supported",
    "precompute_ref_batch_size": "the reference is computed in the batches of training",
    "generate_during_eval": "nothing is generated; use dsv2 eval",
    "max_completion_length": "it limits nothing here; write max_length, of prompt and answer",
    "is_encoder_decoder": "the model is a decoder",
    "padding_value": "rows are packed without padding",
    "dataset_num_proc": "rows are encoded before the trainer sees them",
}


def fault(name: str, training: Mapping[str, Any]) -> str | None:
    """Why a recipe's `training` does not fit the method; None where it does."""
    method = METHODS[name]
    for key, value in training.items():
        if key in _REFUSED:
            return f"training.{key} cannot be used with method: {name} ({_REFUSED[key]}); leave it out"
        if key in method.fixed and value not in (method.fixed[key], [method.fixed[key]]):
            return f"training.{key} is {method.fixed[key]!r} in method: {name}, not {value!r}; leave it out"
    if training.get("beta") == 0:
        return f"training.beta is 0, with which method: {name} learns nothing from preferences; it must be over 0"
    loss = training.get("loss_type")
    if name == "dpo" and "ipo" in (loss if isinstance(loss, list) else [loss]):
        return "training.loss_type ipo has a method of its own; write method: ipo"
    if name == "kto" and loss != "apo_zero_unpaired" and training.get("per_device_train_batch_size") == 1:
        return (
            "training.per_device_train_batch_size is 1; method: kto compares answers with those to other prompts of "
            "the same batch, and needs at least 2"
        )
    return None


def _no_verdict(row: Row) -> str | None:
    """Nothing that says whether an answer is good."""
    if why := not_judged(row):
        return why
    if is_pair(row) or row.get("label") in (0, 1):
        return None
    return "is not a pair and has no label that is true or false, which method: kto needs"
