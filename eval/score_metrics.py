"""Metrics that generate nothing: of a reward model's scores, and of the loss on given answers."""

from collections.abc import Iterator, Sequence

from conversations import render_conversation
from conversations.answers.combining import COMBINE
from conversations.answers.judging import judge
from conversations.answers.prompts import prompt_text
from conversations.generation.sample_files import Sample
from conversations.row import RANKED, VERDICTS, Row, answers_of
from deepseek_v2_modeling.inference import score_heads, token_losses
from eval.config import EvalTask
from eval.figures import LOSS
from eval.subject import Numbered, Subject

UNSAMPLED = "value"


def pair_accuracy(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """1 if the reward model scores the chosen answer higher than the rejected one."""

    def scorer(conversations: Sequence[tuple[list[Row], list[Row]]]) -> list[float]:
        ids = [render_conversation([*p, *a], subject.tokenizer)["input_ids"] for p, a in conversations]
        return _scores(task, subject, ids)

    verdicts = judge(scorer, [row for _, row in rows])
    yield [
        {
            "row": number,
            "decoding": UNSAMPLED,
            "prompt": prompt_text(row["prompt"]),
            "chosen": prompt_text(row["chosen"]),
            "rejected": prompt_text(row["rejected"]),
            "scores": list(verdict.scores),
            "value": verdict.value,
            **({"meta": row["meta"]} if row.get("meta") else {}),
        }
        for (number, row), verdict in zip(rows, verdicts, strict=True)
    ]


def reward(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """The scores and lengths in tokens of a row's answers, with the row's verdict (see eval/agreement.py)."""
    answers = [(place, answer) for place, (_, row) in enumerate(rows) for answer in answers_of(row)]
    prompts = [
        len(render_conversation(row["prompt"], subject.tokenizer, add_generation_prompt=True)["input_ids"])
        for _, row in rows
    ]
    ids = [
        render_conversation([*rows[place][1]["prompt"], *answer], subject.tokenizer)["input_ids"]
        for place, answer in answers
    ]
    scores = _scores(task, subject, ids)
    scored: list[list[tuple[float, int, str]]] = [[] for _ in rows]
    for (place, answer), tokens, score in zip(answers, ids, scores, strict=True):
        scored[place].append((score, len(tokens) - prompts[place], prompt_text(answer)))
    yield [_scored_sample(number, row, judged) for (number, row), judged in zip(rows, scored, strict=True)]


def _scores(task: EvalTask, subject: Subject, ids: Sequence[Sequence[int]]) -> list[float]:
    heads = score_heads(subject.model, ids, pad_token_id=subject.pad_token_id, batch_size=2 * task.batch_size)
    return [COMBINE[task.combine](scores) for scores in heads]


def _scored_sample(number: int, row: Row, scored: Sequence[tuple[float, int, str]]) -> Sample:
    scores, lengths, answers = (list(column) for column in zip(*scored, strict=True))
    verdict = {key: row[key] for key in VERDICTS if key in row} or {"right": len(row.get(RANKED[1], [None]))}
    return {
        "row": number,
        "decoding": UNSAMPLED,
        "prompt": prompt_text(row["prompt"]),
        "answers": answers,
        "scores": scores,
        "lengths": lengths,
        **verdict,
        **({"meta": row["meta"]} if row.get("meta") else {}),
    }


def loss(task: EvalTask, rows: Numbered, subject: Subject) -> Iterator[list[Sample]]:
    """The mean cross-entropy over a row's trained assistant tokens, in nats; `weight` is their number."""
    rendered = [render_conversation(row["messages"], subject.tokenizer) for _, row in rows]
    losses = token_losses(
        subject.model,
        [r["input_ids"] for r in rendered],
        [r["assistant_mask"] for r in rendered],
        pad_token_id=subject.pad_token_id,
        batch_size=task.batch_size,
    )
    yield [
        {"row": number, "decoding": LOSS, "value": total / max(1, tokens), "weight": tokens}
        for (number, _), (total, tokens) in zip(rows, losses, strict=True)
    ]
