"""Training on preferences: losses and gradients are the papers', the reference is computed once, runs resume exactly.

The formulas are written out answer by answer from the log-probabilities of the plain model.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from conversations.rendering.answer_fitting import cut
from conversations.rendering.lengths import LengthReport
from conversations.row_cache import RowCache
from conversations.sections import DataSource
from deepseek_v2_modeling.loading import LoraSettings, prepare_trainable, resolve_source
from recipes.data.sources import read_sources
from rl.config import RlRecipe
from rl.preferences.data import AnswerFit, PairCollator, SingleCollator, encode_preferences
from rl.preferences.methods import METHODS
from rl.preferences.stage import build_trainer, probes_of, train

from ..helpers.stages import (
    SECTIONS,
    assert_same_weights,
    assistant,
    byte_tokenizer,
    chat_model,
    lines,
    pairs,
    stopped_after,
    user,
)

ROWS = [{**row, "rejected": assistant("no, " + "x" * (i % 7))} for i, row in enumerate(pairs(8))]
LORA = LoraSettings(("attention", "experts"), 4, 8)
Logps = list[torch.Tensor]


def recipe(folder: Path, method: str, **training: Any) -> RlRecipe:
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "max_length": 64, **training}
    return RlRecipe(**{**SECTIONS, "stage": "rl", "method": method, "output_dir": str(folder), "training": settings})


def run(
    folder: Path, method: str, model: Any = None, resume_from: Path | None = None, **training: Any
) -> dict[str, Any]:
    given: dict[str, Any] = {"rows": ROWS, "eval_rows": None, "run_dir": folder, "resume_from": resume_from}
    return train(recipe(folder, method, **training), model=model or chat_model(), tokenizer=byte_tokenizer(), **given)


def trainer_for(
    folder: Path, method: str, model: Any, cache: RowCache | None = None, eval_rows: Any = None, **training: Any
) -> Any:
    given: dict[str, Any] = {"rows": ROWS, "eval_rows": eval_rows, "run_dir": folder, "cache": cache}
    return build_trainer(recipe(folder, method, **training), model=model, tokenizer=byte_tokenizer(), **given)[0]


def adapter(folder: Path) -> Any:
    """A model with an adapter that does something, as an SFT run leaves it."""
    chat_model(seed=3).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    model = prepare_trainable(resolve_source(folder / "base"), lora=LORA, merge_dir=folder / "merged")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


# --- the papers' losses -----------------------------------------------------------------------------------------------
# policy, reference: each answer's tokens' log-probabilities, B chosen and then B rejected answers.


def dpo(policy: Logps, reference: Logps) -> torch.Tensor:
    """Rafailov et al., eq. 7, beta 0.1."""
    ratios = [(p - r).sum() for p, r in zip(policy, reference, strict=True)]
    half = len(ratios) // 2
    return sum(-logsigmoid(0.1 * (good - bad)) for good, bad in zip(ratios[:half], ratios[half:], strict=True)) / half


def ipo(policy: Logps, reference: Logps) -> torch.Tensor:
    """Azar et al., eq. 17, tau 0.1, each answer's log-ratio divided by its length, as its authors have done."""
    ratios = [(p - r).mean() for p, r in zip(policy, reference, strict=True)]
    half = len(ratios) // 2
    return sum((good - bad - 1 / 0.2) ** 2 for good, bad in zip(ratios[:half], ratios[half:], strict=True)) / half


def simpo(policy: Logps, reference: Logps) -> torch.Tensor:
    """Meng et al., eq. 6, beta 2 and gamma 1: no reference."""
    means = [p.mean() for p in policy]
    half = len(means) // 2
    return sum(-logsigmoid(2 * (good - bad) - 1) for good, bad in zip(means[:half], means[half:], strict=True)) / half


def orpo(policy: Logps, reference: Logps) -> torch.Tensor:
    """Hong et al., eq. 6 and 7, lambda 0.1, without its language-model loss."""
    odds = [p.mean().exp() / (1 - p.mean().exp()) for p in policy]
    half = len(odds) // 2
    return sum(-0.1 * logsigmoid((good / bad).log()) for good, bad in zip(odds[:half], odds[half:], strict=True)) / half


def token_logps(model: Any, ids: list[int]) -> torch.Tensor:
    """[tokens - 1], of each token from the second on."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def answers_of(batch: dict[str, torch.Tensor], prefix: str = "") -> list[tuple[list[int], torch.Tensor]]:
    """(ids, which of them from the second on are the answer's), of each row."""
    ids, mask, trained = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask"))
    return [(i[m == 1].tolist(), t[m == 1][1:].bool()) for i, m, t in zip(ids, mask, trained, strict=True)]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def moved(folder: Path, method: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A trainer whose policy is no longer its reference, the reference, and a batch."""
    start = chat_model(aux_loss_alpha=0.0)
    trainer = trainer_for(folder, method, copy.deepcopy(start))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    trainer.current_gradient_accumulation_steps = 1
    return trainer, start, next(iter(trainer.get_train_dataloader()))


def assert_same(trainer: Any, batch: Any, loss: torch.Tensor) -> None:
    loss.backward()
    wanted = gradients(trainer.model)
    ours = trainer.compute_loss(trainer.model, batch)
    ours.backward()
    found = gradients(trainer.model)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5) and wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("method", ["dpo", "ipo", "simpo", "orpo"])
def test_loss_and_gradient_of_pairs_are_the_papers(method: str, tmp_path: Path) -> None:
    trainer, start, batch = moved(tmp_path, method)
    rows = answers_of(batch)
    assert len(rows) == 8 and len({len(ids) for ids, _ in rows}) > 1
    with torch.no_grad():
        reference = [token_logps(start, ids)[answer] for ids, answer in rows]
    whole = [token_logps(trainer.model, ids) for ids, _ in rows]
    policy = [logps[answer] for logps, (_, answer) in zip(whole, rows, strict=True)]
    loss = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo}[method](policy, reference)
    if method == "orpo":  # its language-model loss: the mean over all tokens of the chosen rows
        loss = loss - torch.cat(whole[:4]).mean()
    assert_same(trainer, batch, loss)


@pytest.mark.parametrize("method", ["dpo", "simpo", "orpo", "kto"])
def test_the_prompt_of_a_pair_is_read_once(method: str, tmp_path: Path) -> None:
    """But not by ORPO, whose language-model loss takes it, nor of KTO's single answers."""
    trainer, _, batch = moved(tmp_path, method)
    read: list[int] = []
    trainer.model.model.embed_tokens.register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    trainer.compute_loss(trainer.model, batch)
    real = batch["attention_mask"].bool()
    prompts = real[:, : int(batch["completion_mask"].any(0).int().argmax())].sum(-1)
    once = int((prompts[: len(prompts) // 2] - 1).sum())  # but for their last tokens, which predict the answers' first
    assert once > 20 and read[0] == int(real.sum()) - (once if method in ("dpo", "simpo") else 0)


def test_loss_and_gradient_of_kto_are_the_papers(tmp_path: Path) -> None:
    """Ethayarajh et al., eq. 8: sigmoid(beta (r - z)) for good answers, sigmoid(beta (z - r)) for bad ones, where z is
    the mean log-ratio of answers to other prompts, at least 0 and without gradient."""
    trainer, start, batch = moved(tmp_path, "kto")

    def ratios(rows: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            of_start = [token_logps(start, ids)[answer].sum() for ids, answer in rows]
        policy = [token_logps(trainer.model, ids)[answer].sum() for ids, answer in rows]
        return [p - r for p, r in zip(policy, of_start, strict=True)]

    z = torch.stack(ratios(answers_of(batch, "KL_"))).mean().clamp(min=0).detach()
    signs = [1 if good else -1 for good in batch["label"]]
    each = [1 - (0.1 * sign * (r - z)).sigmoid() for sign, r in zip(signs, ratios(answers_of(batch)), strict=True)]
    assert {-1, 1} == set(signs)
    assert_same(trainer, batch, sum(each) / len(each))


def test_kto_joins_each_prompt_with_the_answer_before_it() -> None:
    rows = [
        {"input_ids": [1, 2, 10 + i, 20 + i], "labels": [-100, -100, 10 + i, 20 + i], "label": True} for i in range(3)
    ]
    batch = SingleCollator(0)(rows)
    assert batch["KL_input_ids"].tolist() == [[1, 2, 12, 22], [1, 2, 10, 20], [1, 2, 11, 21]]
    assert batch["KL_completion_mask"].tolist() == [[0, 0, 1, 1]] * 3
    assert SingleCollator(0, max_length=3)(rows)["KL_input_ids"].shape == (3, 3)


def test_kto_joins_no_prompt_with_an_answer_to_it(tmp_path: Path) -> None:
    """Such answers are what the policy is trained on, and would be mistaken for how far it has moved elsewhere."""
    rows = [
        {"input_ids": [1, 2 + i // 2, 10 + i], "labels": [-100, -100, 10 + i], "label": i % 2 == 0} for i in range(6)
    ]
    assert SingleCollator(0)(rows)["KL_input_ids"][:, 2].tolist() == [14, 15, 10, 11, 12, 13]
    assert SingleCollator(0)(rows[:1])["KL_input_ids"][:, 2].tolist() == [10]  # there is no other
    answers = ({"chosen": assistant(f"yes {i}"), "rejected": assistant(f"no {i}")} for i in range(4))
    held_out = [{**row, **own} for row, own in zip(ROWS, answers, strict=False)]
    trainer = trainer_for(tmp_path, "kto", chat_model(), eval_rows=held_out, per_device_eval_batch_size=4)
    known = {tuple(row["input_ids"]) for row in trainer.eval_dataset}
    batches = list(trainer.get_eval_dataloader())
    assert [len(batch["label"]) for batch in batches] == [4, 4] and len(known) == 8
    assert not [ids for batch in batches for ids, _ in answers_of(batch, "KL_") if tuple(ids) in known]


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["full", "adapter"])
def test_the_first_loss_is_ln_2(of: str, tmp_path: Path) -> None:
    """Whatever is in a batch: the reference saw other batches."""
    model = adapter(tmp_path) if of == "adapter" else chat_model()
    run(tmp_path / "run", "dpo", model, max_steps=2, learning_rate=1e-12, per_device_train_batch_size=3)
    logged = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["task_loss"] for line in logged] == pytest.approx([torch.log(torch.tensor(2.0)).item()] * 2, abs=1e-6)
    assert all(line["balance/expert"] > 0 and line["loss"] > line["task_loss"] for line in logged)
    if of == "adapter":
        assert set(model.peft_config) == {"default"}  # no second copy in memory


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_reference_is_computed_once(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RowCache(tmp_path / "cache")
    first = trainer_for(tmp_path / "a", method, chat_model(), cache)
    calls: list[int] = []
    cls = type(first)
    scored = cls.compute_ref_log_probs
    monkeypatch.setattr(cls, "compute_ref_log_probs", lambda *args: calls.append(1) or scored(*args))
    again = trainer_for(tmp_path / "b", method, chat_model(), cache)
    assert not calls
    name = again.reference_columns[0]
    assert first.train_dataset[name] == again.train_dataset[name]
    trainer_for(tmp_path / "c", method, chat_model(seed=1), cache)
    assert calls  # another model has other ones


@pytest.mark.parametrize("collator", [PairCollator(0), SingleCollator(0)])
def test_a_reference_keeps_its_digits(collator: Any) -> None:
    """Sums over long answers differ from the policy's by less than float32 has room for, in the first steps."""
    exact = -1234.56789012345
    row = {f"{key}{what}": [1, 2] for key in ("chosen_", "rejected_", "input_") for what in ("ids", "labels")}
    row |= {f"ref_{name}logps": exact for name in ("chosen_", "rejected_", "", "KL_")}
    batch = collator([{**row, "labels": [-100, 2], "label": True}])
    kept = {name: value.tolist() for name, value in batch.items() if name.startswith("ref_")}
    assert len(kept) == 2 and all(values == [exact] for values in kept.values())


def test_a_reference_belongs_to_its_rows_in_any_order(tmp_path: Path) -> None:
    """Those of KTO are shuffled."""
    start = chat_model()
    trainer = trainer_for(tmp_path, "kto", start)
    ids = [row["input_ids"] for row in trainer.train_dataset]
    assert len({tuple(one) for one in ids}) == 16
    for row in trainer.train_dataset:
        logps = token_logps(start, row["input_ids"])[torch.tensor(row["labels"][1:]) != -100].sum()
        assert row["ref_logps"] == pytest.approx(logps.item(), abs=1e-3)


def test_held_out_answers_are_joined_for_the_reference_as_in_evaluation(tmp_path: Path) -> None:
    """KTO's KL rows depend on the batch, which evaluation has another size of."""
    start = chat_model()
    trainer = trainer_for(tmp_path, "kto", start, eval_rows=ROWS[:5], per_device_eval_batch_size=3)
    for batch in trainer.get_eval_dataloader():
        for prefix in ("", "KL_"):
            logps = [token_logps(start, ids)[answer].sum().item() for ids, answer in answers_of(batch, prefix)]
            assert batch[f"ref_{prefix}logps"].tolist() == pytest.approx(logps, abs=1e-3)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_only_the_answer_is_trained_of_a_conversation() -> None:
    """Not the assistant's turns in the prompt; the turns that belong to a chosen conversation are, not the user's."""
    prompt = user("a") + assistant("first") + user("b")
    row = {"prompt": prompt, "chosen": assistant("yes") + user("c") + assistant("more"), "rejected": assistant("no")}
    tokenizer = byte_tokenizer()
    report = LengthReport()
    chosen, rejected = AnswerFit(tokenizer, None).trained(row, {}, report)
    said = [tokenizer.decode([i for i, m in zip(*piece, strict=True) if m]) for piece in (chosen, rejected)]
    assert said == [" yes<eos> more<eos>", " no<eos>"]
    limit = 12
    fitted = AnswerFit(tokenizer, limit).trained(row, {}, report)
    assert report.truncated == 1
    for (ids, mask), whole in zip(fitted, (chosen, rejected), strict=True):
        assert len(ids) == len(mask) <= limit
        start = whole[1].index(1)
        assert (ids, mask) == (cut(whole[0], start, limit), cut(whole[1], start, limit))


def test_encoded_preferences_are_found_again_and_made_anew_for_whatever_they_depend_on(tmp_path: Path) -> None:
    cache, path = RowCache(tmp_path / "prepared", "1"), tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    rows = read_sources([DataSource(path=str(path))], 0, cache=cache).rows
    form: dict[str, Any] = {"tokenizer": byte_tokenizer(), "single": False, "max_length": 38, "too_long": "truncate"}

    def found(**changes: Any) -> Any:
        encoded = encode_preferences(rows, **form | changes, cache=cache)
        plain = encode_preferences(rows, **form | changes)
        assert encoded.data.to_list() == plain.data.to_list() and encoded.report == plain.report
        return encoded.entry.hit

    other = byte_tokenizer()
    other.add_tokens(["gladly"])
    for changes in ({}, {"single": True}, {"max_length": 37}, {"too_long": "drop"}, {"tokenizer": other}):
        assert [found(**changes), found(**changes)] == [False, True]


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_resume_gives_the_same_weights_and_lines(method: str, tmp_path: Path) -> None:
    model = adapter(tmp_path) if method in ("dpo", "orpo") else chat_model()
    start = copy.deepcopy(model)
    whole = run(tmp_path / "a", method, model, save_steps=2)
    resumed = copy.deepcopy(start)
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-2", tmp_path / "b")
    again = run(tmp_path / "b", method, resumed, resume_from=checkpoint, save_steps=2)
    assert_same_weights(model, resumed)
    assert whole["tokens"] == again["tokens"] > 0 and whole["steps"] == 4
    both = [[line for line in lines(tmp_path / name / "metrics.jsonl") if "loss" in line] for name in "ab"]
    assert both[0] == both[1] and len(both[0]) == 4
    assert both[0][-1]["num_tokens"] == whole["tokens"]
    assert lines(tmp_path / "a" / "samples.jsonl") == lines(tmp_path / "b" / "samples.jsonl")


def test_probes_are_the_first_different_prompts_with_a_good_answer() -> None:
    rows = [*ROWS[:2], ROWS[0], {"prompt": user("x"), "completion": assistant("bad"), "label": False}]
    rows += [{"prompt": user("y"), "completion": assistant("good"), "label": True}, *pairs(9)]
    found = probes_of(rows)
    assert [prompt[0]["content"] for prompt, _ in found] == ["ask 0", "ask 1", "x", "y", "ask 2", "ask 3"]
    assert [good for _, good in found] == ["yes, gladly", "yes, gladly", None, "good", "yes, gladly", "yes, gladly"]


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    for method in ("dpo", "simpo"):
        settings = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
        run(tmp_path / f"{method}1", method, **settings)
        parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        run(tmp_path / f"{method}2", method, **settings, **parts)
        one, other = (lines(tmp_path / f"{method}{n}" / "metrics.jsonl")[0] for n in (1, 2))
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)
