"""Divides what lm-eval asks of a model among the processes of a launch.

Only the first process runs lm-eval: contexts, filters and scores are computed once, and few-shot examples do not depend
on the number of processes. The others wait for work and help with it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from conversations.generation.generating import Decoding, Generated, sample_answers
from deepseek_v2_modeling.inference import Continuation, Likelihood, continuation_likelihoods
from eval.harness.responses import Responses, key_of


class AnswerRequest(NamedTuple):
    """A prompt (token ids) to answer, and the seed to sample with."""

    prompt: tuple[int, ...]
    seed: int
    decoding: Decoding

    @property
    def key(self) -> str:
        decoding = self.decoding
        settings = [decoding.temperature, decoding.max_new_tokens, decoding.stop, decoding.settings]
        return key_of("answer", self.prompt, self.seed if decoding.temperature else 0, settings)


class Crew:
    """All processes of an evaluation. batch_size: of answers generated side by side, in each process."""

    def __init__(self, model: Any, tokenizer: Any, state: PartialState, responses: Responses):
        self.model, self.tokenizer, self.state, self.responses = model, tokenizer, state, responses
        self.batch_size = 32

    def likelihoods(self, asked: Sequence[Continuation]) -> list[Likelihood]:
        """The likelihood of each continuation; asked by the first process."""
        keys = [key_of("likelihood", list(one.context), list(one.continuation)) for one in asked]
        self._share("_likelihoods", dict(zip(keys, asked, strict=True)))
        return [Likelihood(*self.responses.kept[key]) for key in keys]

    def answers(self, asked: Sequence[AnswerRequest]) -> list[Generated]:
        """An answer to each prompt; asked by the first process."""
        keys = [one.key for one in asked]
        self._share("_answers", dict(zip(keys, asked, strict=True)))
        return [Generated(*self.responses.kept[key]) for key in keys]

    def _share(self, work: str, asked: dict[str, Any]) -> None:
        """Do the new part of the work together; afterwards the first process has all responses."""
        new = {key: one for key, one in asked.items() if key not in self.responses.kept}
        if self.state.num_processes > 1:
            broadcast_object_list([(work, new, self.batch_size)])
        self._do(work, new)

    def help(self) -> Any:
        """Work for the first process until it dismisses the others; returns what it tells them then."""
        while True:
            message: list[Any] = [None]
            broadcast_object_list(message)
            work, given, self.batch_size = message[0]
            if work is None:
                return given
            self._do(work, given)

    def dismiss(self, message: Any) -> None:
        """End the others' `help`, which returns the message."""
        if self.state.num_processes > 1:
            broadcast_object_list([(None, message, self.batch_size)])

    def _do(self, work: str, asked: dict[str, Any]) -> None:
        # Neighbours share prefixes, so each process takes a run of them.
        items, rank, size = list(asked.items()), self.state.process_index, self.state.num_processes
        own = items[len(items) * rank // size : len(items) * (rank + 1) // size]
        getattr(self, work)(own)
        if size > 1:
            done = gather_object([(key, self.responses.kept[key]) for key, _ in own])
            self.responses.kept.update(done)

    def _likelihoods(self, asked: Sequence[tuple[str, Continuation]]) -> None:
        for batch, found in continuation_likelihoods(self.model, [one for _, one in asked]):
            self.responses.add({asked[i][0]: list(one) for i, one in zip(batch, found, strict=True)})

    def _answers(self, asked: Sequence[tuple[str, AnswerRequest]]) -> None:
        by_decoding: dict[str, list[tuple[str, AnswerRequest]]] = {}
        for key, one in asked:
            by_decoding.setdefault(repr(one.decoding), []).append((key, one))
        for group in by_decoding.values():
            keys = [key for key, _ in group]
            sample_answers(
                self.model,
                self.tokenizer,
                [one.prompt for _, one in group],
                [one.seed for _, one in group],
                group[0][1].decoding,
                self.batch_size,
                on_answer=lambda place, answer, keys=keys: self.responses.add({keys[place]: list(answer)}),
            )
