"""Groups whose answers all have one reward: they have nothing to learn from but other prompts instead (DAPO), or none.

N answers of all processes, G answers to a prompt, B answers of this process.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from conversations.answers.prompts import prompt_text
from conversations.environments.episodes import Episode
from conversations.rewards.base import Reward
from conversations.row import Row


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

    finished: whether the model ended it itself. values, reasons: by reward; NaN where one gave no score. logps, routes:
    of its tokens, log-probabilities and experts (see `AnswerRecord`) by the model that sampled them, as far as known.
    episode: in an environment.
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


def padded_routes(answers: Sequence[JudgedAnswer], length: int) -> torch.Tensor | None:
    """[B, length, L, K] int16 of L MoE layers and K experts a token, -1 where there is none; None if none is known."""
    known = [torch.stack(answer.routes) if answer.routes else None for answer in answers]
    shape = next((routes.shape[1:] for routes in known if routes is not None), None)
    if shape is None:
        return None
    padded = torch.full((len(known), length, *shape), -1, dtype=torch.int16)
    for row, routes in zip(padded, known, strict=True):
        if routes is not None:
            row[: len(routes)] = routes
    return padded


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

    def _others(self, taken: set[str]) -> Iterator[Row]:
        for _ in range(len(self.rows)):
            row = self.rows[self._next()]
            if (text := prompt_text(row["prompt"])) not in taken:
                taken.add(text)
                yield row

    def _next(self) -> int:
        turn, place = divmod(self.drawn, len(self.rows))
        if turn != self._turn:
            order = torch.randperm(
                len(self.rows), generator=torch.Generator().manual_seed(self.seed + (turn + 1) * 2**32)
            )
            self._turn, self._order = turn, order.tolist()
        self.drawn += 1
        return self._order[place]
