"""`training` against the TRL configs, and `model.config` against the model's."""

from typing import Any

import pytest

from conversations.errors import ToolkitError
from deepseek_v2_modeling.errors import ModelError
from recipes.recipe.schema import validate
from recipes.runs.training_fields import OWNED, check_model_config, check_training, config_fields
from recipes.stages import trainings


def check(stage: str, training: dict[str, Any], **more: Any) -> None:
    rewards = {"rewards": [{"rule": "number"}]} if stage == "rl" else {}
    common = {"model": {"path": "m"}, "data": [{"path": "x.jsonl"}], "output_dir": "o"}
    check_training(validate({"stage": stage, **common, **rewards, "training": training, **more}))


@pytest.mark.parametrize(
    ("stage", "training"),
    [
        ("sft", {}),
        (
            "sft",
            {
                "learning_rate": 1e-4,
                "num_train_epochs": 2,
                "packing": False,
                "max_length": None,
                "optim": "adamw_torch",
            },
        ),
        ("reward", {"max_length": 128, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "eval_strategy": "no"}),
        ("rl", {"num_generations": 4, "per_device_train_batch_size": 8, "beta": 0.04, "temperature": 1}),
    ],
)
def test_fields_of_the_config_are_taken(stage: str, training: dict[str, Any]) -> None:
    check(stage, training)


@pytest.mark.parametrize(
    ("stage", "training", "message"),
    [
        ("sft", {"lerning_rate": 1e-4}, 'unknown key "training.lerning_rate", did you mean "training.learning_rate"?'),
        ("sft", {"num_generations": 8}, 'unknown key "training.num_generations"'),
        ("reward", {"packing": True}, 'unknown key "training.packing": RewardConfig has no such field'),
        ("rl", {"beat": 0.1}, 'did you mean "training.beta"?'),
        ("sft", {"router_aux_loss_coef": 0.1}, "set by the toolkit; write model.config.aux_loss_alpha"),
        ("sft", {"output_dir": "x"}, "training.output_dir is set by the toolkit; write output_dir"),
        ("rl", {"reward_weights": [1.0]}, "write rewards.0.weight"),
        ("sft", {"learning_rate": "fast"}, "training.learning_rate: must be a valid number, not 'fast'"),
        ("sft", {"packing": "yes"}, "training.packing: must be a valid boolean, not 'yes'"),
        ("sft", {"max_steps": 1.5}, "training.max_steps: must be a valid integer, not 1.5"),
        ("sft", {"lr_scheduler_type": "wavy"}, "training.lr_scheduler_type is 'wavy': "),
        ("rl", {"num_generations": 8, "per_device_train_batch_size": 3}, "training."),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(stage: str, training: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        check(stage, training)
    assert message in str(caught.value)


def test_every_owned_field_is_one_that_a_user_could_write() -> None:
    known = {name for training in trainings() for name in config_fields(training.config)}
    assert set(OWNED) <= known


def test_model_config_takes_the_models_settings_only() -> None:
    check_model_config({"aux_loss_alpha": 0.003, "seq_aux": False, "topk_group": 2})
    with pytest.raises(ToolkitError) as caught:
        check_model_config({"aux_los_alpha": 0.1})
    assert str(caught.value) == (
        'unknown key "model.config.aux_los_alpha", did you mean "model.config.aux_loss_alpha"?'
    )


def test_evaluation_needs_rows() -> None:
    check("sft", {"eval_strategy": "steps"}, eval_data=[{"path": "y.jsonl"}])
    with pytest.raises(ModelError, match="there is no eval_data"):
        check("sft", {"eval_strategy": "steps"})
