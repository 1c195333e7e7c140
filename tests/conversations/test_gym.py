"""Tasks of reasoning-gym: rows from their generators, judged by their own scores. Without the package, a stand-in with
its interface takes its place."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conversations import verify
from conversations.answers import gym
from conversations.errors import ToolkitError
from conversations.sections import DataSource
from recipes.data.sources import read_sources

STAND_IN = """
from dataclasses import dataclass
from random import Random


@dataclass
class Config:
    min_number: int = 1
    seed: int = 0
    size: int = 500

    def validate(self):
        assert self.min_number > 0, "min_number must be positive"


class Sums:
    def __init__(self, config):
        config.validate()
        self.config = config

    def __len__(self):
        return self.config.size

    def __getitem__(self, index):
        a, b = (Random(self.config.seed * 10_000 + index).randint(self.config.min_number, 99) for _ in range(2))
        return {"question": f"{a} + {b + 1} = ?\\n", "answer": str(a + b + 1), "metadata": {"pair": (a, b)}}

    def score_answer(self, answer, entry):
        assert isinstance(entry["metadata"]["pair"], tuple)
        return 1.0 if int(answer) == int(entry["answer"]) else 0.01


DATASETS = {"chain_sum": (Sums, Config)}


def create_dataset(name, **settings):
    return Sums(Config(**settings))
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("recipes.data.sources.CACHE", tmp_path / "cache")
    if importlib.util.find_spec("reasoning_gym") is None:
        package = tmp_path / "site" / "reasoning_gym"
        package.mkdir(parents=True)
        (package / "factory.py").write_text(STAND_IN)
        (package / "__init__.py").write_text("from reasoning_gym.factory import create_dataset")
        (info := package.parent / "reasoning_gym-0.1.25.dist-info").mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reasoning-gym\nVersion: 0.1.25\n")
        monkeypatch.syspath_prepend(str(package.parent))
    before = set(sys.modules)
    gym._data.cache_clear(), gym._entry.cache_clear()
    yield
    gym._data.cache_clear(), gym._entry.cache_clear()
    for name in {name for name in sys.modules if name.startswith("reasoning_gym")} - before:
        del sys.modules[name]


FORMS = ("{}", "I add: <answer> {} </answer>", "#### {}", r"So \boxed{{{}}}.", "<answer>1</answer> <answer>{}</answer>")


def source(path: str, seed: int = 3) -> list[dict]:
    return list(read_sources([DataSource(path=path)], seed).rows)


@pytest.mark.usefixtures("installed")
def test_questions_are_rows_and_right_answers_score():
    rows = source("reasoning_gym:chain_sum?n=5&seed=7")
    assert len(rows) == 5 and rows == source("reasoning_gym:chain_sum?n=5", seed=7) != source(
        "reasoning_gym:chain_sum?n=5"
    )
    for row in rows:
        _, entry = gym.gym_reference(row["reference"])
        assert entry["question"].strip() == row["messages"][0]["content"]
        right, wrong = entry["answer"], str(int(entry["answer"]) + 1)
        for form in FORMS:
            assert verify("reasoning_gym", form.format(right), reference=row["reference"]).score == 1
            assert verify("reasoning_gym", form.format(wrong), reference=row["reference"]).score < 0.5
        verdict = verify("reasoning_gym", "no idea", reference=json.loads(row["reference"]))
        assert verdict.score < 0.5 and verdict.reason


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("reasoning_gym:chain_sums", "has no task 'chain_sums' .did you mean 'chain_sum'"),
        ("reasoning_gym:chain_sum?numbers=3", "data.0.path: reasoning-gym's task chain_sum: .*numbers"),
        ("reasoning_gym:chain_sum?n=x", "data.0.path: .*n, the number of questions, must be"),
        ("reasoning_gym:", "is not reasoning_gym:TASK"),
    ],
)
def test_what_a_source_may_not_name(path: str, why: str):
    with pytest.raises(ToolkitError, match=why):
        source(path)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("42", "must be"),
        ({"task": "chain_sum"}, "must be"),
        ({"task": "chain_sum", "index": 5, "settings": {"size": 5}}, "names question 5 of chain_sum, which has 5"),
        ({"task": "chain_sum", "index": True, "settings": {"size": 5}}, "names question True"),
        ({"task": "nothing_x", "index": 0, "settings": {}}, "has no task"),
    ],
)
def test_references_that_name_no_question(reference: object, why: str):
    with pytest.raises(ToolkitError, match=why):
        verify("reasoning_gym", "1", reference=reference)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    gym._data.cache_clear()
    with pytest.raises(ToolkitError, match=r"data.0.path: .*pip install"):
        source("reasoning_gym:chain_sum")
    with pytest.raises(ToolkitError, match="pip install"):
        verify("reasoning_gym", "1", reference={"task": "chain_sum", "index": 0, "settings": {}})
