"""Generation for the server: transformers' thread and streamer, with stop strings that are never sent."""

import asyncio
from typing import Any

import torch
from transformers import StoppingCriteriaList, set_seed
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _GenerationCancelled, _StreamError


class StopText:
    """Cuts a growing text at the first stop string, and leaves out the space that begins every answer.

    What may be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.held = ""
        self.begun = self.stopped = False

    def feed(self, text: str) -> str:
        """The part of the text so far that can be shown now and was not shown before."""
        if self.stopped:
            return ""
        self.held += text
        if not self.begun:
            self.held = self.held.lstrip()
            self.begun = bool(self.held)
        ends = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        self.stopped = bool(ends)
        shown = min(ends) if ends else len(self.held) - self._undecided()
        piece, self.held = self.held[:shown], self.held[shown:]
        return piece

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        piece, self.held = "" if self.stopped else self.held, ""
        return piece

    def _undecided(self) -> int:
        """How many last characters may be the beginning of a stop string."""
        sizes = (size for stop in self.stops for size in range(1, len(stop)) if self.held.endswith(stop[:size]))
        return max(sizes, default=0)


class _Streamer(DirectStreamer):
    """transformers' streamer, which decodes tokens to whole characters, with stop strings."""

    def __init__(self, tokenizer: Any, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], stops: list[str]):
        super().__init__(tokenizer, loop, queue)
        self.text = StopText(stops)

    def _enqueue(self, item: Any) -> None:
        piece = self.text.finish() if item is None else self.text.feed(item)
        if piece:
            super()._enqueue(piece)
        if item is None:
            super()._enqueue(None)

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        super()._enqueue(_StreamError(str(error).partition("\n")[0]))


class OneAtATime(GenerateManager):
    """Answers requests one after another on transformers' inference thread.

    `inputs` of both methods: input_ids and attention_mask, each [1, T].
    """

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        """Start to generate; returns the queue of the answer's pieces, which ends with None, and the streamer."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        streamer = _Streamer(processor._tokenizer, loop, queue, gen_config.stop_strings or [])
        self.submit(_generate, model, inputs, gen_config, streamer)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: dict[str, Any], gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """Generate to the end; returns (text, length of the prompt, the answer's tokens).

        Raises:
            RuntimeError: generation failed, for example with NaN.
        """
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        pieces: list[str] = []
        try:
            while (piece := await queue.get()) is not None:
                if isinstance(piece, _StreamError):
                    raise RuntimeError(piece.msg)
                pieces.append(piece)
        except asyncio.CancelledError:  # the client has left
            streamer.cancel()
            raise
        return "".join(pieces), inputs["input_ids"].shape[1], range(streamer.total_tokens)


def _generate(model: Any, inputs: dict[str, Any], gen_config: Any, streamer: _Streamer) -> None:
    """Runs on the inference thread; a client that has left ends it at the next token."""
    from copy import copy

    settings = copy(gen_config)
    settings.stop_strings = None  # the streamer looks for them
    if (seed := settings.__dict__.pop("seed")) is not None:
        set_seed(seed)
    stopped = StoppingCriteriaList([lambda ids, scores: torch.full((len(ids),), streamer.text.stopped)])
    try:
        model.generate(**inputs, generation_config=settings, streamer=streamer, stopping_criteria=stopped)
    except _GenerationCancelled:
        streamer.end()
    except Exception as error:  # whatever it is, the client must hear of it: it waits
        streamer.fail(error)
