"""Open-ended tasks of `dsv2 eval`: MT-Bench's questions, a judge or a reward model, a baseline, kills and resumes."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from conversations.rewards import endpoint as endpoints
from deepseek_v2_modeling.inference import score_heads
from eval.open_ended.conversing import temperature_of
from eval.open_ended.entry import OpenTask
from eval.open_ended.questions import Question, read_questions
from eval.open_ended.win_rates import length_controlled
from recipes.cli import main
from recipes.files import read_json

from ..helpers.judge_server import Server, block, serving
from ..helpers.stages import assistant, byte_tokenizer, chat_model, lines, score_model, user

ROOT = Path(__file__).parents[2]
MT_BENCH = ROOT / "tests" / "data" / "mt_bench_question.jsonl"  # 82, 101, 1101 (Chinese), two turns each
REFERENCES = ROOT / "tests" / "data" / "mt_bench_reference.jsonl"  # of 101
POSITIONS = {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for name, model in {"m": chat_model(), "reward": score_model(3)}.items():
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "rubric.md").write_text("Be right.")
    return folder


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoints, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(home)
    with serving() as started:
        yield started


def write(run: str, server: Server | None = None, **task: Any) -> str:
    """A recipe of one task, and its file."""
    judge = server and {"base_url": server.url, "model": "m", "rubric": "rubric.md", "concurrency": 1}
    entry = {"task": "open_ended", "name": "mt_bench", "path": str(MT_BENCH), "max_new_tokens": 12, "temperature": 0}
    entry |= {"reward": {"judge": judge}} if judge else {"reward": {"model": "reward", "normalize": False}}
    model = {"path": "m", "config": POSITIONS}
    recipe = {"stage": "eval", "model": model, "tasks": [{**entry, **task}], "output_dir": run}
    Path(f"{run}.yaml").write_text(json.dumps(recipe))
    return f"{run}.yaml"


def test_a_killed_evaluation_asks_the_judge_nothing_twice(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write("points", server, references=str(REFERENCES))
    killed: list[int] = []

    def deadly(messages: list[dict[str, str]]) -> str:
        if len(server.requests) == 4 and not killed:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
        return f"Fine.\nScore: {1 + len(server.requests)}"

    server.judge = deadly
    process = subprocess.Popen([sys.executable, "-m", "recipes.cli", "eval", recipe], cwd=Path.cwd(),
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)  # fmt: skip
    assert process.wait(120) == -signal.SIGKILL and len(server.requests) == 4
    assert main(["eval", recipe]) == 0
    assert (
        "eval: mt_bench: so far 6 requests to m" in capsys.readouterr().err
    )  # kept ones; the fourth was never received
    asked = Counter(block(sent["messages"], "PROMPT") for sent in server.requests)
    assert sorted(asked.values()) == [1, 1, 1, 1, 1, 2]
    samples = lines(Path("points/samples.jsonl"))
    assert [(line["row"], line["turn"]) for line in samples] == [(row, turn) for row in range(3) for turn in (1, 2)]
    assert [line["value"] for line in samples] == pytest.approx([2, 3, 4, 6, 7, 8])
    assert samples[1]["prompt"] == (
        f"user: {read_questions(task())[0].turns[0]}\n\nassistant: {samples[0]['completion']}\n\n"
        f"user: {read_questions(task())[0].turns[1]}"
    )
    results = read_json(Path("points/results.json"))
    Draft202012Validator(read_json(ROOT / "docs" / "results.schema.json")).validate(results)
    assert results["mt_bench_points"] == pytest.approx(5) and results["n"] == 3
    low, high = results["mt_bench_points_interval"]
    assert 2.5 <= low < 5 < high <= 7.5
    assert results["mt_bench_points_truncated"] == 1 and results["mt_bench_points_unread"] == 0
    turns = {name: figure["value"] for name, figure in results["mt_bench_details"].items()}
    assert turns == {"turn_1": pytest.approx(13 / 3), "turn_2": pytest.approx(17 / 3)}
    assert set(results["mt_bench_by_kind"]) == {"writing", "reasoning", "zh_reasoning"}
    assert results["mt_bench_by_kind"]["writing"] == {"value": 2.5, "interval": None, "n": 2}  # of one question


def task(**changes: Any) -> OpenTask:
    return OpenTask.model_validate({"task": "open_ended", "path": str(MT_BENCH), "reward": {"model": "r"}, **changes})


def test_the_judge_is_shown_reference_answers(server: Server) -> None:
    assert main(["eval", write("shown", server, references=str(REFERENCES))]) == 0
    shown = ["REFERENCE" in sent["messages"][1]["content"] for sent in server.requests]
    assert shown == [False, False, True, True, True, True]
    of_101 = json.loads(REFERENCES.read_text())["choices"][0]["turns"]
    assert block(server.requests[2]["messages"], "REFERENCE") == of_101[0]  # not those of the questions' file
    assert block(server.requests[3]["messages"], "REFERENCE") == f"Turn 1: {of_101[0]}\n\nTurn 2: {of_101[1]}"
    assert block(server.requests[4]["messages"], "REFERENCE") == "你在第二名。"


def test_a_baseline_is_compared_in_both_orders(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [
        {"question_id": number, "choices": [{"index": 0, "turns": [f"one {number}", "a much longer answer " * 9]}]}
        for number in (1101, 82, 101)
    ]
    Path("theirs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))

    def longer(messages: list[dict[str, str]]) -> str:
        first, second = ((len(text := block(messages, f"ANSWER {letter}")), text) for letter in "AB")
        if "one 82" in messages[1]["content"]:
            return "Better: A"  # whatever stands first
        return f"Better: {'A' if first > second else 'B'}"

    server.judge = longer
    assert main(["eval", write("compared", server, baseline="theirs.jsonl")]) == 0
    assert "eval: mt_bench: so far 12 requests to m; both orders agree on 4 of 6" in capsys.readouterr().err
    samples = lines(Path("compared/samples.jsonl"))
    assert [line["value"] for line in samples[:2]] == [0.5, 0.5] and samples[0]["orders"] == [1, 0]
    assert samples[0]["reason"].endswith("worse than it as the second: the orders disagree")
    assert samples[3]["value"] == 0 and samples[3]["reason"] == "worse than the baseline in both orders"
    assert samples[3]["baseline"] == "a much longer answer " * 9
    second = server.requests[2]["messages"]  # turn 2 of question 82
    assert block(second, "PROMPT") == read_questions(task())[0].turns[0]
    assert block(second, "ANSWER B").startswith("assistant: one 82\n\nuser: ") and "last turn" in second[0]["content"]
    results = read_json(Path("compared/results.json"))
    Draft202012Validator(read_json(ROOT / "docs" / "results.schema.json")).validate(results)
    details = results["mt_bench_details"]
    assert details["orders_agree"]["value"] == pytest.approx(4 / 6)
    assert set(details) == {"turn_1", "turn_2", "length_controlled", "orders_agree"}
    assert results["mt_bench_win_rate"] == pytest.approx(np.mean([line["value"] for line in samples]))

    server.judge = lambda messages: "Better: tie"
    assert main(["eval", write("itself", server, baseline="compared")]) == 0  # the answers of an evaluation
    same = lines(Path("itself/samples.jsonl"))
    assert [line["baseline"] for line in same] == [line["completion"] for line in samples]
    assert read_json(Path("itself/results.json"))["mt_bench_win_rate"] == 0.5


def test_a_reward_model_values_answers_and_compares_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert main(["eval", write("scored")]) == 0
    samples = lines(Path("scored/samples.jsonl"))
    first, later = samples[0], samples[1]
    turns = read_questions(task())[0].turns
    before = [*user(turns[0]), *assistant(first["completion"]), *user(turns[1])]
    from conversations import render_conversation

    ids = [
        render_conversation([*prompt, *assistant(line["completion"])], byte_tokenizer())["input_ids"]
        for prompt, line in ((user(turns[0]), first), (before, later))
    ]
    ids = [one[:-1] if line["truncated"] else one for one, line in zip(ids, samples, strict=False)]
    expected = score_heads(score_model(3).eval(), ids, pad_token_id=2, batch_size=2)
    assert [first["value"], later["value"]] == pytest.approx([heads[0] for heads in expected], abs=1e-5)
    assert read_json(Path("scored/results.json"))["mt_bench_points"] == pytest.approx(
        np.mean([line["value"] for line in samples])
    )
    assert main(["eval", write("against", baseline="scored", name="mt_bench", stop=["e"])]) == 0
    for line in lines(Path("against/samples.jsonl")):
        own, other = line["scores"]
        assert line["value"] == (0.5 if own == other else float(own > other))
        assert "orders" not in line
    assert "orders_agree" not in read_json(Path("against/results.json"))["mt_bench_details"]


def test_a_chain_compares_with_an_earlier_evaluation(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dsv2 check` knows that the baseline will be there."""
    monkeypatch.chdir(home)
    write("one")
    entry = json.loads(Path("one.yaml").read_text())["tasks"][0]
    stages = [
        {"name": "first", "recipe": "one.yaml", "results": "stages.first"},
        {"name": "second", "recipe": "one.yaml", "results": "stages.second",
         "tasks": [{**entry, "baseline": "${first}"}]},
    ]  # fmt: skip
    model = {"path": "m", "config": POSITIONS}
    Path("chain.yaml").write_text(
        json.dumps({"stage": "chain", "model": model, "stages": stages, "output_dir": "chain"})
    )
    assert main(["check", "chain.yaml"]) == 0 and main(["run", "chain.yaml"]) == 0
    assert read_json(Path("chain/second/results.json"))["mt_bench_win_rate"] == 0.5  # the same answers


def test_a_judge_that_fails_may_be_skipped(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.judge = lambda messages: "?" if len(server.requests) == 1 else "Score: 7"
    judge = {"base_url": server.url, "model": "m", "rubric": "rubric.md", "retries": 0, "concurrency": 1}
    assert main(["eval", write("skipped", reward={"judge": judge, "on_error": "skip"})]) == 0
    results = read_json(Path("skipped/results.json"))
    assert results["mt_bench_points"] == 7 and results["mt_bench_points_unread"] == pytest.approx(1 / 6)
    server.requests.clear()
    assert main(["eval", write("stopped", reward={"judge": judge})]) == 2
    assert "mt_bench failed: " in (said := capsys.readouterr().err) and "has no score: '?'" in said
    server.judge = lambda messages: "Score: 4"
    assert main(["eval", "stopped.yaml"]) == 0 and len(server.requests) == 1 + 6


FASTCHAT = {"question_id": 82, "choices": [{"turns": ["only one"]}]}


@pytest.mark.parametrize(
    ("rows", "change", "fault"),
    [
        ([{"prompt": "a"}], {}, r"rows.jsonl:1: has neither `turns` nor `instruction` \(it has prompt\)"),
        ([{"turns": "a"}], {}, "rows.jsonl:1: `turns` must be a list of one or more texts"),
        ([{"turns": []}], {}, "`turns` must be a list of one or more texts"),
        ([{"turns": ["a", " "]}], {}, "none of them empty"),
        ([{"turns": ["a"], "reference": [1]}], {}, "`reference` must be a text"),
        ([], {}, "no rows: the file is empty"),
        ([FASTCHAT], {"path": str(MT_BENCH), "baseline": "rows.jsonl"}, "has 1 of the 2 answers to mt_bench_question"),
        ([{"a": 1}], {"path": str(MT_BENCH), "baseline": "rows.jsonl"}, "rows.jsonl:1: is no answer"),
        ([FASTCHAT], {"path": str(MT_BENCH), "baseline": "reward"}, "is not an evaluation: it has no samples.jsonl"),
        ([FASTCHAT], {"path": str(MT_BENCH), "baseline": "absent.jsonl"}, "absent.jsonl"),
        ([{"turns": ["a"]}], {"max_new_tokens": 4096}, "more than the 4,096 positions of the model"),
        ([{"turns": ["a"]}], {"reward": {"rule": "number"}}, "need a judge or a model"),
        ([{"turns": ["a"]}], {"reward": {"model": "reward", "on_error": "zero"}}, "use skip"),
        ([{"turns": ["a"]}], {"reward": {"model": "reward", "weight": 2.0}}, "weight has no effect"),
        ([{"turns": ["a"]}], {"reward": {"model": "m"}}, "is a chat model, not a reward model"),
        ([{"turns": ["a"]}], {"reward": {"model": "absent"}}, "absent does not exist"),
        ([{"turns": ["a"]}], {"references": "rows.jsonl"}, "references are for a judge"),
        ([{"turns": ["a"]}], {"judge": {}}, "judge"),
        ([{"turns": ["a"]}], {"name": "a_points"}, "reserved"),
    ],
)
def test_what_check_and_the_run_refuse(
    home: Path, rows: Any, change: Any, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write("refused", **{"path": "rows.jsonl", **change})
    for command in ("check", "eval"):
        assert main([command, recipe]) == 2
        assert re.search(fault, said := capsys.readouterr().err) and "Traceback" not in said
    assert not Path("refused").exists()


def test_references_of_other_questions_are_refused(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text(json.dumps({**FASTCHAT, "question_id": 7}) + "\n")
    assert main(["check", write("refused", server, references="rows.jsonl")]) == 2
    assert "has an answer to none of the questions" in capsys.readouterr().err and not server.requests


def test_temperatures_of_mt_bench() -> None:
    of = {
        category: temperature_of(task(), Question("a", "a", ["a"], category))
        for category in ("writing", "zh_roleplay", "stem", "zh_humanities", "math", None)
    }
    assert [*of.values()] == [0.7, 0.7, 0.1, 0.1, 0, 0]
    assert temperature_of(task(temperature=1.0), Question("a", "a", ["a"], "math")) == 1


def test_answers_of_alpaca_eval_are_found_by_their_instruction(tmp_path: Path) -> None:
    rows = [{"instruction": f"ask {i}", "output": f"say {i}", "generator": "g"} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    path = str(tmp_path / "rows.json")
    assert [(q.turns, q.opponent) for q in read_questions(task(path=path, baseline=path, limit=2))] == [
        (["ask 0"], [("say 0", True)]), (["ask 1"], [("say 1", True)])
    ]  # fmt: skip


# --- win rates at equal lengths


def test_a_judge_of_lengths_alone_finds_nobody_better_at_equal_lengths() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.integers(300, 900, 400), rng.integers(100, 700, 400)
    chance = 1 / (1 + np.exp(-(own - other) / 120))
    won = (rng.random(400) < chance).astype(float)
    assert won.mean() > 0.7
    figure = length_controlled([*won], [*zip(own.tolist(), other.tolist(), strict=True)], range(400))
    assert figure["interval"][0] < 0.5 < figure["interval"][1] and abs(figure["value"] - 0.5) < 0.1


def test_an_advantage_beside_length_is_kept() -> None:
    """Outcomes drawn from the model itself: its intercept is found again."""
    rng = np.random.default_rng(1)
    own, other = rng.integers(100, 900, 1500), rng.integers(100, 900, 1500)
    longer = own - other
    logit = 1.0 + 1.5 * np.tanh(longer / longer.std())
    won = (rng.random(1500) < 1 / (1 + np.exp(-logit))).astype(float)
    figure = length_controlled([*won], [*zip(own.tolist(), other.tolist(), strict=True)], [i // 2 for i in range(1500)])
    assert figure["value"] == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.05)
    assert figure["interval"][0] < figure["value"] < figure["interval"][1]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=12), st.integers(1, 50))
def test_at_equal_lengths_it_is_the_win_rate(values: list[float], length: int) -> None:
    figure = length_controlled(values, [(length, length)] * len(values), range(len(values)))
    assert figure["value"] == pytest.approx(np.mean(values), abs=1e-3)
