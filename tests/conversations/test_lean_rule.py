"""The rule `lean`, with a stand-in for Lean 4 (tests/helpers/lean_stand_in.py) in the real sandbox."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from conversations import verify
from conversations.answers.lean import OWN_AXIOMS, lean_reference, proof_of, read_messages
from conversations.answers.rules import check_machine, check_rule
from conversations.answers.verdict import Verdict
from conversations.errors import ToolkitError
from conversations.sandbox import box
from recipes.cli import main

from ..helpers.lean_stand_in import install
from ..helpers.stages import lines

WHY = box.why_unavailable()
isolated = pytest.mark.skipif(WHY is not None and os.environ.get("DSV2_TEST_SANDBOX") != "1", reason=str(WHY))
SUM = "import Mathlib\n\ntheorem two : 1 + 1 = 2 := by"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lean4")
    return {"command": [str(install(folder))], "folders": [str(folder)], "timeout": 10, "memory": 512}


@isolated
@pytest.mark.parametrize(
    ("answer", "score", "reason"),
    [
        ("\n  norm_num", 1, "Lean accepts the proof"),
        ("norm_num", 1, ""),
        ("Here:\n```lean4\ntheorem two :\n  1 + 1 = 2 := by\n  rfl\n```\nDone.", 1, ""),
        ("  norm_num\n```\nIt holds.", 1, ""),
        ("  norm_num -- not by axiom\n", 1, ""),
        ("  trivial", 0, "unsolved goals ⊢ 1 + 1 = 2"),
        ("  sorry", 0, "uses sorry"),
        ("  norm_num\n\naxiom bad : False", 0, "uses axiom"),
        ('  norm_num "--" (by native_decide)', 0, "uses native_decide"),
        ("  cheat", 0, "assumes Lean.ofReduceBool"),
        ("  stop_here", 0, "did not reach the end"),
        ("```lean4\ntheorem two : True := by\n  trivial\n```", 0, "another theorem"),
        ("theorem other : True := by trivial", 0, "unsolved goals"),
        ("", 0, "no proof"),
        ("  spawn", 0, "not permitted"),
    ],
)  # fmt: skip
def test_verdicts(answer: str, score: int, reason: str, settings: dict[str, Any]):
    verdict = verify("lean", answer, reference=SUM, **settings)
    assert verdict.score == score and reason in verdict.reason


@isolated
def test_what_the_checker_sees(settings: dict[str, Any]):
    """No folder but its own, no environment but LEAN_PATH."""
    folder = Path(settings["folders"][0])
    (folder.parent / "beside").touch()
    verdict = verify("lean", "  spawn", reference=SUM, **settings, lean_path=[str(folder)])
    assert f"sees ['{folder.name}'] ['LEAN_PATH']" in verdict.reason


@isolated
def test_time_and_a_header(settings: dict[str, Any]):
    late = verify("lean", "  loop", reference=SUM, **{**settings, "timeout": 1})
    assert late.score == 0 and "not done after 1 s" in late.reason
    header = "theorem helper : 2 = 2 := by\n  rfl\n\n"
    assert verify("lean", "rfl", reference="theorem a : 2 = 2 := by sorry", header=header, **settings).score == 1


def test_a_statement_is_open():
    theorem = lean_reference("open Real\n\nlemma l.x (a : ℕ) : a = a :=\n  by\n  sorry\n")
    assert theorem == ("open Real\n\n", "lemma l.x (a : ℕ) : a = a :=", "l.x", True)
    for wrong in ("", "theorem x : True := by trivial", "def f := by", "1 + 1 = 2"):
        with pytest.raises(ToolkitError, match="must be a Lean theorem that ends in := or := by"):
            lean_reference(wrong)


@pytest.mark.parametrize(
    ("answer", "proof"),
    [
        ("intro x\nsimp", " by\n  intro x\n  simp"),
        ("intro x\n  simp", " by\n  intro x\n  simp"),
        ("  intro x\n  simp", " by\n  intro x\n  simp"),
        ("theorem t : P := fun x => x", " fun x => x"),
        ("```lean\nsimp\n", " by\n  simp\n"),
    ],
)
def test_what_stands_behind_the_statement(answer: str, proof: str):
    found = proof_of(answer, lean_reference("theorem t : P := by"))
    assert isinstance(found, str) and found.rstrip() == proof.rstrip()


def test_messages():
    """Those of Lean 4.9: its own three axioms are allowed; a line that is no message is passed over."""

    def line(severity: str, text: str, number: int = 9) -> str:
        return json.dumps({"severity": severity, "pos": {"line": number, "column": 0}, "data": text})

    own = f"'t' depends on axioms: [{', '.join(sorted(OWN_AXIOMS))}]"
    assert read_messages(f"note\n{line('information', own)}", None, 9).score == 1
    assert read_messages(line("information", own, 8), None, 9).score == 0
    assert read_messages(line("information", own), "it ended with exit code 1", 9).score == 0
    unproved = f"{line('warning', 'declaration uses `sorry`', 3)}\n{line('information', own)}"
    assert read_messages(unproved, None, 9).reason == "the proof uses sorry"
    assert read_messages("", "it ended with exit code 127", 9) == Verdict(
        0.0, "Lean did not finish: it ended with exit code 127"
    )


@isolated
def test_what_is_refused(settings: dict[str, Any], tmp_path: Path):
    check_machine("lean", settings)
    broken = install(tmp_path / "broken")
    (tmp_path / "broken" / "lean.py").write_text("import sys\nsys.exit(3)\n")
    for changes, message in (
        ({"command": ["lean"]}, "lean is not the absolute path of a program"),
        ({"command": [str(tmp_path / "lean")]}, "is not the absolute path of a program on this machine"),
        ({"command": []}, "command must be a list of words"),
        ({"folders": [str(tmp_path / "absent")]}, "is not the absolute path of a folder"),
        ({"folders": [str(tmp_path)]}, "is in none of the folders"),
        ({"lean_path": [str(tmp_path)]}, f"{tmp_path} is in none of the folders"),
        ({"command": [str(broken)], "folders": [str(tmp_path)]}, "does not accept a trivial proof here: .*exit code 3"),
    ):
        with pytest.raises(ToolkitError, match=message):
            check_machine("lean", {**settings, **changes})


def test_a_recipe_whose_checker_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """Refused by check and by the run, before a model is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Prove it.", "reference": SUM}) + "\n")
    task = {"name": "proofs", "metric": "exact_match", "rule": "lean", "data": [{"path": "rows.jsonl"}]}
    task |= {"settings": {"command": [str(tmp_path / "lean")], "folders": [str(tmp_path)]}}
    recipe = {"stage": "eval", "model": {"path": "m", "preset": "tiny"}, "tasks": [task], "output_dir": "run"}
    (tmp_path / "e.yaml").write_text(json.dumps(recipe))
    for command in ("check", "eval"):
        assert main([command, "e.yaml"]) == 2
        assert "lean is not the absolute path of a program on this machine" in capsys.readouterr().err


@isolated
def test_an_evaluation_by_proofs(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a random model, which proves nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Prove it.", "reference": SUM}) + "\n")
    task = {"name": "proofs", "metric": "exact_match", "rule": "lean", "settings": settings, "max_new_tokens": 4}
    model = {"path": "m", "preset": "tiny"}
    recipe = {"stage": "eval", "model": model, "data": [{"path": "rows.jsonl"}], "tasks": [task], "output_dir": "run"}
    (tmp_path / "e.yaml").write_text(json.dumps(recipe))
    assert main(["eval", "e.yaml"]) == 0
    [sample] = lines(Path("run/samples.jsonl"))
    assert sample["value"] == 0 and ("Lean says" in sample["reason"] or "proof" in sample["reason"])


def test_settings():
    with pytest.raises(ToolkitError, match="needs the settings command, folders"):
        check_rule("lean", {})
    with pytest.raises(ToolkitError, match="needs the settings command, folders"):
        verify("lean", "simp", reference=SUM)
    with pytest.raises(ToolkitError, match="header of the rule lean must be a text"):
        check_rule("lean", {"command": ["/x"], "folders": ["/"], "header": 1})
