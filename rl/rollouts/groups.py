"""Groups whose answers all have one reward: they have nothing to learn from but other prompts instead (DAPO), or none.

N answers of all processes, G answers to a prompt, B answers of this process.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from conversations.answers.prompts import prompt_text
from conversations.environments.episodes import Episode
from conversations.generation.generating import seed_of
from conversations.rewards.base import Reward
from conversations.row import Row

NUMBER = "number"  # of a row in the data, as a column of the data set
RIGHT = 1.0  # the score of a right answer by a rule that has a reference


@dataclass(frozen=True)
class SampledAnswers:
    """Answers to prompts, in order. completions: as messages, of several turns in an environment. logps: where the
    engine gives them. episodes: in an environment; rewards: the environment's own, if it has any."""

    prompt_ids: Sequence[list[int]]
    ids: Sequence[list[int]]
    completions: Sequence[list[Row]]
    logps: Sequence[Any] | None = None
    episodes: Sequence[Episode] | None = None
    rewards: Sequence[float | None] | None = None


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer sampled for a row's prompt.

    finished: whether the model ended it itself. values, reasons: by reward; NaN where one gave no score. logps, routes,
    prompt_routes: by the model that sampled it, as far as known, the log-probabilities and experts of its tokens and
    the experts of its prompt's (see `AnswerRecord`). episode: in an environment.
    """

    row: Row
    prompt_ids: list[int]
    ids: list[int]
    finished: bool
    values: list[float]
    reasons: list[str | None]
    logps: list[float] | None = None
    routes: list[torch.Tensor] | None = None
    episode: Episode | None = None
    prompt_routes: torch.Tensor | None = None


def judge_answers(
    rewards: Sequence[Reward],
    rows: Sequence[Row],
    sampled: SampledAnswers,
    ends: Collection[int],
) -> list[JudgedAnswer]:
    """The answers with the values of all rewards. ends: tokens with which a model ends."""
    finished = [bool(tokens) and tokens[-1] in ends for tokens in sampled.ids]
    columns: dict[str, Any] = {"reference": [row.get("reference") for row in rows], "finished": finished}
    columns |= {"completion_ids": sampled.ids, "environment_rewards": sampled.rewards}
    values, reasons = [], []
    for reward in rewards:
        given = reward([row["prompt"] for row in rows], list(sampled.completions), **columns)
        values.append([float("nan") if value is None else float(value) for value in given])
        reasons.append(list(reward.reasons))
    by_answer = zip(zip(*values, strict=True), zip(*reasons, strict=True), strict=True)
    episodes = sampled.episodes or [None] * len(rows)
    tokens = zip(sampled.prompt_ids, sampled.ids, finished, strict=True)
    return [
        JudgedAnswer(row, prompt, ids, done, list(scores), list(why), episode=episode)
        for row, (prompt, ids, done), (scores, why), episode in zip(rows, tokens, by_answer, episodes, strict=True)
    ]


def verifiers_of(rewards: Sequence[Reward]) -> list[int]:
    """The places of the rewards that say whether an answer is right: rules with a reference."""
    return [place for place, reward in enumerate(rewards) if reward.verifies]


def is_right(answer: JudgedAnswer, verifiers: Sequence[int]) -> bool:
    """Whether all verifiers say that it is right; where one says nothing, it is not."""
    return all(answer.values[place] >= RIGHT for place in verifiers)


def equal_groups(values: torch.Tensor, weights: torch.Tensor, size: int) -> torch.Tensor:
    """Whether the answers of a group all have one reward, [N / G] bool; answers without any value do not count.

    values: [N, rewards], NaN where there is none. weights: [rewards]. size: G.
    """
    totals = (values * weights).nansum(1).view(-1, size)
    unscored = values.isnan().all(1).view(-1, size)
    highest = totals.masked_fill(unscored, -torch.inf).amax(1)
    return highest <= totals.masked_fill(unscored, torch.inf).amin(1)


def left_out(equal: torch.Tensor, lengths: torch.Tensor, micro_batch: int) -> torch.Tensor:
    """equal [B] bool, lengths [B] of prompt and answer -> [B] bool: which answers neither scoring nor the update reads.

    Of a micro-batch without any other answer the shortest one stays, with an advantage of 0: all processes then go
    through the same forwards and backwards, and the optimizer gets gradients of 0, not none.
    """
    out = equal.clone()
    for start in range(0, len(equal), micro_batch):
        part = slice(start, start + micro_batch)
        if bool(equal[part].all()):
            out[start + int(lengths[part].argmin())] = False
    return out


def padded_routes(answers: Sequence[JudgedAnswer], length: int, prompt_length: int = 0) -> torch.Tensor | None:
    """[B, prompt_length + length, L, K] int16 of L MoE layers and K experts a token, -1 where there is none; None if
    none is known. Answers are padded on the right, and prompts, if they have a length, on the left."""
    known = [torch.stack(answer.routes) if answer.routes else None for answer in answers]
    prompts = [answer.prompt_routes if prompt_length else None for answer in answers]
    shape = next((routes.shape[1:] for routes in (*known, *prompts) if routes is not None), None)
    if shape is None:
        return None
    padded = torch.full((len(known), prompt_length + length, *shape), -1, dtype=torch.int16)
    for row, routes, of_prompt in zip(padded, known, prompts, strict=True):
        if routes is not None:
            row[prompt_length : prompt_length + len(routes)] = routes
        if of_prompt is not None:
            row[prompt_length - len(of_prompt) : prompt_length] = of_prompt
    return padded


def generator_of(*parts: int) -> torch.Generator:
    """Random numbers that depend on all of these numbers. torch's generators use 32 bits of a seed."""
    return torch.Generator().manual_seed(seed_of(*parts) % 2**32)


class OtherPrompts:
    """The rows of the data in a random order of their own, again and again.

    All processes draw the same. `drawn`, how many were drawn so far, is all of its state.
    """

    def __init__(self, rows: Any, seed: int):
        self.rows, self.seed = rows, seed
        self.drawn = 0
        self._turn, self._order = -1, list[int]()

    def replacements(self, groups: Sequence[int], taken: set[str]) -> dict[int, Row]:
        """A row for each of these groups, with a prompt that is not `taken`, to which it is added. Groups for which
        there is no other prompt are left out."""
        found = {}
        rows = self._others(taken)
        for group in groups:
            row = next(rows, None)
            if row is None:
                break
            found[group] = row
        return found

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"drawn": self.drawn}

    def restore(self, saved: dict[str, Any]) -> None:
        self.drawn = saved["drawn"]

    def _others(self, taken: set[str]) -> Iterator[Row]:
        return self._not_taken((self._next() for _ in range(len(self.rows))), taken)

    def _not_taken(self, numbers: Iterable[int], taken: set[str]) -> Iterator[Row]:
        for number in numbers:
            row = self.rows[number]
            if (text := prompt_text(row["prompt"])) not in taken:
                taken.add(text)
                yield row

    def _next(self) -> int:
        turn, place = divmod(self.drawn, len(self.rows))
        if turn != self._turn:
            order = torch.randperm(len(self.rows), generator=generator_of(self.seed, turn))
            self._turn, self._order = turn, order.tolist()
        self.drawn += 1
        return self._order[place]
