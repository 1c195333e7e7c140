"""Rewards of the user's own, through the command line: the shipped examples, and functions that fail in every way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conversations.answers.own_function import call
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer
from conversations.rewards.function import FunctionReward
from recipes.cli import main as dsv2

from ..helpers.stages import lines

EXAMPLES = Path(__file__).parents[2] / "examples" / "my_rewards.py"
BAD = """
import time

CALLS = []


def hang(prompts, completions, **columns):
    while True:
        time.sleep(1)


def hang_once(prompts, completions, **columns):
    return [time.sleep(600) if c[-1]["content"] == "bad" else 1.0 for c in completions]


def raises_once(prompts, completions):
    return [1 / (c[-1]["content"] != "bad") for c in completions]


def raises(prompts, completions):
    return [1 / 0 for _ in prompts]


def few(prompts, completions):
    return [1.0] * (len(prompts) + 1)


def words(prompts, completions):
    return ["a"] * len(prompts)


def dies(prompts, completions):
    import os

    os._exit(3)


def nan(prompts, completions):
    return [float("nan")] * len(prompts)


def nothing(prompts, completions):
    return [None] * len(prompts)


def counted(prompts, completions):
    CALLS.extend(completions)
    return [float(len(CALLS))] * len(prompts)


NUMBER = 3


async def waits(prompts, completions):
    import asyncio

    await asyncio.sleep(600 if completions[0][-1]["content"] == "bad" else 0)
    return [1.0] * len(prompts)


async def breaks(prompts, completions):
    return [1 / (c[-1]["content"] != "bad") for c in completions]


def leaves(prompts, completions):
    import sys

    sys.exit(0)


async def cancels(prompts, completions):
    import asyncio

    raise asyncio.CancelledError


def by_number(prompts, completions):
    return dict(enumerate([1.0] * len(prompts)))


def huge(prompts, completions):
    return [10**400] * len(prompts)


def one(prompts, completions):
    return [1.0]


def known(completions, prompts, tokens, finished):
    return [count + done for count, done in zip(tokens, finished)]
"""


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    return path


def answers(*texts: str) -> list[Answer]:
    return [Answer([{"role": "user", "content": "2 + 2?"}], text, reference="4") for text in texts]


def judged(written: str, *texts: str, **more: Any) -> list[float | None]:
    reward = FunctionReward(written, **more)
    try:
        return reward.judge(answers(*texts))
    finally:
        reward.workers.close()


def test_the_example_trains_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rewards = [{"python": f"{EXAMPLES}:exact", "workers": 2}, {"python": f"{EXAMPLES}:short", "weight": 0.1}]
    words = ["rl", "tiny/rl_reasoning", "--smoke", "model.path=base", "model.preset=tiny", "output_dir=run"]
    assert dsv2([*words, f"rewards={json.dumps(rewards)}"]) == 0
    for line in lines(Path("run/samples.jsonl")):
        assert set(line["rewards"]) == {"exact", "short"} and 0 <= line["rewards"]["short"] <= 1


def test_it_is_called_as_trl_calls_it() -> None:
    rows = [{"prompt": [], "completion": text, "reference": "4", "finished": True} for text in ("So 4.", "5", "")]
    assert call(f"{EXAMPLES}:exact", rows) == [1.0, 0.0, 0.0]
    assert call(f"{EXAMPLES}:short", rows) == [0.98, 0.99, 1.0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hang", "bad.py:hang took longer than timeout = 1 s for one answer"),
        ("raises", "bad.py:21: ZeroDivisionError: division by zero"),
        ("few", "bad.py:few: returned 2 values for 1 answer"),
        ("words", "bad.py:words: returned 'a'; it must return a number or None for each answer"),
        ("dies", "bad.py:dies: its process ended"),
        ("leaves", "bad.py:68: SystemExit: 0"),
        ("cancels", "bad.py:74: CancelledError"),
        ("by_number", "bad.py: TypeError: it returned a dict, not a list with a number or None for each answer"),
        ("huge", "bad.py:huge: returned 1000000"),
        ("none", "bad.py: defines no function none"),
        ("NUMBER", "bad.py: defines no function NUMBER"),
    ],
)
def test_check_calls_it_on_one_row(name: str, why: str, bad: Path, capsys: Any) -> None:
    reward = {"python": f"bad.py:{name}", "timeout": 1}
    words = ["check", "tiny/rl_reasoning", "model.path=base", "model.preset=tiny", "output_dir=run"]
    assert dsv2([*words, f"rewards=[{json.dumps(reward)}]"]) == 2
    said = capsys.readouterr().err
    assert why in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("reward", "why"),
    [
        ({"python": "bad:raises"}, "must be"),
        ({"python": "bad.py:a-b"}, "must be"),
        ({"python": "other.py:f"}, "other.py: there is no such file"),
        ({"python": "broken.py:f"}, "broken.py:1: "),
        ({"python": "leaves.py:f"}, "leaves.py:2: SystemExit: 0"),
        ({"rule": "number", "timeout": 3}, "timeout and workers belong to a function"),
        ({"python": "bad.py:raises", "clip": 1}, "clip belongs to a reward model"),
        ({"python": "bad.py:raises", "rule": "number"}, "needs one of model, rule and python"),
        ({"python": "bad.py:raises", "settings": {"a": 1}}, "settings belong to a rule"),
        ({"python": "bad.py:raises", "workers": 0}, "workers"),
    ],
)
def test_what_cannot_be_is_one_message(reward: dict[str, Any], why: str, bad: Path, capsys: Any) -> None:
    Path("broken.py").write_text("def f(:\n")
    Path("leaves.py").write_text("import sys\nsys.exit(0)\n")
    words = ["check", "tiny/rl_reasoning", "model.path=base", "model.preset=tiny", "output_dir=run"]
    assert dsv2([*words, f"rewards=[{json.dumps(reward)}]"]) == 2
    said = capsys.readouterr().err
    assert why in said and said.startswith("error: ") and "Traceback" not in said


def test_what_fails_counts_as_on_error_says(bad: Path) -> None:
    rows = {"prompts": [[{"role": "user", "content": "?"}]] * 3}
    said = [[{"role": "assistant", "content": text}] for text in ("good", "bad", "fine")]
    for on_error, instead in (("zero", 0.0), ("skip", None)):
        reward = FunctionReward("bad.py:hang_once", on_error=on_error, timeout=1, workers=2)  # pyright: ignore
        assert reward(**rows, completions=said) == [1.0, instead, 1.0]
        reward.workers.close()
        reward = FunctionReward("bad.py:raises_once", on_error=on_error)  # pyright: ignore
        assert reward(**rows, completions=said) == [1.0, instead, 1.0]
        reward.workers.close()
        reward = FunctionReward("bad.py:nan", on_error=on_error)  # pyright: ignore
        assert reward(**rows, completions=said) == [instead] * 3
        reward.workers.close()
    assert judged("bad.py:nothing", "a", "b") == [None, None]
    with pytest.raises(ToolkitError, match="no finite value"):
        FunctionReward("bad.py:nan")(**rows, completions=said)


def test_a_count_that_is_wrong_is_an_error_whatever_the_batch(bad: Path) -> None:
    with pytest.raises(ToolkitError, match=r"bad.py:one: returned 1 value for 2 answers"):
        judged("bad.py:one", "a", "b")


def test_what_fails_has_a_reason(bad: Path) -> None:
    reward = FunctionReward("bad.py:raises_once", on_error="skip")
    assert reward.judged(answers("good", "bad", "good", "bad")) == [1.0, None, 1.0, None]
    assert reward.reasons == [None, why := "bad.py:17: ZeroDivisionError: division by zero", None, why]
    reward.workers.close()


@pytest.mark.parametrize("name", ["waits", "breaks"])
def test_a_coroutine_that_fails_takes_no_other_with_it(name: str, bad: Path) -> None:
    rows = {"prompts": [[{"role": "user", "content": "?"}]] * 3}
    said = [[{"role": "assistant", "content": text}] for text in ("good", "bad", "fine")]
    reward = FunctionReward(f"bad.py:{name}", on_error="skip", timeout=1, workers=3)
    assert reward(**rows, completions=said) == [1.0, None, 1.0]
    reward.workers.close()


def test_it_is_told_what_is_known_of_an_answer(bad: Path) -> None:
    reward = FunctionReward("bad.py:known")
    columns = {"completion_ids": [[1, 2, 3], [4]], "finished": [True, False]}
    said = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    assert reward([[{"role": "user", "content": "?"}]] * 2, said, **columns) == [4.0, 1.0]
    reward.workers.close()


def test_check_refuses_a_function_that_is_not_there_whatever_on_error_says(bad: Path, capsys: Any) -> None:
    words = ["check", "tiny/rl_reasoning", "model.path=base", "model.preset=tiny", "output_dir=run"]
    for name, code in (("none", 2), ("raises", 0)):
        assert dsv2([*words, f'rewards=[{{"python": "bad.py:{name}", "on_error": "zero"}}]']) == code
    assert "bad.py: defines no function none" in capsys.readouterr().err


def test_an_answer_that_was_cut_is_judged_apart(bad: Path) -> None:
    reward, (answer,) = FunctionReward("bad.py:counted"), answers("a")
    assert reward.judge([answer]) == [1.0] and reward.judge([replace(answer, finished=False)]) == [2.0]
    reward.workers.close()


def test_the_same_answer_is_judged_once(bad: Path) -> None:
    reward = FunctionReward("bad.py:counted")
    assert reward.judge(answers("a", "b", "a")) == [2.0, 2.0, 2.0]
    assert reward.judge(answers("b", "c")) == [2.0, 3.0]
    reward.workers.close()


def test_an_interruption_is_no_error_of_the_function(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text("def f(prompts, completions):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        call(f"{tmp_path}/stopped.py:f", [{"prompt": "1?", "completion": "2"}])
