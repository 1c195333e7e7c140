"""Turns judged answers into the rows of pairs.jsonl, scored.jsonl and best.jsonl, and into results. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import fmean
from typing import Any

from conversations.answers.prompts import prompt_of
from conversations.formats.bad_row import BadRow, read_text
from conversations.rewards.base import Reward
from conversations.rewards.rule import RuleReward
from conversations.row import Row
from pairs.choosing import Judged, LeftOut, Pair, balanced, best_of, distinct, pairs_of
from pairs.config import BEST, PAIRS, SCORED, PairsRecipe

DIGITS = 6  # decimals of rewards: further ones may depend on the batch

OTHERS = ("truncated", "unjudged", "unreadable", "duplicates")  # kinds of answers that are written to no file

Sample = Mapping[str, Any]


def verifiers_of(rewards: Sequence[Reward]) -> list[str]:
    """The names of the rules that decide whether an answer is right: those that need a reference, or all if none
    does."""
    rules = [reward for reward in rewards if isinstance(reward, RuleReward)]
    return [rule.name for rule in [rule for rule in rules if rule.needs_reference] or rules]


def is_readable(text: str) -> bool:
    """Whether a data file may contain the text: a model can also produce NUL characters and lone surrogates."""
    try:
        read_text(text, "answer")
    except BadRow:
        return False
    return True


def total_of(values: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the rewards that have a value; None if none has."""
    terms = [weights[name] * value for name, value in values.items() if value is not None]
    return round(sum(terms), DIGITS) if terms else None


@dataclass(frozen=True)
class Group:
    """The answers to one prompt.

    Args:
        answers: the distinct answers that were judged, are not truncated, and can be read back; only these are written
            to files. In training, a truncated answer would get an end token that the model never produced.
        truncated, unjudged, unreadable, duplicates: the numbers of other answers.
        right: for each answer that a verifier judged, whether it is right.
    """

    row: int
    answers: list[Judged]
    truncated: int
    unjudged: int
    unreadable: int
    duplicates: int
    right: list[bool]


def group_of(samples: Sequence[Sample], weights: Mapping[str, float], verifiers: Sequence[str]) -> Group:
    """The group of one prompt's samples. A reward applies to a prompt if it has a value for any of its answers. An
    answer that lacks a value from one of these rewards counts as unjudged, since sums over different rewards are not
    comparable."""
    applied = [name for name in weights if any(sample["rewards"][name] is not None for sample in samples)]
    judged: list[Judged] = []
    for sample in samples:
        verdicts = [sample["rewards"][name] for name in verifiers if name in applied]
        right = all(value == 1 for value in verdicts) if verdicts else None
        if applied and all(sample["rewards"][name] is not None for name in applied):
            judged.append(Judged(sample["row"], sample["answer"], sample["completion"], sample["reward"], right))
    truncated = {sample["answer"] for sample in samples if sample["truncated"]}
    complete = [each for each in judged if each.answer not in truncated]
    readable = [each for each in complete if is_readable(each.text)]
    answers = distinct(readable)
    return Group(
        row=samples[0]["row"],
        answers=answers,
        truncated=len(truncated),
        unjudged=len(samples) - len(truncated) - len(complete),
        unreadable=len(complete) - len(readable),
        duplicates=len(readable) - len(answers),
        right=[each.right for each in judged if each.right is not None],
    )


def preference_data(
    recipe: PairsRecipe,
    rows: Sequence[Row],
    samples: Sequence[Sample],
    weights: Mapping[str, float],
    verifiers: Sequence[str],
) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """The rows of each file, by file name, and the contents of results.json.

    Args:
        samples: the judged answers, sorted by row and answer.
        weights: the weights of the rewards, by name.
        verifiers: the rewards that decide whether an answer is right.

    Returns:
        results holds the numbers of prompts, of answers, and of answers in no file (truncated, unjudged, unreadable,
        duplicates); of prompts with all_right and all_wrong answers (None without verifiers) and of usable prompts,
        which have a better and a worse answer; of pairs, scored and best rows; left_out, the pairs left out by reason;
        chosen_longer, the fraction of pairs of unequal length whose chosen answer is the longer one; and by_verifier,
        {n, mean} of each reward.
    """
    groups = [
        group_of(list(of_row), weights, verifiers) for _, of_row in groupby(samples, lambda sample: sample["row"])
    ]
    left_out = LeftOut()
    limits: dict[str, Any] = {
        "most": recipe.max_pairs_per_prompt,
        "min_margin": recipe.min_margin,
        "left_out": left_out,
    }
    pairs = [pair for group in groups for pair in pairs_of(group.answers, seed=f"{recipe.seed} {group.row}", **limits)]
    pairs = _without_duplicates(pairs, rows, left_out)
    pairs = balanced(pairs, left_out) if recipe.balance_lengths else pairs
    scored = [each for group in groups for each in group.answers]
    best = [each for group in groups if (each := best_of(group.answers)) and each.text]
    by_place = {(sample["row"], sample["answer"]): sample for sample in samples}
    files = {
        PAIRS: [_pair_row(recipe, pair, rows, by_place) for pair in pairs],
        SCORED: [_scored_row(recipe, each, rows, by_place) for each in scored],
        BEST: [_best_row(recipe, each, rows, by_place) for each in best],
    }
    unequal = [pair for pair in pairs if pair.longer]
    results = {
        "prompts": len(rows),
        "answers": len(samples),
        **{name: sum(getattr(group, name) for group in groups) for name in OTHERS},
        "all_right": sum(bool(group.right) and all(group.right) for group in groups) if verifiers else None,
        "all_wrong": sum(bool(group.right) and not any(group.right) for group in groups) if verifiers else None,
        "usable": sum(len({each.reward for each in group.answers}) > 1 for group in groups),
        "pairs": len(pairs),
        "scored": len(scored),
        "best": len(best),
        "left_out": asdict(left_out),
        "chosen_longer": sum(pair.longer > 0 for pair in unequal) / len(unequal) if unequal else None,
        "by_verifier": {name: _spread(samples, name) for name in weights},
    }
    return files, results


def _without_duplicates(pairs: Sequence[Pair], rows: Sequence[Row], left_out: LeftOut) -> list[Pair]:
    """Drop repeated pairs, which occur if a prompt is in the data twice."""
    seen = {}
    for pair in pairs:
        prompt = tuple((turn["role"], turn["content"]) for turn in _prompt(rows, pair.chosen))
        seen.setdefault((prompt, pair.chosen.text, pair.rejected.text), pair)
    left_out.duplicates += len(pairs) - len(seen)
    return list(seen.values())


def _spread(samples: Sequence[Sample], name: str) -> dict[str, Any]:
    values = [value for sample in samples if (value := sample["rewards"][name]) is not None]
    return {"n": len(values), "mean": round(fmean(values), DIGITS) if values else None}


def _prompt(rows: Sequence[Row], judged: Judged) -> list[Row]:
    turns = prompt_of(rows[judged.row], judged.row + 1)
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _answer_turn(judged: Judged) -> list[Row]:
    return [{"role": "assistant", "content": judged.text}]


def _meta(recipe: PairsRecipe, answers: Sequence[Judged], verdicts: Any, rows: Sequence[Row]) -> dict[str, Any]:
    row = answers[0].row
    sampling = {
        "seed": recipe.seed,
        "temperature": recipe.temperature,
        "row": row,
        "answers": [each.answer for each in answers],
    }
    return {**(rows[row].get("meta") or {}), "verdicts": verdicts, "sampling": sampling}


def _verdicts(sample: Sample) -> dict[str, Any]:
    """{name of the reward: {score, reason}}"""
    return {
        name: {"score": value, **({"reason": sample["reasons"][name]} if name in sample["reasons"] else {})}
        for name, value in sample["rewards"].items()
    }


def _pair_row(recipe: PairsRecipe, pair: Pair, rows: Sequence[Row], samples: Mapping[Any, Sample]) -> Row:
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    verdicts = {side: _verdicts(samples[each.row, each.answer]) for side, each in sides.items()}
    return {
        "prompt": _prompt(rows, pair.chosen),
        "chosen": _answer_turn(pair.chosen),
        "rejected": _answer_turn(pair.rejected),
        "margin": round(pair.margin, DIGITS),
        "meta": _meta(recipe, list(sides.values()), verdicts, rows),
    }


def _scored_row(recipe: PairsRecipe, judged: Judged, rows: Sequence[Row], samples: Mapping[Any, Sample]) -> Row:
    meta = _meta(recipe, [judged], _verdicts(samples[judged.row, judged.answer]), rows)
    return {"prompt": _prompt(rows, judged), "completion": _answer_turn(judged), "score": judged.reward, "meta": meta}


def _best_row(recipe: PairsRecipe, judged: Judged, rows: Sequence[Row], samples: Mapping[Any, Sample]) -> Row:
    meta = _meta(recipe, [judged], _verdicts(samples[judged.row, judged.answer]), rows)
    return {"messages": [*_prompt(rows, judged), *_answer_turn(judged)], "meta": meta}
