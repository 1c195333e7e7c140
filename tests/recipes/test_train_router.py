"""`train_router` of RL recipes: routers stay as they are unless the recipe says otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from recipes.cli import main
from recipes.files import read_json

from ..helpers.broken_recipes import ROLLOUT
from ..helpers.stages import byte_tokenizer, chat_model, conversations


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of full fine-tuning; the balance loss moves every router that may move."""
    monkeypatch.chdir(tmp_path)
    chat_model().save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    Path("chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in conversations(4)))
    written = {
        "stage": "rl", "model": {"path": "base", "config": {"aux_loss_alpha": 1.0}}, "lora": None,
        "data": [{"path": "chat.jsonl"}], "rewards": [{"rule": "format"}],
        "training": {**ROLLOUT, "learning_rate": 0.01}, "output_dir": "out",
    }  # fmt: skip
    Path("rl.yaml").write_text(json.dumps(written))
    return Path("rl.yaml")


def moved(run: str) -> set[str]:
    """The tensors that a run has changed."""
    before, after = load_file("base/model.safetensors"), load_file(f"{run}/final/model.safetensors")
    return {name for name, value in after.items() if not value.equal(before[name])}


def is_router(name: str) -> bool:
    return name.endswith("mlp.gate.weight")


def test_routers_are_trained_only_on_request(recipe: Path) -> None:
    assert main(["rl", str(recipe)]) == 0
    assert main(["rl", str(recipe), "train_router=true", "output_dir=too"]) == 0
    assert moved("out") and not any(map(is_router, moved("out")))
    routers = {name for name in moved("too") if is_router(name)}
    assert routers and moved("too") - routers >= moved("out")
    told = [read_json(Path(run, "manifest.json"))["trained"][0] for run in ("out", "too")]
    assert [row["projection"] for row in told] == ["all weights except the routers'", "all weights"]
    assert told[1]["parameters"] - told[0]["parameters"] == sum(
        load_file("base/model.safetensors")[name].numel() for name in routers
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lora={targets: [attention, router], r: 2}"], "which RL trains only with train_router: true"),
        (["lora={targets: [attention], r: 2}", "train_router=true"], "needs router among lora.targets"),
        (["experts_file=absent.json", "train_router=true"], "cannot be combined with experts_file"),
    ],
)
def test_a_router_in_one_place_alone_is_refused(recipe: Path, words: list[str], told: str, capsys: Any) -> None:
    assert main(["check", str(recipe), *words]) == 2
    assert told in capsys.readouterr().err


def test_an_adapter_on_the_router_trains_where_the_recipe_says_so(recipe: Path) -> None:
    assert main(["rl", str(recipe), "lora={targets: [attention, router], r: 2}", "train_router=true"]) == 0
    assert any("gate" in name for name in load_file("out/final/adapter_model.safetensors"))
