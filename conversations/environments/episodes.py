"""Answers of several turns: the tools that a model calls, and what it reads of their results.

One episode is one answer: turns of the model, and after each turn with calls a user turn with their results
(conversations/formats/tools.py). Token ids only grow: those of a turn are a prefix of the next one's.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from conversations.answers.prompts import answer_text, prompt_row
from conversations.environments.calls import ToolCall, calls_in, error_text, text_of
from conversations.environments.loading import Environment
from conversations.errors import ToolkitError
from conversations.formats.tools import result_text
from conversations.rendering.conversation import render_conversation
from conversations.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEFORE: list[Row] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass
class Episode:
    """spans: (start, end) of the results among the answer's tokens. turns: the messages of the answer's complete turns.
    calls, failures: how many were made, and how many gave an error. no_room: whether results were left out, because no
    tokens remained for them."""

    instance: Any
    prompt: list[Row]
    spans: list[tuple[int, int]] = field(default_factory=list)
    turns: list[Row] = field(default_factory=list)
    calls: int = 0
    failures: int = 0
    no_room: bool = False

    def own(self, length: int) -> list[int]:
        """Of an answer of so many tokens: 1 for those that the model wrote, 0 for those of results."""
        mask = [1] * length
        for start, end in self.spans:
            mask[start:end] = [0] * (end - start)
        return mask


def following_ids(content: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token ids of a user turn after an answer's end token, up to where the next answer begins."""
    before = render_conversation(_BEFORE, tokenizer)["input_ids"]
    turns = [*_BEFORE, {"role": "user", "content": content}]
    return render_conversation(turns, tokenizer, add_generation_prompt=True)["input_ids"][len(before) :]


class Players:
    """The instances of an environment, which are made once and used again, and what runs their coroutines."""

    def __init__(self, environment: Environment, tokenizer: Any, most_turns: int | None = None):
        self.environment, self.tokenizer, self.most_turns = environment, tokenizer, most_turns
        self.instances: list[Any] = []
        self.loop = asyncio.Runner()

    def begin(self, rows: Sequence[Row]) -> "Episodes":
        """An episode for each row, with `prompt`, a list of messages: its columns are the arguments of `reset`.

        Raises:
            ToolkitError: the environment raises an error, or its `reset` gives something other than text or None.
        """
        while len(self.instances) < len(rows):
            self.instances.append(self.environment.instance())
        started = zip(self.instances, rows, strict=False)
        return Episodes(self, [Episode(instance, self._prompt(instance, row)) for instance, row in started])

    def _prompt(self, instance: Any, row: Row) -> list[Row]:
        seen = self.call(instance.reset, **row)
        if seen is not None and not isinstance(seen, str):
            raise ToolkitError(
                f"environment {self.environment.written}: reset returned {seen!r:.60}; it must return text to append "
                "to the prompt, or None"
            )
        *earlier, last = row["prompt"]
        return self.environment.offered([*earlier, {**last, "content": last["content"] + (seen or "")}])

    def call(self, method: Any, **arguments: Any) -> Any:
        """A method of the protocol, which must not fail."""
        try:
            result = method(**arguments)
            return self.loop.run(_awaited(result)) if inspect.isawaitable(result) else result
        except ToolkitError:
            raise
        except (Exception, SystemExit) as error:
            raise ToolkitError(
                f"environment {self.environment.written}: {method.__name__} failed: {self.environment.located(error)}"
            ) from error

    def reward(self, instance: Any) -> float | None:
        """The reward of a finished episode. Raises ToolkitError if it is neither a number nor None."""
        value = self.call(instance.get_reward)
        try:
            return None if value is None else float(value)
        except (TypeError, ValueError):
            raise ToolkitError(
                f"environment {self.environment.written}: get_reward returned {value!r:.60}; it must return a number "
                "or None"
            ) from None

    def close(self) -> None:
        """End what runs coroutines."""
        self.loop.close()


def try_reset(environment: Environment, row: Row) -> None:
    """Begin an episode for a row. Raises ToolkitError if the environment cannot."""
    with closing(Players(environment, None)) as players:
        players.begin([prompt_row(row, 1)])


class Episodes:
    """A batch of episodes, in the order of the prompts."""

    def __init__(self, players: Players, episodes: Sequence[Episode]):
        self.players, self.episodes = players, episodes

    @property
    def prompts(self) -> list[list[Row]]:
        return [episode.prompt for episode in self.episodes]

    def after_turn(self, indices: Sequence[int], answers: Sequence[Sequence[int]]) -> list[list[int]]:
        """`generate_answers` asks: makes the calls of turns that have ended, and returns the tokens of their results.

        Calls are made one after the other, in the order of the answers, coroutines side by side.
        """
        made = [self._begun(self.episodes[index], ids) for index, ids in zip(indices, answers, strict=True)]
        results = self._results([attempt for attempts in made for attempt in attempts])
        return [
            self._read(self.episodes[index], len(ids), [next(results) for _ in attempts])
            for index, ids, attempts in zip(indices, answers, made, strict=True)
        ]

    def _begun(self, episode: Episode, ids: Sequence[int]) -> list[tuple[Episode, Any]]:
        """The calls of the last turn of an answer, made: with each its result, error, or coroutine."""
        text = self._text(ids[episode.spans[-1][1] if episode.spans else 0 :])
        episode.turns.append({"role": "assistant", "content": text})
        most = self.players.most_turns
        if most is not None and len(episode.spans) >= most:
            return []
        return [(episode, self._attempt(episode.instance, call)) for call in calls_in(text)]

    def _attempt(self, instance: Any, call: ToolCall) -> Any:
        """A call's result, a coroutine for it, or the error that it raised."""
        if call.fault is not None:
            return ValueError(call.fault)
        if call.name not in self.players.environment.tools:
            return ValueError(f"there is no tool {call.name}")
        try:
            return getattr(instance, call.name)(**call.arguments)
        except (Exception, SystemExit) as error:  # for the model to read
            return _readable(error)

    def _results(self, attempts: Sequence[tuple[Episode, Any]]) -> Iterator[str]:
        """The results as text, in order; counts calls and failures."""
        waiting = [value for _, value in attempts if inspect.isawaitable(value)]
        arrived = iter(self.players.loop.run(_gathered(waiting)) if waiting else [])
        for episode, value in attempts:
            result = next(arrived) if inspect.isawaitable(value) else value
            episode.calls += 1
            episode.failures += isinstance(result, Exception)
            yield error_text(result) if isinstance(result, Exception) else text_of(result)

    def _read(self, episode: Episode, length: int, results: Sequence[str]) -> list[int]:
        """The tokens of the results after so many tokens of an answer; none if there are no results."""
        if not results:
            return []
        content = "\n".join(map(result_text, results))
        episode.turns.append({"role": "user", "content": content})
        ids = following_ids(content, self.players.tokenizer)
        episode.spans.append((length, length + len(ids)))
        return ids

    def finish(self, answers: Sequence[Sequence[int]]) -> None:
        """Complete the episodes with the answers' tokens: results that found no room are taken off, and the last turns
        that no end token ended are added."""
        for episode, ids in zip(self.episodes, answers, strict=True):
            if episode.spans and episode.spans[-1][1] > len(ids):
                episode.spans.pop()
                episode.turns.pop()
                episode.no_room = True
            elif not episode.turns or episode.turns[-1]["role"] == "user":
                text = self._text(ids[episode.spans[-1][1] if episode.spans else 0 :])
                episode.turns.append({"role": "assistant", "content": text})

    def rewards(self) -> list[float | None] | None:
        """The environments' own rewards; None where it has none."""
        if not self.players.environment.rewards:
            return None
        return [self.players.reward(episode.instance) for episode in self.episodes]

    def _text(self, ids: Sequence[int]) -> str:
        return answer_text(self.players.tokenizer.decode(list(ids), skip_special_tokens=True))  # pyright: ignore[reportArgumentType]


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


async def _gathered(waiting: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*map(_attempted, waiting), return_exceptions=True)


async def _attempted(result: Awaitable[Any]) -> Any:
    try:
        return await result
    except SystemExit as error:
        return _readable(error)


def _readable(error: BaseException) -> Exception:
    """What a tool raised; for SystemExit, which would end the run, an error that does not."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
