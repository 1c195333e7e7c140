"""Single-line infilling: rows with a hole, prompts with DeepSeek-Coder's tokens, figures by tests in the sandbox."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations import verify
from conversations.generation import generating
from conversations.rendering.fill_in_the_middle import fim_ids
from conversations.sandbox import box
from eval.harness.infilling import with_hole
from recipes.cli import main
from recipes.files import read_json
from recipes.runs.new_model import make_model

from ..helpers.stages import lines

WHY = box.why_unavailable()
isolated = pytest.mark.skipif(WHY is not None and os.environ.get("DSV2_TEST_SANDBOX") != "1", reason=str(WHY))


def row(name: str, solution: str, test: str) -> dict[str, str]:
    check = f"def check(candidate):\n    assert candidate({test}\n"
    return {
        "prompt": f'def {name}(x):\n    """Of x."""\n',
        "entry_point": name,
        "canonical_solution": solution,
        "test": check,
    }


ROWS = [
    row("twice", "    # doubles\n\n    return x + x\n", "2) == 4"),
    row("sign", "    if x < 0:\n        return -1\n    return 1", "-3) == -1"),
]
TASK = {"task": "humaneval_infilling_local", "path": "rows.jsonl"}


@given(st.lists(st.sampled_from(["    a = 1", "    # note", "", "\t", "    return a"]), max_size=6), st.booleans())
def test_the_parts_are_the_whole(body: list[str], ends: bool):
    """And the hole is a line of code, always the same."""
    solution = "\n".join([*body, "    return 0"]) + "\n" * ends
    one = with_hole({**ROWS[0], "canonical_solution": solution})
    assert one["prefix"] + one["middle"] + one["suffix"] == ROWS[0]["prompt"] + solution
    assert one["middle"].strip() and not one["middle"].strip().startswith("#") and "\n" not in one["middle"]
    assert one["suffix"][:1] in ("", "\n") and one["prefix"].endswith("\n")
    assert with_hole({**one, "task_id": "other"}) == {**one, "task_id": "other"}


def test_holes_are_in_any_line():
    solution = "".join(f"    x += {i}\n" for i in range(8))
    middles = {
        with_hole({**ROWS[0], "prompt": f"def f{i}(x):\n", "canonical_solution": solution})["middle"] for i in range(40)
    }
    assert len(middles) == 8


@isolated
@pytest.mark.parametrize(
    ("answer", "score"), [("    return x * 2", 1), ("    return x", 0), ("return x * 2", 0), ("", 0)]
)
def test_an_answer_stands_where_the_line_was(answer: str, score: int):
    """As it is: nothing is indented for it, or looked for in it."""
    assert verify("code", answer, reference=with_hole(ROWS[0])).score == score


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "m", "tiny", 0)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    recipe = {"stage": "eval", "model": {"path": "m"}, "tasks": [TASK], "output_dir": "run", "chat_template": False}
    (tmp_path / "e.yaml").write_text(json.dumps(recipe))
    return tmp_path


@isolated
def test_an_evaluation(home: Path, monkeypatch: pytest.MonkeyPatch):
    """One line right in other words, the other as it was and then another line, which does not count."""
    from deepseek_v2_modeling.loading import load_tokenizer, resolve_source

    tokenizer: Any = load_tokenizer(resolve_source(home / "m"))
    holes, prompts = [with_hole(one) for one in ROWS], []
    answers = {holes[0]["prefix"]: "    return 2 * x\n", holes[1]["prefix"]: f"{holes[1]['middle']}\nprint(1)\n"}

    def written(model: Any, asked: Any, finished: Any, **kwargs: Any) -> list[list[int]]:
        prompts.extend(asked)
        texts = [tokenizer.decode(ids) for ids in asked]
        ids = [tokenizer.encode(next(a for prefix, a in answers.items() if prefix in text)) for text in texts]
        for place, answer in enumerate(ids):
            finished(place, answer)
        return ids

    monkeypatch.setattr(generating, "generate_answers", written)
    assert main(["eval", "e.yaml"]) == 0
    results, marks = read_json(Path("run/results.json")), list(fim_ids(tokenizer).values())
    assert results["humaneval_infilling_local"] == 1
    assert results["humaneval_infilling_local_details"]["exact_match"]["value"] == 0.5
    for ids in prompts:
        assert [token for token in ids if token in marks] == marks and ids[-1] == marks[-1]
    samples = lines(Path("run/samples.jsonl"))
    assert [sample["completion"] for sample in samples] == ["    return 2 * x", holes[1]["middle"]]


@isolated
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROWS[0], "test": "def check("}, "rows.jsonl:2: the test 1 of a reference is not Python"),
        ({**ROWS[0], "canonical_solution": "    # none\n"}, "canonical_solution has no line of code"),
    ],
)
def test_rows_that_cannot_be_measured(
    home: Path, capsys: pytest.CaptureFixture[str], row: dict[str, str], message: str
):
    """Before anything is written for them."""
    (home / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (ROWS[1], row)))
    assert main(["check", "e.yaml"]) == 2
    assert message in capsys.readouterr().err


@isolated
def test_what_is_refused(home: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", "e.yaml", "chat_template=true"]) == 2
    assert "set chat_template: false" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = home / "m" / name
        file.write_text(file.read_text().replace("<｜fim▁hole｜>", "<hole>"))
    for command in ("check", "eval"):
        assert main([command, "e.yaml"]) == 2
        assert "the tokenizer has no <｜fim▁hole｜>" in capsys.readouterr().err
