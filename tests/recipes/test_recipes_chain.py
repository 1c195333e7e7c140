"""Chains: references, what is run again and what is not, results. The stages' own work is replaced."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from conversations.errors import ToolkitError
from recipes.chains import chain as chain_module
from recipes.chains.chain import run_chain
from recipes.chains.plan import check_stages, plan_stages, resolve_stage
from recipes.chains.references import References
from recipes.files import read_json, write_json, write_text
from recipes.lock import hold_directory
from recipes.recipe.loader import Loaded, load_recipe, of_chain
from recipes.recipe.yaml_text import read_mapping
from recipes.runs.directory import dump_text

SFT = "stage: sft\nmodel: {path: base}\ndata: [{path: rows.jsonl}]\ntraining: {max_steps: 5}\noutput_dir: alone\n"
EVAL = """\
stage: eval
model: {path: base}
data: [{path: rows.jsonl}]
tasks: [{name: exact_match, metric: exact_match, temperatures: [0, 1]}]
output_dir: alone
"""
CHAIN = """\
stage: chain
model: {path: base}
output_dir: out
seed: 3
stages:
  - {name: sft, recipe: sft.yaml}
  - {name: eval_sft, recipe: eval.yaml, results: stages.sft, model: {path: "${sft}"}}
  - {name: more, recipe: sft.yaml, model: {path: "${sft}/final"}, max_tokens: "${sft.tokens}"}
  - {name: eval_more, recipe: eval.yaml, results: stages.more, model: {path: "${more}"}}
compare:
  - {name: gain, task: exact_match, before: eval_sft, after: eval_more}
"""


class FakeStages:
    """Stands for run_stage: writes the run directory's files and remembers what was asked for."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.recipes: dict[str, Any] = {}
        self.stop_at: str | None = None

    def __call__(self, loaded: Loaded) -> None:
        run_dir = Path(loaded.recipe.output_dir)
        name = run_dir.name
        self.ran.append(name)
        self.recipes[name] = loaded.recipe
        write_text(run_dir / "recipe.yaml", dump_text(loaded.resolved))
        values = {"status": "finished", "seconds": 2.0, "metrics": {}}
        values["peak_memory_gb"] = 0.75 if name == "eval_sft" else 0.25
        if name == self.stop_at:
            write_json(run_dir / "manifest.json", {**values, "status": "stopped"})
            raise KeyboardInterrupt
        if loaded.recipe.stage == "eval":
            right = 1.0 if name == "eval_more" else 0.0
            values["metrics"] = {"exact_match": {"n": 4, "greedy": 0.5 + right / 2, "t1": 0.25}}
            samples = [
                {"task": "exact_match", "decoding": "greedy", "row": row, "value": max(right, row % 2)}
                for row in range(4)
            ]
            write_text(run_dir / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
            write_json(run_dir / "results.json", {})
        else:
            (run_dir / "final").mkdir(exist_ok=True)
            for file in ("config.json", "tokenizer_config.json"):
                write_json(run_dir / "final" / file, {})
            save_file({"w": numpy.ones(1)}, run_dir / "final" / "model.safetensors")
            values["metrics"] = {"tokens": 640}
        write_json(run_dir / "manifest.json", values)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fake = FakeStages()
    monkeypatch.setattr(chain_module, "run_stage", fake)
    monkeypatch.setattr("recipes.runs.prepare.check_recipe", lambda recipe, earlier: None)
    monkeypatch.setattr("recipes.runs.prepare.will_give", lambda recipe, inputs: {})
    monkeypatch.setattr(chain_module, "_free_memory", lambda: None)  # a second a stage, with torch loaded
    return fake


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for name, text in (("sft", SFT), ("eval", EVAL), ("chain", CHAIN)):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    return lambda *overrides: run_chain(of_chain(load_recipe(Path("chain.yaml"), overrides)))


ALL = ["sft", "eval_sft", "more", "eval_more"]


def test_stages_run_in_order_with_what_earlier_ones_left(stages: FakeStages, start: Any) -> None:
    results = start()
    assert stages.ran == ALL
    assert {recipe.seed for recipe in stages.recipes.values()} == {3}
    assert stages.recipes["sft"].model.path == "base"
    assert stages.recipes["more"].model.path == "out/sft/final"
    assert stages.recipes["more"].max_tokens == 640 and stages.recipes["more"].output_dir == "out/more"
    assert results["stages"] == {
        "sft": {"exact_match": 0.5, "exact_match_t1": 0.25, "n": 4},
        "more": {"exact_match": 1.0, "exact_match_t1": 0.25, "n": 4},
    }
    assert results["gain"]["change"] == {"greedy": {"difference": 0.5, "standard_error": 0.28868, "n": 4}}
    assert (results["seed"], results["seconds"], results["peak_memory_gb"]) == (3, 8.0, 0.75)
    assert json.loads(Path("out/results.json").read_text()) == results


def test_tables_have_the_titles_of_the_chain(
    stages: FakeStages, start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    titled = CHAIN.replace("{name: more,", '{name: more, title: "SFT, more",').replace(
        "{name: gain,", "{name: gain, title: Gain,"
    )
    Path("chain.yaml").write_text(titled, encoding="utf-8")
    start()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "SFT, more 100.0 % 25.0 %" in lines and "sft 50.0 % 25.0 %" in lines
    assert "Gain +50.0" in lines and "sft -> SFT, more n = 4" in lines
    capsys.readouterr()
    Path("chain.yaml").write_text(CHAIN, encoding="utf-8")
    start()
    assert stages.ran == ALL, "a title is no reason to run a stage again"
    assert "more 100.0 % 25.0 %" in " ".join(capsys.readouterr().out.split())


def test_a_finished_chain_runs_nothing_again(stages: FakeStages, start: Any) -> None:
    first = start()
    stages.ran.clear()
    assert start() == first and stages.ran == []


def test_a_stopped_chain_goes_on_where_it_stopped(stages: FakeStages, start: Any) -> None:
    stages.stop_at = "more"
    with pytest.raises(KeyboardInterrupt):
        start()
    assert stages.ran == ["sft", "eval_sft", "more"] and not Path("out/results.json").exists()
    assert read_json(Path("out/manifest.json"))["status"] == "stopped"
    stages.ran.clear()
    stages.stop_at = None
    start()
    assert stages.ran == ["more", "eval_more"]
    assert not Path("out/.superseded").exists()


def test_old_runs_are_set_aside_one_beside_the_other(
    stages: FakeStages, start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not while somebody else works in them."""
    for steps in (5, 6, 7):
        start(f"stages.more.training.max_steps={steps}")
    attic = Path("out/.superseded")
    assert (
        "more: its recipe or input has changed; the old run is now out/.superseded/more-2\n" in capsys.readouterr().out
    )
    assert sorted(path.name for path in attic.iterdir()) == ["eval_more-1", "eval_more-2", "more-1", "more-2"]
    steps = [read_mapping(attic / f"more-{n}" / "recipe.yaml")["training"] for n in (1, 2)]
    assert steps == [{"max_steps": 5}, {"max_steps": 6}]
    stages.ran.clear()
    with hold_directory(Path("out/more")), pytest.raises(ToolkitError, match="out/more is in use by process"):
        start("stages.more.training.max_steps=8")
    assert stages.ran == [] and not (attic / "more-3").exists()


def test_the_manifest_adds_up_what_the_stages_took(stages: FakeStages, start: Any) -> None:
    start()
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert (manifest["status"], manifest["seconds"], manifest["peak_memory_gb"]) == ("finished", 8.0, 0.75)


def test_a_stage_whose_result_is_gone_runs_again(stages: FakeStages, start: Any) -> None:
    start()
    stages.ran.clear()
    shutil.rmtree("out/more")
    start()
    assert stages.ran == ["more"]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (("stages.sft.training.max_steps=6",), ALL),
        (("stages.more.training.max_steps=6",), ["more", "eval_more"]),
        (("stages.eval_more.tasks=[{name: exact_match, metric: exact_match, temperatures: [0]}]",), ["eval_more"]),
        (("seed=4",), ALL),
    ],
)
def test_only_what_a_changed_recipe_touches_runs_again(
    stages: FakeStages, start: Any, change: tuple[str, ...], again: list[str]
) -> None:
    start()
    stages.ran.clear()
    start(*change)
    assert stages.ran == again
    assert sorted(path.name for path in Path("out/.superseded").iterdir()) == sorted(f"{name}-1" for name in again)


@pytest.mark.parametrize("file", ["rows.jsonl", "base/config.json"])
def test_changed_input_runs_again(stages: FakeStages, start: Any, file: str) -> None:
    start()
    stages.ran.clear()
    Path(file).write_text('{"messages": [1]}\n')
    start()
    assert stages.ran == ALL


def test_changed_held_out_rows_run_again(stages: FakeStages, start: Any) -> None:
    """They too are what a stage's result depends on: its eval_loss, and which checkpoint is the best."""
    Path("sft.yaml").write_text(SFT + "eval_data: [{path: held_out.jsonl}]\n")
    Path("held_out.jsonl").write_text('{"messages": []}\n')
    start()
    stages.ran.clear()
    start()
    assert stages.ran == []
    Path("held_out.jsonl").write_text('{"messages": [1]}\n')
    start()
    assert stages.ran == ALL


def test_a_changed_stage_recipe_counts_like_an_override(stages: FakeStages, start: Any) -> None:
    start()
    stages.ran.clear()
    Path("eval.yaml").write_text(EVAL.replace("[0, 1]", "[0]"))
    start()
    assert stages.ran == ["eval_sft", "eval_more"]


def test_a_directory_of_another_run_is_refused(stages: FakeStages, start: Any, tmp_path: Path) -> None:
    start()
    before = Path("out/recipe.yaml").read_text()
    Path("other.yaml").write_text(CHAIN)
    with pytest.raises(ToolkitError, match=r"out holds the run of another chain, .*chain\.yaml"):
        run_chain(of_chain(load_recipe(Path("other.yaml"))))
    with pytest.raises(ToolkitError, match="holds a run of stage sft, not a chain"):
        start("output_dir=out/sft")
    assert Path("out/recipe.yaml").read_text() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.model.path=${more}", "${more} names a stage that does not run before this one"),
        (
            "stages.sft.model.path=${mre}",
            "stages.sft.model.path: ${mre} is not defined here; available are ${output_dir}",
        ),
        ("stages.sft.modle.path=x", 'unknown key "stages.sft.modle", did you mean "stages.sft.model"?'),
        ("stages.sft.output_dir=x", "stages.sft.output_dir: a chain's stage writes to OUTPUT_DIR/NAME"),
        ("stages.sft.results=stages.x", "stages.sft.results: for evaluations only"),
        ("stages.eval_sft.results=null", "stages.eval_sft.results: set where its figures go"),
        ("stages.eval_sft.results=elsewhere", "results: must match pattern"),
        ("stages.sft.recipe=missing.yaml", "no such recipe"),
        ("stages.sft.recipe=chain.yaml", "is a chain itself"),
    ],
)
def test_a_wrong_chain_is_refused_before_anything_runs(
    stages: FakeStages, start: Any, override: str, message: str
) -> None:
    with pytest.raises(ToolkitError) as caught:
        start(override)
    assert message in str(caught.value)
    assert stages.ran == [] and not Path("out").exists()


def test_references_keep_their_type_and_know_their_stages(start: Any) -> None:
    loaded = load_recipe(Path("chain.yaml"), ["model.path=${output_dir}/base"])
    references = References(loaded.recipe)
    references.add("sft", "out/sft", tokens=640)
    filled = references.fill({"a": "${sft.tokens}", "b": ["x/${sft}/y", "${model}", "${seed}"]}, "")
    assert filled == {"a": 640, "b": ["x/out/sft/y", "out/base", 3]}
    used = {
        entry.name: references.used(resolve_stage(loaded, entry, references).recipe)
        for entry in loaded.recipe.stages[:3]
    }
    assert used == {"sft": {}, "eval_sft": {"sft": "out/sft"}, "more": {"sft": "out/sft"}}
    references.add("eval_sft", "out/eval_sft", tokens=None)
    with pytest.raises(ToolkitError, match=r"a: \$\{eval_sft.tokens\}: that stage trains nothing"):
        references.fill({"a": "${eval_sft.tokens}"}, "")


def test_a_plan_knows_the_shape_of_models_that_are_still_to_be_made(start: Any) -> None:
    """Also where an earlier stage was begun and stopped: what it starts from stands for its result."""
    new = ["model={path: new, preset: tiny}"]
    for begun in (False, True):
        if begun:
            Path("out/sft").mkdir(parents=True)
            write_json(Path("out/sft/manifest.json"), {"status": "stopped"})
        assert [name for name, _ in plan_stages(load_recipe(Path("chain.yaml"), new))] == ALL
        check_stages(load_recipe(Path("chain.yaml"), new))
        for wrong, fault in (
            ("stages.more.model.path=${eval_sft}", "stages.more: out/eval_sft will not contain a model; name a stage"),
            ("stages.more.model.config={n_group: 3}", "stages.more: model.config: n_group is 3"),
            (
                "stages.more.model.config={n_routed_experts: 0}",
                'stages.more: the LoRA target "experts.gate_up" matches',
            ),
        ):
            lora = ["stages.more.lora={targets: [experts]}"]
            with pytest.raises(ValueError, match=re.escape(fault)):
                check_stages(load_recipe(Path("chain.yaml"), [*new, *lora, wrong]))
