"""`dsv2 eval` with tasks of lm-eval: task files, what is refused, several answers, contamination, kills and resumes."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from conversations.answers.repeated import majority_score, pass_at_k
from conversations.errors import ToolkitError
from conversations.generation.generating import Generated
from conversations.sandbox.box import why_unavailable
from eval.benchmark import BenchmarkTask
from eval.harness.contamination import contaminated
from eval.harness.loading import build, own_tasks
from eval.harness.scoring import by_chrf, by_json, by_number, by_rouge, by_solution, of_instructions
from recipes.cli import main
from recipes.files import read_json
from recipes.runs.new_model import make_model

from ..helpers.stages import lines

ROOT = Path(__file__).parents[2]
SUMS = [{"question": f"What is {i} and 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(6)]
CHOICES = [
    {"question": f"{i}?", "choices": list("wxyz"), "answer": "ABCD"[i % 4], "subject": f"s{i % 2}"} for i in range(6)
]
TASKS: list[dict[str, Any]] = [
    {"task": "gsm8k_local", "path": "sums.jsonl", "fewshot_path": "sums.jsonl", "num_fewshot": 1, "max_new_tokens": 6},
    {"task": "gsm8k_local", "name": "several", "path": "sums.jsonl", "num_fewshot": 0, "max_new_tokens": 4,
     "temperature": 1, "num_answers": 3, "pass_at": [2], "against": ["train.jsonl"]},
    {"task": "mmlu_local", "path": "choices.jsonl", "fewshot_path": "choices.jsonl", "num_fewshot": 1},
    {"task": "perplexity_local", "path": "texts.jsonl"},
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_model(folder / "m", "tiny", 0)
    train = [{"messages": [{"role": "user", "content": f"so: {SUMS[2]['question']} I ask"}]}]
    texts = [{"text": "One two three four."}, {"text": "Five six."}]
    for name, rows in {"sums": SUMS, "choices": CHOICES, "texts": texts, "train": train}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"stage": "eval", "model": {"path": "m"}, "tasks": TASKS, "output_dir": "run"}
    (folder / "e.yaml").write_text(json.dumps(recipe))
    return folder


def test_figures_and_samples(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(home)
    assert main(["check", "e.yaml"]) == 0
    said = capsys.readouterr().out
    assert "gsm8k_local: 6 rows, without a chat template, 1-shot" in said and "mmlu_local: 6 rows" in said
    assert main(["eval", "e.yaml"]) == 0
    said = capsys.readouterr().out
    assert "1 in training data" in said and "Several contaminated" not in said
    results = read_json(Path("run/results.json"))
    Draft202012Validator(read_json(ROOT / "docs" / "results.schema.json")).validate(results)
    assert results["n"] == results["several_n"] == results["mmlu_local_n"] == 6
    assert set(results["several_details"]) == {"avg@3", "pass@2", "cons@3", "not_in_training_data"}
    assert results["several_contaminated"] == 1 and results["several_details"]["not_in_training_data"]["n"] == 5
    assert set(results["mmlu_local_details"]) == {"mmlu_local_s0", "mmlu_local_s1"}
    assert results["several_t1"] == pytest.approx(results["several_details"]["avg@3"]["value"])
    samples = lines(Path("run/samples.jsonl"))
    first = next(line for line in samples if line["task"] == "gsm8k_local")
    assert first["prompt"].count("Question: ") == 2 and first["prompt"].endswith(f"{SUMS[0]['question']}\nAnswer:")
    assert {"completion", "truncated", "tokens", "read", "value", "reason"} <= set(first)
    several = [line for line in samples if line["task"] == "several"]
    assert [(line["row"], line["answer"]) for line in several] == [(row, k) for row in range(6) for k in range(3)]
    assert {line["row"] for line in several if line["contaminated"]} == {2}
    assert len({line["completion"] for line in several}) > 9
    choice = next(line for line in samples if line["task"] == "mmlu_local")
    assert len(choice["logps"]) == 4 and choice["read"] == choice["logps"].index(max(choice["logps"]))
    assert not list(Path("run").glob("samples_raw*"))


KILLED = """
import os, signal
import eval.harness.responses as responses
from recipes.cli import main

real, calls = responses.append_lines, 0


def deadly(*args):
    global calls
    calls += 1
    if calls == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)


responses.append_lines = deadly
main(["eval", "e.yaml", "output_dir=killed"])
"""


def test_a_killed_evaluation_asks_nothing_twice(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conversations.generation import generating

    monkeypatch.chdir(home)
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    asked: list[int] = []
    real = generating.generate_answers
    monkeypatch.setattr(
        generating,
        "generate_answers",
        lambda model, prompts, **kw: asked.append(len(prompts)) or real(model, prompts, **kw),
    )
    assert main(["eval", "e.yaml", "output_dir=killed"]) == 0
    assert sum(asked) == 6 + 18 - 8  # greedy and sampled answers, less those that were written
    if Path("run").exists():
        assert read_json(Path("killed/results.json")) == read_json(Path("run/results.json"))


def test_a_task_that_fails_says_so_and_the_others_go_on(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.chdir(home)
    real = ConfigurableTask.process_results

    def broken(self: Any, doc: Any, results: Any) -> Any:
        if self.config.task == "gsm8k_local":
            raise ZeroDivisionError("in the task")
        return real(self, doc, results)

    words = ["output_dir=failed", f"tasks={json.dumps([TASKS[0], TASKS[3]])}"]
    with monkeypatch.context() as patch:
        patch.setattr(ConfigurableTask, "process_results", broken)
        assert main(["eval", "e.yaml", *words]) == 2
    said = capsys.readouterr()
    assert "gsm8k_local failed: ZeroDivisionError: in the task" in said.err and "Perplexity local" in said.out
    results = read_json(Path("failed/results.json"))
    assert results["gsm8k_local_error"] and results["perplexity_local"] > 0
    assert main(["eval", "e.yaml", *words]) == 0
    assert "gsm8k_local" in read_json(Path("failed/results.json"))


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        ({"task": "gsm8k_locale", "path": "sums.jsonl"}, "did you mean 'gsm8k_local'"),
        ({"task": "gsm8k_local"}, "reads local rows: give it path, a file whose rows have question, answer"),
        ({"task": "gsm8k_local", "path": "absent.jsonl"}, "absent.jsonl"),
        ({"task": "gsm8k_local", "path": "choices.jsonl", "num_fewshot": 9}, "and the task has 8 examples"),
        ({"task": "perplexity_local", "path": "sums.jsonl"}, "sums.jsonl:1: has no 'text' (it has question, answer)"),
        ({"task": "mmlu_local", "path": "choices.jsonl", "num_fewshot": 2}, "num_fewshot needs examples"),
        (
            {"task": "mmlu_local", "path": "choices.jsonl", "fewshot_path": "choices.jsonl"},
            "3 examples of the subject 's0'",
        ),
        ({"task": "gsm8k_local", "path": "sums.jsonl"}, "more than the 512 positions"),
        ({"task": "gsm8k_local", "path": "sums.jsonl", "num_answers": 2}, "num_answers needs a temperature above 0"),
        ({"task": "gsm8k_local", "pth": "sums.jsonl"}, 'did you mean "tasks.0.path"'),
        ({"metric": "loss", "name": "x", "rul": "math"}, 'did you mean "tasks.0.rule"'),
        ({"task": "gsm8k", "path": "sums.jsonl"}, "gsm8k_local reads such rows from a file"),
    ],
    ids=str,
)
def test_what_check_and_the_run_refuse(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: dict[str, Any],
    fault: str,
) -> None:
    monkeypatch.chdir(home)
    assert main(["check", "e.yaml", "output_dir=other", f"tasks={json.dumps([task])}"]) == 2
    assert fault in capsys.readouterr().err


EXAMPLES = ROOT / "eval" / "tasks" / "rows"


@pytest.mark.parametrize("name", sorted(own_tasks()))
def test_every_task_file_reads_the_example_rows_of_its_form(name: str) -> None:
    from eval.benchmark import BenchmarkTask
    from eval.harness.loading import build

    if name.startswith(("humaneval", "mbpp")) and WHY is not None:
        pytest.skip(WHY)
    path = str(EXAMPLES / f"{name}.jsonl")
    shots: dict[str, Any] = {} if "infilling" in name else {"fewshot_path": path, "num_fewshot": 1}
    built = build(BenchmarkTask(task=name, path=path, **shots), chat=False)
    for task in built.tasks.values():
        task.build_all_requests()
        assert task.instances


CODE_TASKS = ("humaneval_local", "mbpp_local")
WHY = why_unavailable()


@pytest.mark.skipif(WHY is not None, reason=str(WHY))
@pytest.mark.parametrize("name", CODE_TASKS)
@pytest.mark.parametrize("chat", [False, True])
def test_programs_are_run_on_their_tests(
    home: Path, name: str, chat: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four answers to each problem two pass: the known solution, bare or in a fence, but no empty body."""
    monkeypatch.chdir(home)
    rows = lines(EXAMPLES / f"{name}.jsonl")
    solutions = [row.get("code") or row["prompt"] + row["canonical_solution"] for row in rows]
    bare = [row.get("code") or row["canonical_solution"] for row in rows]
    empty = re.compile(r"^    .*\Z", re.MULTILINE | re.DOTALL)

    def answers(model: Any, tokenizer: Any, prompts: Any, seeds: Any, decoding: Any, size: int, on_answer: Any) -> None:
        assert len(prompts) == 4 * len(rows)
        for place in range(len(prompts)):
            row, answer = divmod(place, 4)
            fenced = f"Sure.\n```python\n{solutions[row]}\n```\nDone."
            said = [fenced if chat else bare[row], fenced, empty.sub("    pass\n", solutions[row]), "I cannot."][answer]
            on_answer(place, Generated(said, True, 9))

    monkeypatch.setattr("eval.harness.crew.sample_answers", answers)
    task = {
        "task": name,
        "path": str(EXAMPLES / f"{name}.jsonl"),
        "temperature": 0.8,
        "num_answers": 4,
        "max_new_tokens": 99,
    }
    run = f"{name}_{chat}"
    words = [f"tasks={json.dumps([task])}", f"output_dir={run}", f"chat_template={str(chat).lower()}"]
    assert main(["eval", "e.yaml", *words]) == 0
    results = read_json(Path(f"{run}/results.json"))
    details = {key: figure["value"] for key, figure in results[f"{name}_details"].items()}
    del details["cons@4"]  # no two answers need be the same text
    assert details == {"avg@4": 0.5, "pass@1": 0.5, "pass@2": pytest.approx(5 / 6), "pass@4": 1}
    assert results[f"{name}_t0.8"] == 0.5
    samples = lines(Path(f"{run}/samples.jsonl"))
    assert [line["value"] for line in samples] == [1, 1, 0, 0] * len(rows)
    assert samples[3]["read"] is None and samples[3]["reason"] == "no Python code in the answer"


def test_scores_of_the_task_files() -> None:
    read = [judged.read for judged in by_number([["so 4", "none"]], [{"answer": "#### 4"}])[0]]
    assert read == ["4", None]
    [[right, wrong]] = by_solution([["\\boxed{\\frac{1}{2}}", "x"]], [{"solution": "It is $\\boxed{0.5}$."}])
    assert (right.verdict.score, wrong.verdict.score) == (1, 0) and right.read == "\\frac{1}{2}"
    answers = [{"answers": ['{"a": 1, "b": "x"}']}]
    assert [j.verdict.score for j in by_json([['so {"b": "x", "a": 1}.', '{"a": 2}', "{"]], answers)[0]] == [1, 0, 0]
    assert by_json([["{"]], answers)[0][0].read is None
    law = [{"answers": ["驳回原告的诉讼请求"]}]
    assert [j.verdict.score for j in by_rouge([["驳回原告的诉讼请求", "无关"]], law)[0]] == [1, 0]
    assert by_chrf([["all the same"]], [{"answers": ["all the same"]}])[0][0].verdict.score == pytest.approx(1)
    doc = {"instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"], "kwargs": [{}, {}]}
    from eval.harness.scoring import by_instructions

    judged = by_instructions([["Here:\nall low"]], [{"prompt": "", **doc}])
    figures = of_instructions(doc, judged)
    assert figures["prompt_level_strict_acc"] == 0 and figures["prompt_level_loose_acc"] == 1
    assert figures["inst_level_strict_acc"] == (1, 2) and figures["inst_level_loose_acc"] == (2, 2)


def test_majorities() -> None:
    assert majority_score(["4", "4", "5", None], [1, 1, 0, 0]) == 1
    assert majority_score(["4", "5"], [1, 0]) == 0.5 and majority_score([None, None], [0, 0]) == 0
    assert majority_score([None, None, "7"], [0, 0, 1]) == 1 and pass_at_k(4, 2, 2) == pytest.approx(5 / 6)


def test_contamination_is_found_in_any_column_and_in_chinese(tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    chinese = "从前有一个很老很老的人住在山上"
    file = tmp_path / "train.jsonl"
    rows = [{"messages": [{"content": f"zero {long.upper()}, fourteen"}]}, {"text": f"故事：{chinese}。"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"Well: {long}?", long.replace("seven", "7"), chinese[:14] + "了", "short one", "zero one two", ""]
    assert contaminated([{"question": text, "answer": "one"} for text in texts], [str(file)]) == {0, 2, 4, 5}
    assert contaminated([{"answer": "1", "choices": [long, "x"]}, {"n": 1}], [str(file)]) == {0}


@pytest.mark.parametrize("answer", ["E", "(C)", "", "-1", 4, "4", 7])
def test_an_answer_that_is_no_choice_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str | int
) -> None:
    monkeypatch.chdir(home)
    right = 1 if isinstance(answer, int) else "B"
    rows = [{"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": one} for one in (right, answer)]
    Path("no_choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["check", "e.yaml", "output_dir=other", "tasks=[{task: mmlu_local, path: no_choice.jsonl}]"]) == 2
    said = capsys.readouterr().err
    assert "no_choice.jsonl:2: its answer" in said and "A, B, C, D, and no number from 0 to 3" in said


def test_an_answer_is_a_number_or_a_letter(home: Path) -> None:
    """Of a CSV, numbers are texts."""
    forms = ["1", "B", " b ", "1"]
    rows = [{"question": f"{form}?", "choices": ["w", "x", "y", "z"], "answer": form} for form in forms]
    (home / "forms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = build(BenchmarkTask(task="mmlu_local", name="m", path=str(home / "forms.jsonl")), False).tasks.values()
    said = [(-2.0, False), (-1.0, False), (-2.0, False), (-2.0, False)]  # B is likeliest
    assert [task.process_results(doc, said)["acc"] for doc in task.eval_docs] == [1.0] * len(forms)


@pytest.mark.parametrize(
    ("task", "row", "named"),
    [
        (
            "mmlu_local",
            {"question": "a?", "choices": '["w", "x", "y", "z"]', "answer": 1},
            "'choices' must be a list of 4",
        ),
        ("mmlu_local", {"question": "a?", "choices": list("vwxyz"), "answer": 1}, "'choices' must be a list of 4"),
        ("esft_law", {"prompt": "a", "answers": "text"}, "'answers' must be a list"),
    ],
)
def test_a_text_is_no_list(home: Path, task: str, row: dict[str, Any], named: str) -> None:
    (home / "text.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ToolkitError, match=f"text.jsonl:1: {named}"):
        build(BenchmarkTask(task=task, name="m", path=str(home / "text.jsonl")), False)
