"""The model under evaluation, and its answers to the rows of a task."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversations import render_conversation
from conversations.answers.prompts import prompt_of, prompt_row
from conversations.environments.episodes import Players
from conversations.generation.generating import Decoding, Generated, generate_texts, padding_of, sample_ids, seed_of
from conversations.generation.sample_files import Place, Sample
from conversations.row import Message, Row
from deepseek_v2_modeling.inference import end_tokens
from eval.config import EvalTask, decoding_name

Numbered = Sequence[tuple[int, Row]]  # rows with their number in the task, from 0


@dataclass(frozen=True)
class Subject:
    """The model under evaluation.

    seed: of sampling, the same in all processes; each row derives its own seed from it.
    kept: samples of the interrupted evaluation that this one resumes.
    generated: the answers so far, by everything that they depend on, so that tasks on the same rows judge the same
        answers.
    players: of tasks in an environment, by the task's name.
    """

    model: Any
    tokenizer: Any
    seed: int
    run_dir: Path
    kept: Mapping[Place, Sample] = field(default_factory=dict)
    generated: dict[tuple[Any, ...], Generated] = field(default_factory=dict)
    players: dict[str, Players] = field(default_factory=dict)

    def players_of(self, task: EvalTask) -> Players:
        """The instances of the environment in which a task is answered."""
        assert task.environment is not None
        if task.name not in self.players:
            turns = task.max_tool_calling_iterations
            self.players[task.name] = Players(task.environment.load(), self.tokenizer, turns)
        return self.players[task.name]

    def close(self) -> None:
        for players in self.players.values():
            players.close()

    @property
    def pad_token_id(self) -> int:
        return padding_of(self.tokenizer)


def answers_to(task: EvalTask, rows: Numbered, subject: Subject, temperature: float) -> list[Generated]:
    """One answer per row: reused from this run or the interrupted one if possible, otherwise generated."""
    generated = subject.generated
    keys = [(temperature, task.max_new_tokens, *task.stop, number, _asked(task, row, number)) for number, row in rows]
    for key, (number, _) in zip(keys, rows, strict=True):
        sample = subject.kept.get((task.name, decoding_name(temperature), number))
        if sample and "tokens" in sample:
            acted = (sample.get("turns"), sample.get("environment_reward"))
            generated[key] = Generated(sample["completion"], not sample["truncated"], sample["tokens"], *acted)
    new = [place for place, key in enumerate(keys) if key not in generated]
    answer = _answered if task.environment is None else _acted
    answers = answer(task, [rows[place] for place in new], subject, temperature)
    generated |= {keys[place]: answer for place, answer in zip(new, answers, strict=True)}
    return [generated[key] for key in keys]


def _asked(task: EvalTask, row: Row, number: int) -> str:
    """Everything but the decoding that an answer depends on, as text."""
    if task.environment is None:
        return json.dumps(prompt_of(row, number + 1))
    place = task.environment.model_dump(mode="json")
    return json.dumps([prompt_row(row, number + 1), place, task.max_tool_calling_iterations])


def _answered(task: EvalTask, rows: Numbered, subject: Subject, temperature: float) -> list[Generated]:
    return generate_texts(
        subject.model,
        subject.tokenizer,
        [_ids(prompt_of(row, number + 1), subject) for number, row in rows],
        _seeds(rows, subject, temperature),
        temperature=temperature,
        max_new_tokens=task.max_new_tokens,
        batch_size=task.batch_size,
        stop=task.stop,
    )


def _acted(task: EvalTask, rows: Numbered, subject: Subject, temperature: float) -> list[Generated]:
    """Answers of several turns, as rl samples them; the last turn is the answer's text."""
    episodes = subject.players_of(task).begin([prompt_row(row, number + 1) for number, row in rows])
    answers = sample_ids(
        subject.model,
        subject.tokenizer,
        [_ids(prompt, subject) for prompt in episodes.prompts],
        _seeds(rows, subject, temperature),
        Decoding(temperature, task.max_new_tokens),
        task.batch_size,
        after_turn=episodes.after_turn,
    )
    episodes.finish(answers)
    rewards, ends = episodes.rewards() or [None] * len(answers), end_tokens(subject.model, subject.tokenizer)
    return [
        Generated(episode.turns[-1]["content"], ids[-1] in ends, len(ids), episode.turns, reward)
        for episode, ids, reward in zip(episodes.episodes, answers, rewards, strict=True)
    ]


def _ids(prompt: Sequence[Message], subject: Subject) -> list[int]:
    return render_conversation(prompt, subject.tokenizer, add_generation_prompt=True)["input_ids"]


def rendered_prompt(task: EvalTask, row: Row, number: int, subject: Subject) -> dict[str, str]:
    """A sample's `rendered`: the text that the model reads before its answer, control tokens included. Not in an
    environment, where each turn has its own."""
    if task.environment is not None:
        return {}
    ids = _ids(prompt_of(row, number + 1), subject)
    return {"rendered": subject.tokenizer.decode(ids, clean_up_tokenization_spaces=False)}


def _seeds(rows: Numbered, subject: Subject, temperature: float) -> list[int]:
    return [seed_of(subject.seed, number, f"{temperature:g}") for number, _ in rows]
