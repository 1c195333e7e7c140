"""RL with tools: several turns of a policy that is made to call them, what is trained of them, and what is refused."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from conversations import render_conversation
from conversations.answers.prompts import prompt_row
from conversations.environments.calls import calls_in
from conversations.environments.episodes import Players
from conversations.environments.loading import load_environment
from conversations.errors import ToolkitError
from deepseek_v2_modeling.training import RunLimits
from eval.config import EvalRecipe
from eval.stage import evaluate
from recipes.cli import main
from rl.rollouts.acting import EnvironmentReward
from rl.stage import grpo_config, prompt_dataset, train
from rl.trainer import PolicyTrainer

from ..helpers.broken_recipes import RECIPES, ROLLOUT, make_world
from ..helpers.rl import Vowels, recipe, untimed
from ..helpers.stages import (
    SECTIONS,
    assert_same_weights,
    byte_tokenizer,
    chat_model,
    conversations,
    lines,
    stopped_after,
    user,
)

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
SANDBOX = "conversations.environments:PythonSandbox"
SCRIPT = (
    '<tool_call>{"name": "add", "arguments": {"number": 4}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"number": "x"}}</tool_call><tool_call>{"name": "slow", "arguments": {}}',
)
TOOLS = '''
import asyncio


class Counter:
    """Adds up."""

    def __init__(self, most: int = 4):
        self.most = most

    def reset(self, prompt, reference, **row):
        self.sum = int(reference)
        return f" (from {reference})"

    def add(self, number: int):
        """
        Add a number.

        Args:
            number: what to add
        """
        self.sum += number
        return {"sum": self.sum}

    async def slow(self):
        """Say something later."""
        await asyncio.sleep(0.01)
        return f"slow {self.sum}"

    def get_reward(self):
        return self.sum % 5 / self.most
'''


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tools") / "tools.py"
    path.write_text(TOOLS)
    return f"{path}:Counter"


def forced(ids: Sequence[torch.Tensor], starts: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    """Makes the policy write SCRIPT, a line a turn, then two tokens of its own."""
    adjusted = logits.clone()
    for row, (so_far, start) in enumerate(zip(ids, starts, strict=True)):
        answer = so_far[start:].tolist()
        turn = answer.count(END)
        if turn == len(SCRIPT):
            written = len(answer) - len(answer[: _last_turn(answer)])
            wanted = [END] if written == 2 else []
        else:
            script = TOKENIZER(" " + SCRIPT[turn], add_special_tokens=False)["input_ids"]
            wanted = [*script, END][len(answer) - _last_turn(answer) :][:1]
        if wanted:
            adjusted[row] = -1e4
            adjusted[row, wanted[0]] = 0.0
        else:
            adjusted[row, END] = -1e4
    return adjusted


def _last_turn(answer: list[int]) -> int:
    """Where the last turn begins: after the results of the one before."""
    text = TOKENIZER.decode(answer)
    asks = "Assistant:"
    place = text.rfind(asks)
    return 0 if place < 0 else len(TOKENIZER(text[: place + len(asks)], add_special_tokens=False)["input_ids"])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.rollouts.sampled.adjustment", lambda *args: forced)


TRAINING = {"max_completion_length": 420, "num_generations": 2, "per_device_train_batch_size": 4, "beta": 0.0}
ENDED = len(SCRIPT) * 2  # messages before the last


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def trained(folder: Path, tools: str, model: Any = None, resume_from: Path | None = None, **changes: Any) -> Any:
    asked = recipe(folder, training={**TRAINING, "max_steps": 2, "save_steps": 1}, **changes)
    return train(
        asked,
        model=model or chat_model(),
        tokenizer=TOKENIZER,
        rows=conversations(16),
        eval_rows=conversations(2) if "eval_data" in changes else None,
        rewards=[Vowels("vowels")],
        environment=load_environment(tools, {}),
        run_dir=folder,
        resume_from=resume_from,
    )


def trainer_in(tools: str, folder: Path) -> PolicyTrainer:
    environment, limits = load_environment(tools, {}), RunLimits()
    rewards = [Vowels("vowels"), EnvironmentReward(environment.name)]
    return PolicyTrainer(
        chat_model(),
        grpo_config(recipe(folder, training=TRAINING, environment={"python": tools}), folder, limits, rewards),
        rewards,
        train_dataset=prompt_dataset(conversations(16)),
        processing_class=byte_tokenizer(),
        limits=limits,
        environment=environment,
    )


def results_of(row: dict[str, Any]) -> list[str]:
    """What SCRIPT's calls give, as text of user turns."""
    total = int(row["reference"]) + 4
    error = "unsupported operand type(s) for +=: 'int' and 'str'"
    second = [f'{{"error": "{error}"}}', f"slow {total}"]
    turns = [[f'{{"sum": {total}}}'], second]
    return ["\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in turn) for turn in turns]


def test_only_what_the_policy_wrote_is_trained(tools: str, tmp_path: Path, scripted: None):
    trainer = trainer_in(tools, tmp_path)
    rows = [row for row in list(trainer.train_dataset)[:2] for _ in range(2)]
    batch = trainer._generate_and_score_completions(rows)
    for place, row in enumerate(rows):
        real = batch["completion_mask"][place].bool()
        ids, own = batch["completion_ids"][place][real], batch["tool_mask"][place][real].bool()
        last = ids[-3:].tolist()  # two tokens of its own, and the end
        written = [token for text in SCRIPT for token in [*ids_of(" " + text), END]] + last
        assert ids[own].tolist() == written
        assert torch.equal(batch["sampling_per_token_logps"][place][real].isnan(), ~own)
        # All of it but the last turn is the conversation so far, rendered as any other.
        question = {"role": "user", "content": f"{row['prompt'][0]['content']} (from {row['reference']})"}
        messages = trainer.players.environment.offered([question])
        for text, result in zip(SCRIPT, results_of(row), strict=True):
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": result}]
        rendered = render_conversation(messages, TOKENIZER, add_generation_prompt=True)["input_ids"]
        prompt = batch["prompt_ids"][place][batch["prompt_mask"][place].bool()].tolist()
        assert prompt + ids[:-3].tolist() == rendered


def test_the_loss_is_that_of_the_policys_own_tokens(tools: str, tmp_path: Path, scripted: None):
    trainer = trainer_in(tools, tmp_path)
    rows = [row for row in list(trainer.train_dataset)[:2] for _ in range(2)]
    batch = trainer._generate_and_score_completions(rows)
    batch["advantages"] = torch.tensor([1.0, -2.0, 0.5, 3.0])
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, batch).backward()
    found = trainer.model.lm_head.weight.grad.clone()
    trainer.model.zero_grad()
    means = []
    for place, advantage in enumerate(batch["advantages"]):
        parts = [batch[f"{part}_ids"][place][batch[f"{part}_mask"][place].bool()] for part in ("prompt", "completion")]
        logits = trainer.model(torch.cat(parts)[None], use_cache=False).logits[0, len(parts[0]) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, parts[1][:, None])[:, 0]
        means.append(-advantage * logps[batch["tool_mask"][place][: len(parts[1])].bool()].mean())
    torch.stack(means).mean().backward()
    torch.testing.assert_close(found, trainer.model.lm_head.weight.grad, atol=1e-6, rtol=1e-4)


def test_a_run_resumes_and_shows_its_turns(tools: str, tmp_path: Path, scripted: None):
    first, second = chat_model(), chat_model()
    eval_data, evaluates = [{"path": "unused"}], {"eval_strategy": "steps", "eval_steps": 1}
    asked = {"eval_data": eval_data, "environment": {"python": tools}}
    asked["training"] = {**TRAINING, "max_steps": 2, "save_steps": 1, **evaluates}
    given = {"tokenizer": TOKENIZER, "rows": conversations(16), "eval_rows": conversations(2)}
    given |= {"rewards": [Vowels("vowels")], "environment": load_environment(tools, {})}

    def run(model: Any, folder: Path, resume_from: Path | None = None) -> None:
        train(recipe(folder, **copy.deepcopy(asked)), model=model, **given, run_dir=folder, resume_from=resume_from)

    run(first, tmp_path / "a")
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-1", tmp_path / "b")
    run(second, tmp_path / "b", checkpoint)
    assert_same_weights(first, second)
    logged, again = ([untimed(line) for line in lines(tmp_path / name / "metrics.jsonl")] for name in "ab")
    logged, again = ([line for line in part if "reward" in line] for part in (logged, again))
    assert logged == again
    assert all(line["tools/call_frequency"] == 3 and line["tools/no_room"] == 0 for line in logged)
    assert all(line["tools/failure_frequency"] == pytest.approx(1 / 3) for line in logged)
    held_out = [line for line in lines(tmp_path / "a" / "metrics.jsonl") if "eval_reward" in line]
    assert len(held_out) == 2 and all("eval_rewards/Counter/mean" in line for line in held_out)
    for sample in lines(tmp_path / "a" / "samples.jsonl"):
        assert [turn["role"] for turn in sample["turns"]] == ["assistant", "user"] * 2 + ["assistant"]
        assert [turn["content"] for turn in sample["turns"][:4:2]] == list(SCRIPT)
        assert sample["completion"] == sample["turns"][-1]["content"] and "tool_response" not in sample["completion"]
        total = int(sample["turns"][1]["content"].split(": ")[1].split("}")[0])
        assert sample["rewards"]["Counter"] == total % 5 / 4


@pytest.mark.parametrize("replay", ["off", "rollout"])
def test_updates_use_the_experts_that_read_turns_and_results(
    tools: str, tmp_path: Path, scripted: None, monkeypatch: Any, replay: str
):
    """The second update on a rollout would choose others."""
    monkeypatch.setitem(TRAINING, "num_iterations", 2)
    monkeypatch.setitem(TRAINING, "learning_rate", 0.1)
    trained(tmp_path, tools, routing_replay=replay)
    first, second = (line["mismatch/routes_agree"] for line in lines(tmp_path / "metrics.jsonl") if "loss" in line)
    assert first == 1.0 and (second == 1.0) == (replay == "rollout")


def test_results_without_room_end_the_answer(tools: str, tmp_path: Path, scripted: None, monkeypatch: Any):
    monkeypatch.setitem(TRAINING, "max_completion_length", len(ids_of(" " + SCRIPT[0])) + 30)
    trainer = trainer_in(tools, tmp_path)
    batch = trainer._generate_and_score_completions([row for row in list(trainer.train_dataset)[:2] for _ in range(2)])
    assert (
        batch["tool_mask"].all() and batch["completion_mask"].sum(1).tolist() == [len(ids_of(" " + SCRIPT[0])) + 1] * 4
    )
    assert trainer._metrics["train"]["tools/no_room"] == [1.0]


def test_most_turns_end_the_answer(tools: str, tmp_path: Path, scripted: None, monkeypatch: Any):
    monkeypatch.setitem(TRAINING, "max_tool_calling_iterations", 1)
    trainer = trainer_in(tools, tmp_path)
    trainer._generate_and_score_completions([row for row in list(trainer.train_dataset)[:2] for _ in range(2)])
    assert trainer._metrics["train"]["tools/call_frequency"] == [1.0]


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluated(folder: Path, tools: str, rows: Any, resume: bool = False, **task: Any) -> tuple[Any, list[Any]]:
    task = {"name": "figure", "environment": {"python": tools}, "max_new_tokens": 420, "batch_size": 2, **task}
    asked = EvalRecipe(**{**SECTIONS, "stage": "eval", "output_dir": str(folder), "tasks": [task]})
    given: dict[str, Any] = {"model": chat_model().eval(), "tokenizer": TOKENIZER, "rows_by_task": {"figure": rows}}
    found = evaluate(asked, **given, run_dir=folder, resume=resume)
    return found["figure"], lines(folder / "samples.jsonl")


def test_an_evaluation_answers_as_a_rollout_does(tools: str, tmp_path: Path, scripted: None, monkeypatch: Any):
    monkeypatch.setattr("conversations.generation.generating.adjustment", lambda *args: forced)
    found, samples = evaluated(tmp_path / "eval", tools, conversations(3), metric="environment")
    totals = [int(sample["reference"]) + 4 for sample in samples]
    assert found["n"] == 3 and [sample["value"] for sample in samples] == [total % 5 / 4 for total in totals]
    assert found["greedy"] == sum(total % 5 for total in totals) / 12
    trainer = trainer_in(tools, tmp_path)
    trainer.generation_config.do_sample = False
    episodes = trainer.sampled_answers([prompt_row(row, 1) for row in conversations(3)], 1)
    for sample, turns, ids in zip(samples, episodes.completions, episodes.ids, strict=True):
        assert sample["turns"] == turns and sample["completion"] == turns[-1]["content"]
        assert sample["tokens"] == len(ids) and not sample["truncated"]
    (tmp_path / "eval" / "samples.jsonl").write_text("\n".join(json.dumps(sample) for sample in samples[:2]) + "\n")
    with monkeypatch.context() as patched:
        patched.setattr("conversations.generation.generating.generate_answers", lambda model, prompts, **_: prompts)
        assert (
            evaluated(tmp_path / "eval", tools, conversations(2), resume=True, metric="environment")[1] == samples[:2]
        )
    too_large = {"python": tools, "settings": {"most": 2}}
    failed = evaluated(tmp_path / "eval", tools, conversations(4), metric="environment", environment=too_large)[0]
    assert failed["n"] == 0 and "takes rewards from 0 to 1, and get_reward gave 1.5" in failed["error"]


def test_an_evaluations_turns_with_calls_are_limited(tools: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("conversations.generation.generating.adjustment", lambda *args: forced)
    task = {"metric": "exact_match", "max_tool_calling_iterations": 1}
    _, samples = evaluated(tmp_path, tools, conversations(1), **task)
    assert [turn["role"] for turn in samples[0]["turns"]] == ["assistant", "user", "assistant"]


# --- calls and environments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("no call", []),
        ('a <tool_call>{"name": "f", "arguments": {}}</tool_call> b', [("f", {}, None)]),
        (
            '<tool_call>\n{"name": "f", "arguments": {"x": "</y>"}}\n</tool_call>'
            '<tool_call>{"name": "g", "arguments": {}}',
            [("f", {"x": "</y>"}, None), ("g", {}, None)],
        ),
        ("<tool_call>{bad</tool_call>", [("", {}, "the call is not JSON")]),
        ("<tool_call>[]</tool_call>", [("", {}, "a call must be")]),
        ('<tool_call>{"name": 3}</tool_call>', [("", {}, "a call must be")]),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', [("f", {}, "arguments must be an object")]),
        ("<tool_call>" + "[" * 100_000, [("", {}, "the call is not JSON")]),
    ],
)  # fmt: skip
def test_calls_are_read_and_malformed_ones_are_answered(text: str, wanted: list[Any]):
    found = calls_in(text)
    assert [(call.name, call.arguments) for call in found] == [(name, arguments) for name, arguments, _ in wanted]
    for call, (_, _, why) in zip(found, wanted, strict=True):
        assert (call.fault is None) if why is None else call.fault.startswith(why)


def test_an_environment_names_what_is_wrong_with_it(tmp_path: Path):
    def file(text: str) -> str:
        path = tmp_path / f"env_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        return f"{path}:E"

    reset = "class E:\n    def reset(self, **row):\n        pass\n"
    faults = {
        "nothing": "does not name an environment",
        "no_such_module_x:E": "No module named 'no_such_module_x'; install it",
        "json:E": "json defines no E",
        str(tmp_path / "none.py:E"): "there is no such file",
        file("1/0"): r"env_0.py:1: ZeroDivisionError",
        file("class E: pass"): "must be a class with a method reset",
        file(reset): "has no public methods",
        file(reset + "    def f(self, x: int):\n        'no word of x'\n"): "its tool f cannot be described",
    }
    for written, why in faults.items():
        with pytest.raises(ToolkitError, match=why):
            load_environment(written, {})
    fails = load_environment(file(reset.replace("pass", "return row['y']") + "    def f(self):\n        'f'\n"), {})
    with pytest.raises(ToolkitError, match=r"reset failed: .*env_\d.py:3: KeyError: 'y'"):
        Players(fails, TOKENIZER).begin([{"prompt": user("a")}])
    leaves = load_environment(file(reset.replace("pass", "exit(0)") + "    def f(self):\n        'f'\n"), {})
    with pytest.raises(ToolkitError, match=r"reset failed: .*env_\d.py:3: SystemExit: 0"):
        Players(leaves, TOKENIZER).begin([{"prompt": user("a")}])
    number = load_environment(file(reset.replace("pass", "return 3") + "    def f(self):\n        'f'\n"), {})
    with pytest.raises(ToolkitError, match="reset returned 3; it must return text"):
        Players(number, TOKENIZER).begin([{"prompt": user("a")}])
    for value, wanted in ((True, 1.0), (None, None), (torch.tensor(0.5), 0.5)):
        assert Players(fails, TOKENIZER).reward(SimpleNamespace(get_reward=lambda value=value: value)) == wanted
    with pytest.raises(ToolkitError, match="get_reward returned 'high'; it must return a number or None"):
        Players(fails, TOKENIZER).reward(SimpleNamespace(get_reward=lambda: "high"))
    with pytest.raises(ToolkitError, match="takes no arguments"):
        load_environment("conversations.environments:Calculator", {"sharp": 1}).instance()


EXITS = """class E:
    def reset(self, **row):
        pass

    {kind} compute(self, text: str):
        '''Compute.

        Args:
            text: what.
        '''
        return str(eval(text))
"""


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_tool_that_exits_is_an_error_for_the_model_to_read(kind: str, tmp_path: Path):
    """As one that evaluates what the model writes may be told to."""
    path = tmp_path / "exits.py"
    path.write_text(EXITS.format(kind=kind))
    playing = Players(load_environment(f"{path}:E", {}), TOKENIZER).begin([{"prompt": user("a")}])
    call = '<tool_call>\n{"name": "compute", "arguments": {"text": "exit(0)"}}\n</tool_call>'
    (read,) = playing.after_turn([0], [ids_of(call)])
    assert playing.episodes[0].failures == 1 and "SystemExit: 0" in TOKENIZER.decode(read)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"environment": {"python": "x"}}, "does not name an environment"),
        ({"environment": {"python": "json:E"}}, "json defines no E"),
        ({"rewards": []}, "has no get_reward; give one of the two"),
        ({"training": {"use_transformers_continuous_batching": True}}, "by the toolkit's own loop"),
        ({"training": {"generation_kwargs": {"top_pp": 1}}}, "which no generation config has; did you mean 'top_p'"),
        ({"training": {"cache_implementation": "static"}}, "which training.cache_implementation rules out"),
        ({"environment": {"python": SANDBOX, "settings": {"seconds": 0}}}, "seconds must be"),
        ({"method": "dpo"}, "trains on preferences"),
        (
            {"environment": None, "training": {"max_tool_calling_iterations": 1}},
            "max_tool_calling_iterations needs an environment",
        ),
        ({"training": {"max_completion_length": 163_700}}, "are more than the 163,840 positions"),
    ],
)  # fmt: skip
def test_check_and_run_refuse_alike(change: dict[str, Any], why: str, tmp_path: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.chdir(tmp_path)
    make_world(tmp_path)
    asked = {**RECIPES["rl"], "environment": {"python": "conversations.environments:Calculator"}}
    asked = {**asked, **change, "training": {**ROLLOUT, **change.get("training", {})}}
    Path("recipe.yaml").write_text(yaml.safe_dump(asked))
    for command in ("check", "rl"):
        assert main([command, "recipe.yaml"]) == 2
        assert why in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "change, why",
    [
        ({"environment": {"python": "json:E"}}, "json defines no E"),
        ({"environment": {"python": SANDBOX, "settings": {"seconds": 0}}}, "seconds must be"),
        ({"metric": "environment"}, "has no get_reward; use another metric"),
        ({"stop": ["x"]}, "answers in an environment end with a turn"),
        ({"environment": None}, "max_tool_calling_iterations needs an environment"),
        ({"metric": "loss"}, "environment has no effect on loss"),
    ],
)
def test_an_evaluation_is_checked_alike(
    change: dict[str, Any], why: str, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    make_world(tmp_path)
    task = {**RECIPES["eval_tools"]["tasks"][0], **change}
    Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPES["eval_tools"], "tasks": [task]}))
    for command in ("check", "eval"):
        assert main([command, "recipe.yaml"]) == 2
        assert why in " ".join(capsys.readouterr().err.split())


def test_a_run_from_the_command_line(tmp_path: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.chdir(tmp_path)
    make_world(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPES["rl_tools"]))
    assert main(["check", "recipe.yaml"]) == 0 and main(["rl", "recipe.yaml"]) == 0
    line = next(line for line in lines(Path("out/metrics.jsonl")) if "tools/call_frequency" in line)
    assert line["tools/call_frequency"] == 0 and all("turns" in sample for sample in lines(Path("out/samples.jsonl")))
    Path("eval.yaml").write_text(yaml.safe_dump(RECIPES["eval_tools"] | {"output_dir": "eval"}))
    assert main(["check", "eval.yaml"]) == 0 and main(["eval", "eval.yaml"]) == 0
    assert all(len(sample["turns"]) == 1 for sample in lines(Path("eval/samples.jsonl")))
