"""Every recipe in the tree: it parses, says what it needs, and runs at toy size with model and data replaced."""

import json
from pathlib import Path
from typing import Any

import pytest

import sft.stage
from conversations.sandbox.box import why_unavailable
from eval.config import SCORED
from recipes.chains.plan import plan_stages
from recipes.cli import main
from recipes.files import read_json
from recipes.recipe.loader import load_recipe
from recipes.recipe.yaml_text import read_mapping
from recipes.runs.new_model import make_model
from recipes.runs.prepare import check_settings

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
NAMES = {str(path.relative_to(ROOT / "recipes")) for path in RECIPES}
STAGES = {path: read_mapping(path)["stage"] for path in RECIPES}
ALONE = [path for path in RECIPES if STAGES[path] != "chain"]
CHAINS = [path for path in RECIPES if STAGES[path] == "chain"]
TINY_DATA = {
    "sft": "sft_train",
    "reward": "safety_train",
    "rl": "rl_reasoning",
    "eval": "test_problems",
    "pairs": "rl_reasoning",
}
FAMILY = {  # folder -> preset
    "deepseek_moe": "deepseek-moe-mini", "v3": "v3-mini", "glm4_moe_lite": "glm4-moe-lite-mini", "youtu": "youtu-mini",
}  # fmt: skip
RESULTS = {"eval": "results.json", "pairs": "pairs.jsonl"}
CODE = {
    "text": "Write a function that adds.",
    "test_list": ["assert add(1, 2) == 3"],
    "task_id": 1,
    "code": "def add(a, b):\n    return a + b",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


def test_all_recipes_are_found() -> None:
    expected = {
        "tiny": ("sft", "reward_helpful", "reward_safety", "rl_reasoning", "rl_preference", "eval", "chain", "pairs",
                 "dpo", "chain_dpo", "qlora"),
        "v2_lite": (
            "sft_lora", "sft_full", "reward_helpful", "reward_safety", "rl_reasoning", "rl_preference", "chain",
            "pairs_reasoning", "reward_reasoning", "dpo", "eval", "eval_gsm8k",
        ),
        "coder_v2_lite": ("sft_lora", "pairs_code", "reward_code", "rl_code", "eval_infilling"),
        "v2": ("sft_lora", "qlora"),
        "deepseek_moe": ("sft_lora",),
        "v3": ("sft_lora",),
        "glm4_moe_lite": ("sft_lora",),
        "youtu": ("sft_lora",),
    }  # fmt: skip
    assert {f"{room}/{name}.yaml" for room, names in expected.items() for name in names} | OTHERS <= NAMES


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_parses_and_says_what_it_needs(path: Path) -> None:
    for smoke in (False, True):
        loaded = load_recipe(path, smoke=smoke)
        stages = [stage for _, stage in plan_stages(loaded)] if loaded.recipe.stage == "chain" else [loaded]
        for stage in stages:
            check_settings(stage.recipe)
    header = path.read_text(encoding="utf-8").split("stage:")[0]
    for word in ("# Needs:", "# Costs:", "# Run:    "):
        assert word in header


# Recipes for objectives other than the paper's; tests/stages/test_objectives.py has their formulas.
OTHERS = {f"tiny/rl_{name}.yaml" for name in ("dr_grpo", "dapo", "gspo", "cispo", "gdpo")}


@pytest.mark.parametrize(
    "path",
    [path for path in ALONE if STAGES[path] == "rl" and name_of(path) not in OTHERS and path.stem != "dpo"],
    ids=name_of,
)
def test_rl_recipes_compute_the_papers_loss(path: Path) -> None:
    training = load_recipe(path).recipe.training
    assert (training["loss_type"], training["use_bias_correction_kl"]) == ("grpo", False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and a reward model made from it."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "base", "tiny", 0)
    for family, preset in FAMILY.items():
        make_model(folder / family, preset, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = ROOT / "recipes" / "tiny" / "reward_safety.yaml"
        data = "[{path: 'tiny:safety_train?n=8'}]"
        words = [f"model.path={folder / 'base'}", f"data={data}", f"output_dir={folder / 'reward'}"]
        assert main(["reward", str(recipe), "--smoke", *words]) == 0
    return {"causal_lm": folder / "base", "score": folder / "reward"} | {name: folder / name for name in FAMILY}


@pytest.mark.parametrize("path", ALONE, ids=name_of)
def test_a_recipe_runs_at_toy_size(
    path: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = read_mapping(path)
    runs_code = any(task.get("task", "").startswith("humaneval") for task in tree.get("tasks", []))
    if runs_code and (why := why_unavailable()):
        pytest.skip(why)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft.stage, "SAMPLE_TOKENS", 4)
    score = tree["stage"] == "eval" and tree["tasks"][0].get("metric") in SCORED
    model = models["score" if score else path.parent.name if path.parent.name in models else "causal_lm"]
    start = f"models={{a: {model}, b: {model}}}" if "models" in tree else f"model.path={model}"
    words: list[str] = [start, "output_dir=run"]
    if path.parent.name != "tiny":
        words.append("model.dtype=float32")
    if (tree.get("rewards") or [{}])[0].get("rule") == "code":  # a random model writes none
        (tmp_path / "code.jsonl").write_text(8 * f"{json.dumps(CODE)}\n")
        words += ["data=[{path: code.jsonl}]", "rewards.0.settings={allow_unsandboxed: true}"]
    elif tree.get("data"):
        kind = "reward" if tree.get("method") else tree["stage"]  # preferences
        words.append(f"data=[{{path: 'tiny:{TINY_DATA[kind]}?n=8'}}]")
    if tree.get("eval_data"):
        words.append("eval_data=[]")
    assert main([tree["stage"], str(path), "--smoke", *words]) == 0
    manifest = read_json(tmp_path / "run" / "manifest.json")
    files = manifest.get("start", {}).get("files", {})
    of_tasks = [file for part, file in files.items() if part.startswith("rows of tasks")]
    assert manifest["status"] == "finished" and [*manifest["data"], *of_tasks][0]["sha256"]
    result: Any = tmp_path / "run" / RESULTS.get(tree["stage"], "final/config.json")
    adapter = tmp_path / "run" / "final" / "adapter_config.json"
    assert result.exists() or (tree.get("lora") and adapter.exists())
    assert main([tree["stage"], str(path), "--smoke", *words]) == 0  # and again: finished, nothing to do
    assert read_json(tmp_path / "run" / "manifest.json") == manifest
