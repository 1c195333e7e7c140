"""Scores of the task files in eval/tasks/: this toolkit's rules as lm-eval's filters, which judge all answers of a task
at once. A task file names these functions. No torch.

A filter gets, for each row, the list of its answers, and returns a `Judged` for each.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from conversations.answers.many import Asked
from conversations.answers.rules import verify
from conversations.answers.verdict import Verdict, shown
from eval.judging import Judged, judged_by, whole_text

Row = Mapping[str, Any]


def _filter(rule: str, reference_of: Callable[[Row], Any]) -> Callable[[Any, Any], list[list[Judged]]]:
    def judge(resps: Sequence[Sequence[str]], docs: Sequence[Row]) -> list[list[Judged]]:
        asked = [
            Asked(text, reference=reference_of(doc)) for doc, texts in zip(docs, resps, strict=True) for text in texts
        ]
        judged = iter(judged_by(rule, asked))
        return [[next(judged) for _ in texts] for texts in resps]

    return judge


by_number = _filter("number", lambda doc: doc["answer"])
by_math = _filter("math", lambda doc: doc["answer"])
by_solution = _filter("math", lambda doc: doc["solution"])
by_tests = _filter("code", dict)
by_instructions = _filter("ifeval", dict)


def by_json(resps: Sequence[Sequence[str]], docs: Sequence[Row]) -> list[list[Judged]]:
    """Whether the first JSON object of an answer equals one of the row's `answers` (ESFT's intent recognition)."""
    return [[_same_json(text, doc["answers"]) for text in texts] for doc, texts in zip(docs, resps, strict=True)]


def _same_json(text: str, answers: Sequence[str]) -> Judged:
    found = _first_object(text)
    if found is None:
        return Judged(text, Verdict(0.0, "the answer holds no JSON object"), None)
    right = any(found == _first_object(answer) for answer in answers)
    reason = f"the object is {'' if right else 'not '}the reference {shown(answers[0])}"
    return Judged(text, Verdict(float(right), reason), json.dumps(found, ensure_ascii=False))


def _first_object(text: str) -> Any:
    """The first JSON object in a text; None if there is none."""
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        try:
            return decoder.raw_decode(text, place)[0]
        except (ValueError, RecursionError):
            place = text.find("{", place + 1)
    return None


def by_rouge(resps: Sequence[Sequence[str]], docs: Sequence[Row]) -> list[list[Judged]]:
    """ROUGE-L (F1) with the best of the row's `answers`; Chinese is compared by characters."""
    return [
        [_similar(text, doc["answers"], _rouge, "ROUGE-L") for text in texts]
        for doc, texts in zip(docs, resps, strict=True)
    ]


def by_chrf(resps: Sequence[Sequence[str]], docs: Sequence[Row]) -> list[list[Judged]]:
    """chrF (0 to 1) with the row's `answers`."""
    return [
        [_similar(text, doc["answers"], _chrf, "chrF") for text in texts]
        for doc, texts in zip(docs, resps, strict=True)
    ]


def _similar(text: str, answers: Sequence[str], measure: Callable[[str, str], float], name: str) -> Judged:
    score = max(measure(text.strip(), answer) for answer in answers)
    return Judged(text, Verdict(score, f"{name} {score:.3f}"), whole_text(Asked(text)))


class _Characters:
    """rouge_score's tokenizer interface: Chinese characters, and words of other scripts."""

    def tokenize(self, text: str) -> list[str]:
        import regex

        return regex.findall(r"\p{Han}|[^\W_]+", text.lower())


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Characters())


def _rouge(text: str, answer: str) -> float:
    return _rouge_scorer().score(answer, text)["rougeL"].fmeasure


def _chrf(text: str, answer: str) -> float:
    import sacrebleu

    return sacrebleu.sentence_chrf(text, [answer]).score / 100


def of_verdicts(doc: Row, results: Sequence[Sequence[Judged]]) -> dict[str, float]:
    """lm-eval's process_results: the mean score of a row's answers."""
    return {"acc": fmean(judged.verdict.score or 0.0 for judged in results[0])}


def of_instructions(doc: Row, results: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    """IFEval's four figures (Zhou et al. 2023): of prompts and of instructions, strict and loose."""
    count = len(doc["instruction_id_list"])
    strict, loose, inst_strict, inst_loose = (
        fmean(
            verify("ifeval", judged.text, reference=dict(doc), loose=loose, partial=partial).score or 0.0
            for judged in results[0]
        )
        for partial in (False, True)
        for loose in (False, True)
    )
    return {
        "prompt_level_strict_acc": strict,
        "prompt_level_loose_acc": loose,
        "inst_level_strict_acc": (inst_strict * count, count),
        "inst_level_loose_acc": (inst_loose * count, count),
    }


def share_of_instructions(values: Sequence[tuple[float, int]]) -> float:
    """lm-eval's aggregation of (followed, number of instructions) over prompts."""
    return sum(followed for followed, _ in values) / sum(count for _, count in values)


def chain_of_thought() -> list[dict[str, str]]:
    """The eight examples of Wei et al. (2022) for GSM8K, from lm-eval's own task file."""
    import yaml

    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    samples = yaml.safe_load(file.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
    return [{"question": one["question"], "answer": one["target"]} for one in samples]
