"""The model's side of open-ended conversations: a turn of all questions at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conversations import render_conversation
from conversations.answers.prompts import answer_text
from conversations.errors import ToolkitError
from conversations.generation.generating import Decoding, Generated, seed_of
from conversations.row import Message
from eval.harness.crew import AnswerRequest, Crew
from eval.open_ended.entry import OpenTask
from eval.open_ended.questions import Question

# MT-Bench's temperatures (FastChat, llm_judge/common.py); its Chinese version has categories such as zh_writing.
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}


@dataclass(frozen=True)
class Exchange:
    """One answer. number: of its question. turn: from 0. prompt: the conversation before it."""

    number: int
    turn: int
    question: Question
    prompt: list[Message]
    answer: Generated

    @property
    def opponent(self) -> list[Message]:
        """The baseline's side of the conversation up to this turn."""
        return dialogue(self.question.turns, [said.text for said in self.question.opponent[: self.turn + 1]])

    @property
    def opponent_finished(self) -> bool:
        return self.question.opponent[self.turn].finished

    @property
    def own(self) -> list[Message]:
        """The conversation with the answer."""
        return [*self.prompt, {"role": "assistant", "content": self.answer.text}]


def dialogue(turns: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """A conversation of these turns, each with its answer."""
    return [
        {"role": role, "content": content}
        for turn, answer in zip(turns, answers, strict=False)
        for role, content in (("user", turn), ("assistant", answer))
    ]


def converse(task: OpenTask, questions: Sequence[Question], crew: Crew, seed: int) -> list[Exchange]:
    """All answers, by question and turn. A sampled answer depends on the seed, its question's number and its turn."""
    crew.batch_size = task.batch_size
    held: list[list[Exchange]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        open_ = [number for number, question in enumerate(questions) if turn < len(question.turns)]
        prompts = {number: _prompt(questions[number], held[number], turn) for number in open_}
        asked = [_request(task, questions[number], prompts[number], crew.tokenizer, seed, number) for number in open_]
        for number, answer in zip(open_, crew.answers(asked), strict=True):
            answer = answer._replace(text=answer_text(answer.text))
            held[number].append(Exchange(number, turn, questions[number], prompts[number], answer))
    return [exchange for exchanges in held for exchange in exchanges]


def _prompt(question: Question, before: Sequence[Exchange], turn: int) -> list[Message]:
    said = before[-1].own if before else []
    return [*said, {"role": "user", "content": question.turns[turn]}]


def _request(
    task: OpenTask, question: Question, prompt: list[Message], tokenizer: Any, seed: int, number: int
) -> AnswerRequest:
    ids = render_conversation(prompt, tokenizer, add_generation_prompt=True)["input_ids"]
    temperature = temperature_of(task, question)
    own_seed = seed_of(seed, number, f"{temperature:g}", "turn", len(prompt) // 2)
    return AnswerRequest(tuple(ids), own_seed, Decoding(temperature, task.max_new_tokens, tuple(task.stop)))


def temperature_of(task: OpenTask, question: Question) -> float:
    if task.temperature is not None:
        return task.temperature
    return _TEMPERATURES.get((question.category or "").removeprefix("zh_"), 0.0)


def check_positions(task: OpenTask, questions: Sequence[Question], tokenizer: Any, positions: int) -> None:
    """Raise ToolkitError for the first conversation that exceeds the model's positions if its answers are long."""
    for question in questions:
        asked: list[Message] = dialogue(question.turns, [""] * len(question.turns))[:-1]
        tokens = len(render_conversation(asked, tokenizer, add_generation_prompt=True)["input_ids"])
        answers = len(question.turns) * task.max_new_tokens
        if tokens + answers > positions:
            raise ToolkitError(
                f"{question.place}: its {len(question.turns)} turns of {tokens:,} tokens and answers of {answers:,} "
                f"(max_new_tokens, each) are more than the {positions:,} positions of the model "
                "(max_position_embeddings); lower max_new_tokens, or leave the row out"
            )
