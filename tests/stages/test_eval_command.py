"""dsv2 eval: a killed one resumes with the answers that it has written, to the figures and samples of an unbroken one;
what stands in results, samples and report; what is refused before anything is generated."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conversations.generation import generating
from deepseek_v2_modeling.presets import PRESETS
from recipes.cli import main
from recipes.files import read_json
from recipes.runs.new_model import make_model

from ..helpers.stages import lines

ROWS = 10
SAID = {"max_new_tokens": 3, "batch_size": 1}  # answers are written four at a time
RECIPE: dict[str, Any] = {
    "stage": "eval",
    "model": {"path": "m"},
    "data": [{"path": "rows.jsonl"}],
    "tasks": [
        {"name": "right", "metric": "exact_match", "temperatures": [0, 1], **SAID},
        {"name": "formed", "metric": "format", "limit": 7, **SAID},
        {"name": "nats", "metric": "loss"},
        {"name": "refused", "metric": "refusal", "temperatures": [0.5], **SAID},
    ],
    "output_dir": "run",
}
VOCABULARY = PRESETS["tiny"]["vocab_size"]
ANSWERS = 2 * ROWS + ROWS  # `formed` judges those of `right`


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    make_model(folder, "tiny", 0)
    return folder


@pytest.fixture(scope="module")
def unbroken(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        folder = prepared(base_model, tmp_path_factory.mktemp("unbroken"), patch)
        assert main(["eval", "e.yaml"]) == 0
    return folder / "run"


@pytest.fixture
def home(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(base_model, tmp_path, monkeypatch)


def prepared(base_model: Path, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    patch.chdir(folder)
    (folder / "m").mkdir()
    for file in base_model.iterdir():
        (folder / "m" / file.name).symlink_to(file)
    rows = [{"prompt": f"{n} + 1?", "completion": str(n + 1), "reference": str(n + 1)} for n in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "e.yaml").write_text(json.dumps(RECIPE))
    return folder


# Imports everything once, then runs each command that it reads in a copy of itself, and says how that ended.
KILLED = """
import json, os, signal, sys, traceback

import eval.stage
from recipes.cli import main


def run(folder, name, call, after):
    real, calls = getattr(eval.stage, name), [0]

    def deadly(*args):
        calls[0] += 1
        if calls[0] == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(eval.stage, name, deadly)
    os.chdir(folder)
    main(["eval", "e.yaml"])


for line in sys.stdin:
    pid = os.fork()
    if not pid:
        os.dup2(2, 1)
        try:
            run(*json.loads(line))
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killable() -> Iterator[subprocess.Popen[str]]:
    """A process without other threads, of which each killed evaluation is a copy: in a copy of this one, a lock that
    another thread held could be waited for forever."""
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        yield parent
        assert parent.stdin
        parent.stdin.close()  # ends it


def killed_at(parent: subprocess.Popen[str], name: str, call: int, after: bool = False) -> None:
    """An evaluation here that is killed as a function of eval.stage is called for the `call`-th time."""
    assert parent.stdin and parent.stdout
    print(json.dumps([str(Path.cwd()), name, call, after]), file=parent.stdin, flush=True)
    assert int(parent.stdout.readline()) == -signal.SIGKILL


def count_answers(patch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each call generates, from now on."""
    real, asked = generating.generate_answers, []

    def counting(model: Any, prompts: Any, **settings: Any) -> Any:
        asked.append(len(prompts))
        return real(model, prompts, **settings)

    patch.setattr(generating, "generate_answers", counting)
    return asked


def assert_the_same(unbroken: Path, run: Path) -> None:
    assert (run / "samples.jsonl").read_bytes() == (unbroken / "samples.jsonl").read_bytes()
    assert read_json(run / "results.json") == read_json(unbroken / "results.json")
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in unbroken.iterdir())


@pytest.mark.parametrize(
    ("name", "call", "after", "kept"),
    [
        ("append_lines", 1, False, 0),
        ("append_lines", 2, True, 8),
        ("append_lines", 5, False, 14),
        ("write_lines", 1, False, 20),
        ("write_lines", 1, True, 20),
        ("append_lines", 11, True, 28),
        ("write_lines", 4, False, 30),
    ],
)
def test_no_answer_that_was_written_is_generated_again(
    killable: subprocess.Popen[str],
    home: Path,
    unbroken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    call: int,
    after: bool,
    kept: int,
) -> None:
    killed_at(killable, name, call, after)
    written = lines(Path("run/samples.jsonl")) if kept else []
    with Path("run/samples.jsonl").open("a") as file:
        file.write('{"task": "right", "row": 3, "decod' if kept else "")  # a line that the kill cut
    asked = count_answers(monkeypatch)
    assert main(["eval", "e.yaml"]) == 0
    assert sum(asked) == ANSWERS - kept
    said = capsys.readouterr()
    assert ("run: resuming from samples.jsonl" in said.out) is (kept > 0)
    answers = sum("completion" in line for line in written)
    assert (f"{answers} answers of the interrupted evaluation are reused" in said.err) is (kept > 0)
    assert_the_same(unbroken, Path("run"))


def test_killed_again_and_again(killable: subprocess.Popen[str], home: Path, unbroken: Path) -> None:
    for name, call in (("append_lines", 2), ("append_lines", 3), ("write_lines", 1), ("write_lines", 2)):
        killed_at(killable, name, call)
    assert main(["eval", "e.yaml"]) == 0
    assert_the_same(unbroken, Path("run"))


def test_what_several_processes_had_written_is_kept(
    killable: subprocess.Popen[str], home: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a file of its own; the next start may have another number of processes."""
    killed_at(killable, "append_lines", 4, True)
    path = Path("run/samples.jsonl")
    said = path.read_text().splitlines(keepends=True)
    path.write_text("".join(said[::2]))
    Path("run/samples.1.jsonl").write_text("".join(said[1::2]))
    Path("run/samples.12.jsonl").write_text("".join(said[:3]))  # some stand twice after a kill in the gathering
    asked = count_answers(monkeypatch)
    assert main(["eval", "e.yaml"]) == 0
    assert sum(asked) == ANSWERS - len(said)
    assert_the_same(unbroken, Path("run"))


CHANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "recipe": (
        lambda: Path("e.yaml").write_text(json.dumps({**RECIPE, "seed": 1})),
        "output_dir run holds the run of another recipe: seed is 0 there and 1 here",
    ),
    "data": (
        lambda: Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace('"1 + 1?"', '"1 + 2?"')),
        "rows.jsonl has changed since the run began",
    ),
    "weights": (lambda: remake("model.safetensors"), "the base model (m) has changed since the run began"),
    "decoding": (
        lambda: rewrite("generation_config.json", {"repetition_penalty": 2.0}),
        "the generation config (m) has changed since the run began",
    ),
}


def remake(name: str) -> None:
    make_model(Path("other"), "tiny", 1)
    (Path("m") / name).unlink()
    (Path("other") / name).rename(Path("m") / name)


def rewrite(name: str, values: dict[str, Any]) -> None:
    (Path("m") / name).unlink()
    (Path("m") / name).write_text(json.dumps(values))


@pytest.mark.parametrize("change", CHANGES)
def test_answers_of_something_else_are_neither_used_nor_lost(
    killable: subprocess.Popen[str], home: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    killed_at(killable, "append_lines", 2, True)
    said = Path("run/samples.jsonl").read_bytes()
    make, words = CHANGES[change]
    make()
    assert main(["eval", "e.yaml"]) == 2
    assert words in capsys.readouterr().err
    assert Path("run/samples.jsonl").read_bytes() == said


def test_an_evaluation_whose_result_is_gone_is_judged_again(
    home: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["eval", "e.yaml"]) == 0
    Path("run/results.json").write_text("{")
    asked = count_answers(monkeypatch)
    assert main(["eval", "e.yaml"]) == 0
    assert sum(asked) == 0
    assert_the_same(unbroken, Path("run"))


# --- figures ----------------------------------------------------------------------------------------------------------


def test_cut_answers_and_nats_stand_everywhere(home: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the answers end by themselves: with tokens that generation_config.json names."""
    rewrite("generation_config.json", {"eos_token_id": list(range(4, VOCABULARY // 4))})
    assert main(["eval", "e.yaml"]) == 0
    said = [line for line in lines(Path("run/samples.jsonl")) if "completion" in line]
    assert all(isinstance(line["truncated"], bool) for line in said)
    results, (table, progress) = read_json(Path("run/results.json")), capsys.readouterr()
    for task in RECIPE["tasks"]:
        assert re.search(rf"^eval: {task['name']}, {task.get('limit', ROWS)} rows, [\d.]+ s$", progress, re.MULTILINE)
    for task, decoding, figure in (
        ("right", "greedy", "right_truncated"),
        ("right", "t1", "right_t1_truncated"),
        ("formed", "greedy", "formed_truncated"),
        ("refused", "t0.5", "refused_t0.5_truncated"),
    ):
        cut = [line["truncated"] for line in said if (line["task"], line["decoding"]) == (task, decoding)]
        assert results[figure] == sum(cut) / len(cut)
    assert 0 < results["right_truncated"] < 1
    assert f"{100 * results['right_truncated']:.1f} % cut" in table and "cut off at max_new_tokens" in table
    assert f"{results['nats_loss']:.3f} nats" in table and f"{100 * results['nats_loss']:.1f} %" not in table
    assert main(["report", "run", "--output", "page.html"]) == 0
    words = " ".join(re.sub(r"<[^>]*>", " ", Path("page.html").read_text()).split())
    assert f"{100 * results['right_truncated']:.1f} % cut" in words and "cut off at max_new_tokens" in words
    assert f"{results['nats_loss']:.3f} nats" in words and f"{100 * results['nats_loss']:.1f} %" not in words


def test_a_report_says_that_no_answer_was_cut(home: Path) -> None:
    """And nothing of it in each cell."""
    rewrite("generation_config.json", {"eos_token_id": list(range(4, VOCABULARY))})
    assert main(["eval", "e.yaml"]) == 0
    assert read_json(Path("run/results.json"))["right_truncated"] == 0
    assert main(["report", "run", "--output", "page.html"]) == 0
    page = Path("page.html").read_text()
    assert "No answer was cut off at max_new_tokens." in page and "% cut" not in page


def test_rows_are_called_by_their_place_in_the_recipe(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "e.yaml", "tasks.1.data=[{path: rows.jsonl}]"]) == 0
    named = re.findall(r"^(\S+): rows\.jsonl: prompt/completion", capsys.readouterr().out, re.MULTILINE)
    assert set(named) == {"data", "tasks.1.data"}


@pytest.mark.parametrize(
    ("rule", "reference"),
    [("number", "about four"), ("number", ""), ("math", ""), ("math", "\\frac{1}{")],
)
def test_an_unreadable_reference_is_refused_before_anything_is_generated(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rule: str, reference: str
) -> None:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    rows[6]["reference"] = reference
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = count_answers(monkeypatch)
    for command in ("eval", "check"):
        assert main([command, "e.yaml", f"tasks.0.rule={rule}"]) == 2
        assert "rows.jsonl:7: " in capsys.readouterr().err
    assert not asked and not Path("run").exists()


def test_a_conversation_beyond_the_positions_is_not_measured(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "1?", "chosen": "1", "rejected": "2"}, {"prompt": "1?", "chosen": "1", "rejected": "2" * 600}]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks = [{"prompt": "1?", "completion": "2"}, {"prompt": "1?" * 300, "completion": "2"}]
    Path("talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    config = json.loads(Path("m/config.json").read_text())
    files = {"loss": "talks.jsonl", "pair_accuracy": "pairs.jsonl", "reward": "pairs.jsonl"}
    for metric, file in files.items():
        task = {"name": metric, "metric": metric, "data": [{"path": file}]}
        kind = "DeepseekV2ForCausalLM" if metric == "loss" else "DeepseekV2ForSequenceClassification"
        Path("m/config.json").unlink()
        Path("m/config.json").write_text(json.dumps({**config, "architectures": [kind]}))
        for command in ("check", "eval"):
            assert main([command, "e.yaml", f"tasks={json.dumps([task])}"]) == 2
            error = capsys.readouterr().err
            assert re.search(rf"{file}:2: its conversation of \d+ tokens is more than the 512 positions", error), error
        assert main(["check", "e.yaml", f"tasks={json.dumps([task | {'limit': 1}])}"]) == 0
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("task", "fits"),
    [
        ({"name": "right_t1", "metric": "exact_match"}, False),
        ({"name": "right_n", "metric": "exact_match"}, False),
        ({"name": "n", "metric": "format"}, False),
        ({"name": "right_truncated", "metric": "format"}, False),
        ({"name": "no_loss", "metric": "refusal"}, False),
        ({"name": "test_loss", "metric": "loss"}, True),
        ({"name": "t", "metric": "format"}, True),
        ({"name": "part1", "metric": "format"}, True),
        ({"name": "lossless", "metric": "format"}, True),
    ],
)
def test_no_task_is_called_like_another_figure(
    home: Path, capsys: pytest.CaptureFixture[str], task: dict[str, Any], fits: bool
) -> None:
    code = main(["check", "e.yaml", f"tasks={json.dumps([task])}"])
    assert code == (0 if fits else 2), capsys.readouterr().err
