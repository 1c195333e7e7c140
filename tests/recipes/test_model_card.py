"""The README.md of what a run trains, merges and exports: the hub's own class reads it, and it says what was done."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import sft.stage
from recipes.cli import main
from recipes.runs.lineage import LONGEST, lineage
from recipes.runs.model_card import card_text

LORA = "lora={targets: [attention, experts], r: 2, alpha: 4}"
TALK = {"messages": [{"role": "user", "content": "17 + 25?"}, {"role": "assistant", "content": "42"}]}


def write_recipe(name: str, **recipe: Any) -> str:
    Path(name).write_text(json.dumps(recipe), encoding="utf-8")
    return name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A full run, an adapter run on it, and an evaluation of that one, side by side."""
    home = tmp_path_factory.mktemp("cards")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sft.stage, "SAMPLE_TOKENS", 1)
        Path("talks.jsonl").write_text((json.dumps(TALK) + "\n") * 4, encoding="utf-8")
        training = {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 64}
        taught = write_recipe("sft.yaml", stage="sft", data=[{"path": "talks.jsonl"}], training=training)
        task = {
            "name": "exact_match",
            "metric": "exact_match",
            "rule": "number",
            "data": [{"path": "tiny:test_problems?n=4"}],
        }
        measured = write_recipe("eval.yaml", stage="eval", tasks=[{**task, "max_new_tokens": 4}])
        for words in (
            ["init", "base", "--preset", "tiny"],
            ["sft", taught, "model.path=base", "output_dir=runs/full"],
            ["sft", taught, "model.path=runs/full", "output_dir=runs/lora", LORA],
        ):
            assert main(words) == 0, words
        before = Path("runs/lora/final/README.md").read_text(encoding="utf-8")
        assert "No evaluation of this model is recorded" in before
        assert main(["eval", measured, "model.path=runs/lora", "output_dir=runs/eval_lora"]) == 0
        several = {"stage": "eval", "models": {"a": "base", "b": "runs/full"}, "tasks": [{**task, "max_new_tokens": 4}]}
        assert main(["eval", write_recipe("several.yaml", **several), "output_dir=runs/eval_both"]) == 0
        yield home


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def test_a_full_run(home: Path):
    card = ModelCard.load("runs/full/final/README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["deepseek_v2", "sft", "conversational"]
    assert [result.metric_type for result in card.data.eval_results] == ["exact_match"]  # of runs/eval_both/b
    assert card.data.license is None and "No licence is stated" in card.text
    assert hashlib.sha256(Path("talks.jsonl").read_bytes()).hexdigest() in card.text and "| 4 | 4 | 0 |" in card.text
    assert "max_length: 64" in card.text and str(home) not in card.content
    assert card.data.base_model is None and "Base model: `base`" in card.text  # the hub knows no local directory


def test_an_adapter_run_with_an_evaluation():
    card = ModelCard.load("runs/lora/final/README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "More Information Needed" not in card.text  # PEFT's own
    assert "### supervised fine-tuning: full" in card.text and "### supervised fine-tuning: lora" in card.text
    (result,) = card.data.eval_results
    stated = json.loads(Path("runs/eval_lora/results.json").read_text(encoding="utf-8"))
    assert (result.metric_type, result.metric_value) == ("exact_match", stated["exact_match"])
    assert result.metric_args == {"interval_95": stated["exact_match_interval"], "n": 4}
    low, high = (100 * bound for bound in stated["exact_match_interval"])
    assert f"95 % interval {low:.1f} to {high:.1f}" in card.text and "No evaluation" not in card.text


def test_a_merge_and_an_export(tmp_path: Path):
    assert main(["merge", "runs/lora", str(tmp_path / "chat"), "--license", "mit"]) == 0
    assert main(["export", "runs/lora", str(tmp_path / "served"), "--kv-b"]) == 0
    merged, served = (ModelCard.load(tmp_path / name / "README.md") for name in ("chat", "served"))
    assert (merged.data.library_name, served.data.library_name) == ("transformers", "peft")
    assert (merged.data.license, served.data.license) == ("mit", None)
    assert merged.data.eval_results == served.data.eval_results and len(merged.data.eval_results) == 1
    assert merged.data.model_name == "chat" and "licence" not in merged.text.lower()


def test_a_licence_that_was_added_by_hand_stays(tmp_path: Path):
    readme = Path("runs/full/final/README.md")
    old = readme.read_text(encoding="utf-8")
    try:
        readme.write_text(old.replace("---\n", "---\nlicense: apache-2.0\n", 1), encoding="utf-8")
        assert main(["merge", "runs/full", str(tmp_path / "chat")]) == 0
    finally:
        readme.write_text(old, encoding="utf-8")
    assert ModelCard.load(tmp_path / "chat" / "README.md").data.license == "apache-2.0"


def test_a_licence_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["merge", "runs/full", str(tmp_path / "chat"), "--license", "MIT licence"]) == 2
    assert "'MIT licence' is not a licence as the hub names them" in capsys.readouterr().err
    assert not (tmp_path / "chat").exists()


def test_names_of_the_hub_are_in_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    run.mkdir()
    data = [{"path": "owner/talks:main"}, {"path": "/home/someone/private.jsonl"}]
    recipe = {"stage": "sft", "model": {"path": "deepseek-ai/DeepSeek-V2-Lite"}, "data": data}
    (run / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    (run / "manifest.json").write_text('{"status": "finished"}', encoding="utf-8")
    for adapter, relation in ((True, "adapter"), (False, "finetune")):
        card = ModelCard(card_text("run", name="x", adapter=adapter, base="deepseek-ai/DeepSeek-V2-Lite"))
        assert card.data.base_model == "deepseek-ai/DeepSeek-V2-Lite" and card.data.datasets == ["owner/talks"]
        assert card.data.base_model_relation == relation and "/home/someone" not in card.content


def test_what_is_no_run_and_what_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    card = ModelCard(card_text("base", name="x", adapter=False, base="base", warnings=["norm_topk_prob is true"]))
    assert "not recorded beside it" in card.text and "- norm_topk_prob is true; load it with" in card.text
    Path("loop").mkdir()
    Path("loop/recipe.yaml").write_text(json.dumps({"stage": "sft", "model": {"path": "loop"}}), encoding="utf-8")
    Path("loop/manifest.json").write_text("{}", encoding="utf-8")
    assert len(lineage("loop")[1]) == LONGEST
