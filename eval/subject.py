"""The model under evaluation, and its answers to the rows of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversations import render_conversation
from conversations.answers.prompts import prompt_of
from conversations.generation.generating import Generated, generate_texts, padding_of, seed_of
from conversations.generation.sample_files import Place, Sample
from conversations.row import Row
from eval.config import EvalTask, decoding_name

Numbered = Sequence[tuple[int, Row]]  # rows with their number in the task, from 0


@dataclass(frozen=True)
class Subject:
    """The model under evaluation.

    seed: of sampling, the same in all processes; each row derives its own seed from it.
    kept: samples of the interrupted evaluation that this one resumes.
    generated: the answers so far, by everything that they depend on, so that tasks on the same rows judge the same
        answers.
    """

    model: Any
    tokenizer: Any
    seed: int
    run_dir: Path
    kept: Mapping[Place, Sample] = field(default_factory=dict)
    generated: dict[tuple[Any, ...], Generated] = field(default_factory=dict)

    @property
    def pad_token_id(self) -> int:
        return padding_of(self.tokenizer)


def answers_to(task: EvalTask, rows: Numbered, subject: Subject, temperature: float) -> list[Generated]:
    """One answer per row: reused from this run or the interrupted one if possible, otherwise generated."""
    prompts = [
        render_conversation(prompt_of(row, number + 1), subject.tokenizer, add_generation_prompt=True)["input_ids"]
        for number, row in rows
    ]
    generated = subject.generated
    keys = [
        (temperature, task.max_new_tokens, *task.stop, number, *ids)
        for (number, _), ids in zip(rows, prompts, strict=True)
    ]
    for key, (number, _) in zip(keys, rows, strict=True):
        sample = subject.kept.get((task.name, decoding_name(temperature), number))
        if sample and "tokens" in sample:
            generated[key] = Generated(sample["completion"], not sample["truncated"], sample["tokens"])
    new = [place for place, key in enumerate(keys) if key not in generated]
    answers = generate_texts(
        subject.model,
        subject.tokenizer,
        [prompts[place] for place in new],
        [seed_of(subject.seed, rows[place][0], f"{temperature:g}") for place in new],
        temperature=temperature,
        max_new_tokens=task.max_new_tokens,
        batch_size=task.batch_size,
        stop=task.stop,
    )
    generated |= {keys[place]: answer for place, answer in zip(new, answers, strict=True)}
    return [generated[key] for key in keys]
