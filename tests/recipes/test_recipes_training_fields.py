"""`training` against the TRL configs, and `model.config` against the model's."""

import re
from typing import Any

import pytest

from conversations.errors import ToolkitError
from deepseek_v2_modeling.errors import ModelError
from recipes.recipe.schema import validate
from recipes.runs.training_fields import OWNED, check_model_config, check_training, config_fields
from recipes.stages import trainings


def check(stage: str, training: dict[str, Any], **more: Any) -> None:
    rewards = {"rewards": [{"rule": "number"}]} if stage == "rl" and "method" not in more else {}
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


HELD_OUT = {"eval_data": [{"path": "y.jsonl"}]}
EVALUATED = {"eval_strategy": "steps", "metric_for_best_model": "loss"}


@pytest.mark.parametrize("stage", ["sft", "reward", "rl", "dpo"])
@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"eval_strategy": "steps"}, "training.eval_strategy is steps, and there is no eval_data"),
        ({"eval_on_start": True}, "training.eval_on_start is true, and there is no eval_data"),
        ({"load_best_model_at_end": True}, "training.load_best_model_at_end is true, which goes by evaluations"),
        ({"save_strategy": "best"}, "training.save_strategy is best, which goes by evaluations"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "training.lr_scheduler_type is reduce_lr_on_plateau, which"),
    ],
)
def test_evaluation_needs_rows(stage: str, training: dict[str, Any], said: str) -> None:
    more: dict[str, Any] = {"method": stage} if stage == "dpo" else {}
    stage = "rl" if stage == "dpo" else stage
    metric = {} if stage == "rl" else EVALUATED
    check(stage, {**metric, "eval_strategy": "steps", **training}, **HELD_OUT, **more)
    with pytest.raises(ModelError, match=re.escape(said)):
        check(stage, training, **more)


def test_an_evaluation_at_the_start_needs_no_other() -> None:
    check("sft", {"eval_on_start": True}, **HELD_OUT)
    check("sft", {"eval_on_start": False})
