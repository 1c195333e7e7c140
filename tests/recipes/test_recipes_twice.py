"""What stands twice in a recipe, so that it would count twice or overwrite a figure, is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from conversations.errors import ToolkitError
from conversations.sections import DataSource
from deepseek_v2_modeling import ModelError
from deepseek_v2_modeling.esft.choice import read_choice
from recipes.chains.plan import plan_stages
from recipes.data.sources import read_sources
from recipes.recipe.loader import load_recipe
from recipes.recipe.schema import validate

EVAL = {"stage": "eval", "model": {"path": "m"}, "output_dir": "o", "data": [{"path": "a.jsonl"}]}
RL = {"stage": "rl", "model": {"path": "m"}, "output_dir": "o", "data": [{"path": "a.jsonl"}]}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("temperatures", [[1, 1.0], [0, 0.0], [0.7, 0, 0.7], [0.1234567, 0.1234568]])
def test_one_temperature_twice(temperatures: list[float]) -> None:
    task = {"name": "a", "metric": "refusal", "temperatures": temperatures}
    with pytest.raises(ToolkitError, match=r"tasks\.0\.temperatures: must differ within six digits"):
        validate({**EVAL, "tasks": [task]})
    validate({**EVAL, "tasks": [{**task, "temperatures": [0, 0.7, 1]}]})


@pytest.mark.parametrize(
    ("name", "value"), [("rule", "math"), ("patterns", ["a"]), ("temperatures", [1])], ids=lambda value: str(value)
)
def test_what_plays_no_part_in_a_metric(name: str, value: Any) -> None:
    task = {"name": "a", "metric": "pair_accuracy", name: value}
    with pytest.raises(ToolkitError, match=f"{name} has no effect on pair_accuracy; leave it out"):
        validate({**EVAL, "tasks": [task]})


@pytest.mark.parametrize(
    "rewards",
    [
        [{"rule": "number"}, {"rule": "format"}, {"rule": "number", "weight": 2.0}],
        [{"model": "runs/a"}, {"model": "runs/b"}, {"model": "runs/a", "on_error": "zero"}],
    ],
)
def test_one_reward_twice(rewards: list[dict[str, Any]]) -> None:
    with pytest.raises(ToolkitError, match=r"rewards\.2 is the same as rewards\.0, so it would count twice"):
        validate({**RL, "rewards": rewards})
    validate({**RL, "rewards": rewards[:2]})


def test_one_model_judges_in_two_ways() -> None:
    validate({**RL, "rewards": [{"model": "runs/a", "clip": 1.0}, {"model": "runs/a", "clip": 2.0}]})


def rows_file(name: str, rows: int = 20) -> None:
    lines = [json.dumps({"prompt": f"{name} {i}", "completion": "a", "other": "b"}) + "\n" for i in range(rows)]
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(lines))


def rows_of(*entries: dict[str, Any]) -> int:
    return len(read_sources([DataSource.model_validate(entry) for entry in entries], seed=0).rows)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"path": "d"}, {"path": "d/a.jsonl"}),
        ({"path": "d/*.jsonl"}, {"path": "d/../d/a.jsonl", "weight": 2.0}),
        ({"split": "[:10]"}, {"split": "[9:]"}),
        ({"split": "train[:60%]"}, {"split": "train[50%:]"}),
        ({"split": "[:10]"}, {"split": "[50%:]"}),
        ({}, {"on_bad_row": "skip"}),
    ],
)
def test_rows_of_a_file_twice(first: dict[str, Any], second: dict[str, Any]) -> None:
    rows_file("d/a.jsonl")
    path = {"path": "d/a.jsonl"}
    with pytest.raises(ToolkitError, match=r"data\.1 reads rows of a\.jsonl that data\.0 also reads"):
        rows_of(path | first, path | second)


def test_other_rows_and_another_reading_of_a_file_are_fine() -> None:
    rows_file("d/a.jsonl")
    path = {"path": "d/a.jsonl"}
    assert rows_of(path | {"split": "[:10]"}, path | {"split": "[10:]"}) == 20
    assert rows_of(path | {"split": "[:60%]"}, path | {"split": "[60%:]"}) == 20
    assert rows_of(path, path | {"columns": {"prompt": "prompt", "completion": "other"}}) == 40


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "**/**/*.jsonl", "d/**", "**", "/".join(["**"] * 20) + "/a*"])
def test_a_pattern_reads_each_file_once(pattern: str) -> None:
    for folder in ("d", "d/b", "d/b/c"):
        rows_file(f"{folder}/a.jsonl", 2)
    assert rows_of({"path": pattern}) == 6


def test_one_layer_of_experts_twice() -> None:
    Path("experts.json").write_text('{"experts": {"1": [0], "01": [1]}}')
    with pytest.raises(ModelError, match="experts names a layer twice"):
        read_choice("experts.json")


TASK = {"name": "sums", "metric": "refusal", "temperatures": [0, 1]}


@pytest.fixture
def chain() -> Any:
    """plan(changes) reads a chain of two evaluations of the same tasks, the second with changes."""
    Path("eval.yaml").write_text(json.dumps({**EVAL, "tasks": [TASK]}))
    compared = {"name": "gain", "before": "one", "after": "two", "task": "sums"}

    def plan(compare: dict[str, Any], **second: Any) -> None:
        stages = [
            {"name": "one", "recipe": "eval.yaml", "results": "stages.one"},
            {"name": "two", "recipe": "eval.yaml", "results": "stages.two", **second},
        ]
        comparisons = [{**compared, **each} for each in ([compare] if isinstance(compare, dict) else compare)]
        Path("chain.yaml").write_text(
            json.dumps({"stage": "chain", "output_dir": "o", "stages": stages, "compare": comparisons})
        )
        list(plan_stages(load_recipe(Path("chain.yaml"))))

    return plan


@pytest.mark.parametrize(
    ("compare", "second", "message"),
    [
        ({}, {"results": "stages.one"}, r"stages\.two\.results: one also writes its figures of sums to stages\.one"),
        ([{}, {}], {}, 'compare: "gain" is already a key of results.json'),
        ({"name": "seconds"}, {}, 'compare: "seconds" is already a key of results.json'),
        ({"task": "sum"}, {}, r"compare\.gain\.task: one has no task sum; its tasks are sums"),
        ({}, {"tasks": [{**TASK, "name": "others"}]}, r"two has no task sums; its tasks are others"),
        ({}, {"tasks": [{**TASK, "temperatures": [0.5]}]}, "one and two share no temperature of sums"),
    ],
)
def test_figures_of_a_chain(chain: Any, compare: Any, second: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolkitError, match=message):
        chain(compare, **second)


def test_other_tasks_in_one_place_are_fine(chain: Any) -> None:
    chain({"after": "one"}, results="stages.one", tasks=[{**TASK, "name": "others"}])
