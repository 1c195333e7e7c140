"""Model and adapter directories with one value of a file broken: `dsv2 check` and the readers give one line each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversations.answers.reward_stats import RewardStats
from conversations.errors import ToolkitError
from conversations.run_files import REWARD_STATS
from deepseek_v2_modeling.checkpoints.tensor_files import base_files, read_header
from deepseek_v2_modeling.errors import ModelError
from deepseek_v2_modeling.loading import resolve_source
from recipes.runs.foundation import check_files, read_foundation
from recipes.runs.new_model import make_model

JUNK: list[Any] = [None, True, -1, 0, 1.5, 10**12, float("nan"), "text", "", [], [1], {}, {"a": {"b": [1]}}]
PLACES = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model; `broken` is where it is copied to."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "whole", "tiny", 0)
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_broken_model_directory_is_refused_or_read(models: Path, data: st.DataObject) -> None:
    broken = models / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(models / "whole", broken, copy_function=shutil.copyfile)
    name = data.draw(st.sampled_from(PLACES))
    path = broken / name
    content = json.loads(path.read_text(encoding="utf-8"))
    key = data.draw(st.sampled_from(sorted(content)))
    content[key] = data.draw(st.sampled_from(JUNK))
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        found = read_foundation(resolve_source(broken), ask_hub=False)
        assert found.settings is not None
        check_files(found, found.settings, "causal_lm", str(broken))
    except (ModelError, ToolkitError) as error:
        assert "broken" in str(error) or name in str(error) or key in str(error)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_a_broken_header_is_refused(tmp_path: Path, key: str, junk: Any) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], key: junk}
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    try:
        read_header(tmp_path / "model.safetensors")
    except ModelError as error:
        assert "model.safetensors" in str(error)


@pytest.mark.parametrize("junk", [*JUNK, {"a": ["x"]}, {"a": "../x"}])
def test_a_broken_index_is_refused(tmp_path: Path, junk: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": junk}))
    try:
        base_files(tmp_path)
    except ModelError as error:
        assert "index.json" in str(error) or "is missing" in str(error)


@pytest.mark.parametrize("junk", [*JUNK, {"mean": "x", "std": 1, "n": 1}, {"mean": 0, "std": float("nan"), "n": 1}])
def test_broken_statistics_are_refused(tmp_path: Path, junk: Any) -> None:
    (tmp_path / REWARD_STATS).write_text(json.dumps(junk))
    with pytest.raises(ToolkitError, match=REWARD_STATS):
        RewardStats.read(tmp_path)
