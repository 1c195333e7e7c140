from pathlib import Path
from typing import Any

import pytest
import torch

from conversations import render_conversation
from conversations.answers.intervals import mean_interval, wilson
from conversations.errors import ToolkitError
from deepseek_v2_modeling.inference import by_length, choose_tokens, generate_answers, pad_batch, score_sequences
from eval.config import EvalRecipe, EvalTask, decoding_name
from eval.stage import evaluate

from ..helpers.models import random_ids
from ..helpers.stages import (
    SECTIONS,
    assistant,
    byte_tokenizer,
    chat_model,
    conversations,
    lines,
    pairs,
    score_model,
    user,
)


class Parrot:
    """Answers each prompt with the text that was written down for it."""

    def __init__(self, monkeypatch, answers):
        tokenizer = byte_tokenizer()

        def generate(model, prompts, *, temperature, **settings):
            texts = [answers(tokenizer.decode(ids), temperature) for ids in prompts]
            return [[*tokenizer.encode(text), 1] for text in texts]

        monkeypatch.setattr("conversations.generation.generating.generate_answers", generate)


def run(run_dir: Path, rows, model=None, **task):
    task = {"name": "figure", **task}
    recipe = EvalRecipe(**{**SECTIONS, "stage": "eval", "output_dir": str(run_dir), "tasks": [task]})
    found = evaluate(
        recipe,
        model=model or chat_model().eval(),
        tokenizer=byte_tokenizer(),
        rows_by_task={"figure": rows},
        run_dir=run_dir,
    )
    return found["figure"], lines(run_dir / "samples.jsonl")


def test_exact_match_greedy_and_sampled(tmp_path, monkeypatch):
    def answers(prompt, temperature):
        number = int(prompt.split("User: ")[1].split(" +")[0])
        return f" It is {number + 1 if number % 2 == 0 or temperature == 1 else 0}."

    Parrot(monkeypatch, answers)
    found, said = run(tmp_path, conversations(5), metric="exact_match", temperatures=[0.0, 1.0])
    assert found.pop("greedy_interval") == pytest.approx(wilson(0.6, 5))
    assert found.pop("t1_interval") == pytest.approx(wilson(1, 5))
    shares = {"greedy_truncated": 0, "greedy_unread": 0, "t1_truncated": 0, "t1_unread": 0}
    assert found == {"n": 5, "greedy": 0.6, "t1": 1.0, **shares}
    assert [(line["decoding"], line["row"], line["value"]) for line in said[:3]] == [
        ("greedy", 0, 1.0),
        ("greedy", 1, 0.0),
        ("greedy", 2, 1.0),
    ]
    assert said[0] == {
        "task": "figure",
        "row": 0,
        "decoding": "greedy",
        "prompt": "0 + 1",
        "rendered": f"{byte_tokenizer().bos_token}User: 0 + 1\n\nAssistant:",
        "completion": "It is 1.",
        "truncated": False,
        "tokens": 10,
        "read": "1",
        "value": 1.0,
        "reason": "the last number is the reference '1'",
        "reference": "1",
        "meta": {"kind": "sum"},
    }


def test_exact_match_by_mathematics(tmp_path, monkeypatch):
    Parrot(monkeypatch, lambda prompt, temperature: " So it is $\\frac{1}{2}$.")
    rows = [{"messages": user("half?"), "reference": "0.5"}, {"messages": user("third?"), "reference": "1/3"}]
    assert run(tmp_path, rows, metric="exact_match", rule="math")[0]["greedy"] == 0.5


def test_answers_without_an_answer_are_counted_by_rules_that_look_for_one(tmp_path, monkeypatch):
    asked = "Which?\nA. red\nB. blue"
    rows = [{"messages": user(f"{asked} {n}"), "reference": "B"} for n in range(3)]
    Parrot(monkeypatch, lambda prompt, temperature: {"0": " blue", "1": " (A)", "2": " neither"}[prompt.split()[-2]])
    found, said = run(tmp_path, rows, metric="exact_match", rule="choice")
    assert [line["read"] for line in said] == [None, "A", None] and found["greedy_unread"] == pytest.approx(2 / 3)
    found, said = run(tmp_path, rows, metric="exact_match", rule="length", settings={"max_tokens": 9, "buffer": 4})
    assert "greedy_unread" not in found and "read" not in said[0]


def test_any_rule_judges_and_is_told_what_is_known_of_an_answer(tmp_path, monkeypatch):
    Parrot(monkeypatch, lambda prompt, temperature: " four!" if "0" in prompt else " no")
    rows = [{"messages": user("0?")}, {"messages": user("1?")}]
    settings = {"max_tokens": 9, "buffer": 4}
    found, said = run(tmp_path, rows, metric="exact_match", rule="length", settings=settings)
    assert [line["tokens"] for line in said] == [7, 4] and [line["value"] for line in said] == [0.5, 1.0]
    assert found["greedy"] == 0.75
    again, _ = run(tmp_path, rows, metric="exact_match", rule="repetition", settings={"n": 2})
    assert again["greedy"] == 1.0


def test_refusals_by_the_tasks_own_patterns(tmp_path, monkeypatch):
    Parrot(monkeypatch, lambda prompt, temperature: " I cannot." if "harm" in prompt else " Nein, danke.")
    rows = [{"messages": user("harm him")}, {"messages": user("help him")}]
    assert run(tmp_path, rows, metric="refusal")[0]["greedy"] == 0.5
    found, said = run(tmp_path, rows, metric="refusal", patterns=["nein", "cannot"])
    assert (found["n"], found["greedy"]) == (2, 1.0)
    assert len(said) == 2  # of this evaluation alone


def test_a_format_is_matched_by_the_whole_answer(tmp_path, monkeypatch):
    said = iter(["Sure, 4.", "Sure, 4. Silly you!", "Silly you! Sure, 4.", "", "sure, 4."])
    Parrot(monkeypatch, lambda prompt, temperature: f" {next(said)}")
    found, lines_of = run(tmp_path, conversations(5), metric="format", patterns=[r"Fine\.", r"Sure, \d\."])
    assert [line["value"] for line in lines_of] == [1, 0, 0, 0, 0] and found["greedy"] == 0.2
    Parrot(monkeypatch, lambda prompt, temperature: " no no no no no no" if "0" in prompt else " 4")
    assert run(tmp_path, conversations(2), metric="format")[0]["greedy"] == 0.5


def test_tasks_on_the_same_rows_judge_the_same_answers(tmp_path, monkeypatch):
    """Asked once for each temperature; with another limit of tokens they are asked again."""
    asked = []
    Parrot(monkeypatch, lambda prompt, temperature: asked.append(temperature) or f" {len(asked)}")
    common: dict[str, Any] = {"temperatures": [0.0, 1.0], "patterns": [r"\d+"]}
    tasks: list[dict[str, Any]] = [
        {"name": "first", "metric": "exact_match", "temperatures": [0.0, 1.0]},
        {"name": "same", "metric": "format", **common},
        {"name": "longer", "metric": "format", **common, "max_new_tokens": 5},
        {"name": "fewer", "metric": "format", **common, "limit": 2},
    ]
    recipe = EvalRecipe(**{**SECTIONS, "stage": "eval", "output_dir": str(tmp_path), "tasks": tasks})
    rows: dict[str, Any] = {task["name"]: conversations(3) for task in tasks}
    evaluate(recipe, model=chat_model().eval(), tokenizer=byte_tokenizer(), rows_by_task=rows, run_dir=tmp_path)
    said = {task["name"]: [] for task in tasks}
    for line in lines(tmp_path / "samples.jsonl"):
        said[line["task"]].append(line["completion"])
    assert said["first"] == said["same"] == ["1", "2", "3", "4", "5", "6"]
    assert said["longer"] == ["7", "8", "9", "10", "11", "12"] and said["fewer"] == ["1", "2", "4", "5"]


def test_pair_accuracy_of_a_reward_model(tmp_path):
    model, tokenizer = score_model().eval(), byte_tokenizer()
    rows = pairs(4) + [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(1)]
    found, said = run(tmp_path, rows, model=model, metric="pair_accuracy", batch_size=2)
    for row, line in zip(rows, said, strict=True):
        ids = [
            render_conversation([*row["prompt"], *row[key]], tokenizer)["input_ids"] for key in ("chosen", "rejected")
        ]
        scores = [model(input_ids=torch.tensor([i])).logits.item() for i in ids]
        assert line["scores"] == pytest.approx(scores, abs=1e-5)
        assert line["value"] == float(scores[0] > scores[1])
    value = sum(line["value"] for line in said) / 5
    interval = mean_interval([line["value"] for line in said], [0, 1, 2, 3, 0])  # the last prompt is the first again
    assert found == {"n": 5, "value": value, "value_interval": [*interval]}
    assert said[0]["meta"] == {"kind": "even"}


def test_loss_is_the_mean_over_the_assistants_tokens(tmp_path):
    model, tokenizer, total, count = chat_model().eval(), byte_tokenizer(), 0.0, 0
    rows = [*conversations(3), {"messages": user("a") + assistant("a much longer answer")}]
    for row in rows:
        rendered = render_conversation(row["messages"], tokenizer)
        ids = torch.tensor([rendered["input_ids"]])
        labels = ids.masked_fill(torch.tensor([rendered["assistant_mask"]]) == 0, -100)
        tokens = int((labels != -100).sum())
        total, count = total + model(input_ids=ids, labels=labels).loss.item() * tokens, count + tokens
    found, said = run(tmp_path, rows, model=model, metric="loss", batch_size=3)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert sum(line["weight"] for line in said) == count
    low, high = found["loss_interval"]
    assert min(line["value"] for line in said) <= low < found["loss"] < high <= max(line["value"] for line in said)
    assert run(tmp_path, rows[:1], model=model, metric="loss")[0]["loss_interval"] is None  # of one row


def test_limit_takes_the_first_rows(tmp_path, monkeypatch):
    Parrot(monkeypatch, lambda prompt, temperature: " 1")
    assert run(tmp_path, conversations(5), metric="exact_match", limit=2)[0]["n"] == 2


@pytest.mark.parametrize(
    ("rows", "metric", "words"),
    [
        ([], "exact_match", "task figure has no rows"),
        ([{"messages": user("a")}], "exact_match", "row 1 has no reference"),
        (conversations(1), "pair_accuracy", "row 1 is not a pair"),
        (pairs(1), "loss", "row 1 is not a conversation"),
        ([{"completion": []}], "refusal", "row 1 has no messages and no prompt"),
        ([{"completion": []}], "format", "row 1 has no messages and no prompt"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, metric, words):
    with pytest.raises(ToolkitError, match=words):
        run(tmp_path, rows, metric=metric)


def test_each_row_is_sampled_by_a_seed_of_its_own(tmp_path):
    rows = [{"messages": user("the same"), "reference": "1"} for _ in range(6)]
    _, said = run(tmp_path, rows, metric="exact_match", temperatures=[1.0], batch_size=2)
    assert len({line["completion"] for line in said}) > 1
    assert {line["truncated"] for line in said} <= {True, False}


def test_each_temperature_is_sampled_by_a_seed_of_its_own(tmp_path):
    """One that changes no probability gives other answers."""
    task = {"metric": "format", "temperatures": [1.0, 1.00001], "max_new_tokens": 8}
    _, said = run(tmp_path, conversations(3), **task)
    answers = [[line["completion"] for line in said if line["decoding"] == name] for name in ("t1", "t1.00001")]
    assert len(answers[0]) == 3 and answers[0] != answers[1]


def test_a_recipe_of_tasks_made_in_python_is_that_of_their_keys():
    recipe = {**SECTIONS, "stage": "eval", "output_dir": "out"}
    keys = {"name": "figure", "metric": "refusal", "temperatures": [0.5]}
    assert EvalRecipe(**recipe, tasks=[EvalTask(**keys)]) == EvalRecipe(**recipe, tasks=[keys])


def test_names_of_decoding():
    assert [decoding_name(t) for t in (0.0, 1.0, 0.7)] == ["greedy", "t1", "t0.7"]


# --- batched answers --------------------------------------------------------------------------------------------------

SETTINGS = {"pad_token_id": 2, "eos_token_id": 1, "max_new_tokens": 8}


def prompts():
    tokenizer = byte_tokenizer()
    texts = ["a", "what is it", "and so", "b", "a rather longer question than the others"]
    return [render_conversation(user(text), tokenizer, add_generation_prompt=True)["input_ids"] for text in texts]


def test_answers_do_not_depend_on_the_batch():
    model = chat_model()
    alone = [generate_answers(model, [prompt], **SETTINGS)[0] for prompt in prompts()]
    assert generate_answers(model, prompts(), batch_size=2, **SETTINGS) == alone
    assert generate_answers(model, prompts(), batch_size=5, **SETTINGS) == alone
    assert model.training
    for prompt, answer in zip(prompts(), alone, strict=True):
        assert answer[0] == model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()


def test_sampling_is_seeded_apart_from_everything_else():
    model = chat_model()
    torch.manual_seed(0)
    first = generate_answers(model, prompts(), temperature=1.0, seeds=range(5), **SETTINGS)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == drawn
    assert generate_answers(model, prompts(), temperature=1.0, seeds=range(5), **SETTINGS) == first
    assert generate_answers(model, prompts(), temperature=1.0, seeds=range(5), batch_size=2, **SETTINGS) == first
    assert generate_answers(model, prompts()[3:], temperature=1.0, seeds=[3, 4], **SETTINGS) == first[3:]
    assert generate_answers(model, prompts(), temperature=1.0, seeds=range(8, 13), **SETTINGS) != first


def test_answers_are_those_of_generate_up_to_the_end_token():
    """Also where rows in the middle of the batch end and leave it while those around them go on."""
    model, tokens, asked = chat_model().eval(), 12, random_ids(12, 9, vocab=250).tolist()
    asked = [ids[: 3 + i % 5] for i, ids in enumerate(asked)]
    whole = [
        model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=None)[0, len(ids) :]
        for ids in asked
    ]
    ends = {int(answer[1 + i % 6]) for i, answer in enumerate(whole) if i % 2}
    wanted = []
    for answer in whole:
        first_end = next((i for i, token in enumerate(answer.tolist()) if token in ends), tokens)
        wanted.append(answer.tolist()[: first_end + 1])
    settings = {**SETTINGS, "max_new_tokens": tokens, "eos_token_id": ends}
    assert generate_answers(model, asked, **settings) == wanted
    assert len({len(answer) for answer in wanted}) > 3


def test_equal_prompts_are_read_once_and_sampled_apart():
    model, seen = chat_model(), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    settings = {**SETTINGS, "temperature": 1.0, "seeds": range(24), "batch_size": 32}
    answers = generate_answers(model, [p for p in prompts()[:3] for _ in range(8)], **settings)
    assert seen[:2] == [3, 24]
    assert len({tuple(answer) for answer in answers[:8]}) > 4


def test_sampling_follows_the_models_probabilities():
    logits = torch.tensor([[0.0, 1.0, 3.0]]).expand(20000, 3)
    torch.manual_seed(0)
    for drawn in (None, torch.rand(20000)):
        share = choose_tokens(logits, 2.0, drawn).bincount(minlength=3) / 20000
        torch.testing.assert_close(share, (logits[0] / 2).softmax(-1), atol=0.02, rtol=0)
    assert choose_tokens(logits[:3], 0.0).tolist() == [2, 2, 2]


def test_batches_are_by_length_and_complete():
    sequences = [[0] * n for n in (3, 9, 1, 7, 5)]
    assert list(by_length(sequences, 2)) == [[1, 3], [4, 0], [2]]
    assert list(by_length([[5], [4], [5], [4]], 2)) == [[1, 3], [0, 2]]
    ids, mask = pad_batch([[5, 6], [7]], 2, left=True)
    assert ids.tolist() == [[5, 6], [2, 7]] and mask.tolist() == [[1, 1], [0, 1]]


def test_scores_do_not_depend_on_the_batch():
    model = score_model()
    alone = [score_sequences(model, [p], pad_token_id=2)[0] for p in prompts()]
    assert score_sequences(model, prompts(), pad_token_id=2, batch_size=3) == pytest.approx(alone, abs=1e-5)


def test_an_answer_ends_where_it_goes_on_as_the_next_turn(tmp_path, monkeypatch):
    """A base model writes both sides of a conversation; what it says for the user is not its answer."""
    Parrot(monkeypatch, lambda prompt, temperature: " It is 1.\n\nUser: and 7?")
    found, said = run(tmp_path, conversations(2), metric="exact_match")
    assert found["greedy"] == 0.5 and [line["completion"] for line in said] == ["It is 1."] * 2
    found, said = run(tmp_path, conversations(2), metric="exact_match", stop=["is"])
    assert said[0]["completion"] == "It" and not said[0]["truncated"]
    with pytest.raises(ValueError, match="stop has no effect on loss"):
        run(tmp_path, conversations(2), metric="loss", stop=["is"])
