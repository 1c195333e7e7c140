"""Every number of the TRL configs has bounds, and a value outside them is refused by its name."""

import dataclasses
from typing import Any, get_type_hints

import pytest

from conversations.errors import ToolkitError
from recipes.recipe.loader import load_recipe
from recipes.runs.training_bounds import BOUNDS, check_bounds
from recipes.runs.training_fields import OWNED, config_class
from recipes.stages import trainings

CONFIGS = [training.config for training in trainings()]


def numeric_fields() -> set[str]:
    found = set()
    for name in CONFIGS:
        cls = config_class(name)
        hints = get_type_hints(cls)
        names = {field.name for field in dataclasses.fields(cls) if field.init}
        found |= {name for name in names if {int, float} & {hints[name], *getattr(hints[name], "__args__", ())}}
    return found - set(OWNED)


def test_every_number_of_the_configs_has_bounds() -> None:
    assert numeric_fields() == set(BOUNDS) - set(OWNED)


def test_the_configs_own_defaults_are_inside() -> None:
    for name in CONFIGS:
        defaults = {f.name: f.default for f in dataclasses.fields(config_class(name)) if f.name in BOUNDS}
        check_bounds({name: value for name, value in defaults.items() if value is not dataclasses.MISSING})


@pytest.mark.parametrize(
    ("field", "value", "must"),
    [
        ("max_length", -1, "at least 2"),
        ("max_length", 0, "at least 2"),
        ("max_completion_length", 0, "at least 1"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("gradient_accumulation_steps", -4, "at least 1"),
        ("max_steps", 0, "at least 1 or -1"),
        ("num_train_epochs", 0, "over 0"),
        ("learning_rate", -1e-4, "over 0"),
        ("learning_rate", float("nan"), "over 0"),
        ("learning_rate", float("inf"), "over 0"),
        ("warmup_steps", -0.1, "at least 0"),
        ("adam_beta2", 1.0, "at least 0 and at most 1"),
        ("temperature", 0, "over 0"),
        ("top_p", 1.5, "over 0 and at most 1"),
        ("num_generations", 1, "at least 2"),
        ("per_device_train_batch_size", 10**30, "at most 1,000,000,000,000"),
        ("per_device_eval_batch_size", 10**400, "at most 1,000,000,000,000"),
        ("max_steps", 10**30, "at most 1,000,000,000,000"),
        ("learning_rate", 1e30, "at most 1,000,000,000,000"),
        ("max_length", 10**13, "at most 1,000,000,000,000"),
    ],
)
def test_a_number_outside_is_refused(field: str, value: Any, must: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        check_bounds({field: value})
    assert str(caught.value) == f"training.{field}: must be {must}, not {value!r}"


def test_what_is_no_number_is_let_be() -> None:
    check_bounds({"max_length": None, "pad_to_multiple_of": "auto", "bf16": True, "top_k": -1, "max_steps": -1})


@pytest.mark.parametrize("where", ["lora.alpha=.inf", "max_seconds=.nan", "data.0.weight=.inf"])
def test_our_own_numbers_are_finite(tmp_path: Any, where: str) -> None:
    recipe = "stage: sft\nmodel: {path: m}\nlora: {targets: [dense]}\ndata: [{path: a.jsonl}]\noutput_dir: o\n"
    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(ToolkitError, match=f"{where.partition('=')[0]}: .*must be a finite number"):
        load_recipe(tmp_path / "r.yaml", [where])
