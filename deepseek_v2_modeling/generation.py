"""Continuous batching: answers are sampled in slots; when one has finished, the next prompt takes its slot.

B slots, T tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import torch
from torch import nn

from .answer_records import Recorder, unpadded
from .batching import evaluation_mode, finite, pad_batch
from .cache import LatentCache, whole_blocks
from .decode_steps import WORTH_CAPTURING, SlotDecoder, can_capture, logits_of
from .errors import ModelError
from .kernels.float32_products import float32_is_faster
from .sampling import choose_tokens, draws
from .shared_prefixes import read_once

PREFILL_TOKENS = 2**14  # per prefill, padding included
LARGE = 2**20  # weights of an expert's product
MANY = 16  # rows of an expert
REFILL = 1 / 8  # prefill for empty slots once they are this fraction of all slots

# (which answers ended a turn, the token ids of each so far) -> the tokens that follow; none if an answer is complete
AfterTurn = Callable[[Sequence[int], Sequence[Sequence[int]]], Sequence[Sequence[int]]]
# (token ids so far of each row, lengths of their prompts, logits [B, V]) -> logits [B, V]
Adjust = Callable[[Sequence[torch.Tensor], Sequence[int], torch.Tensor], torch.Tensor]
Stops = Callable[[Sequence[int]], bool]  # token ids of an answer so far -> whether it ends here
Finished = Callable[[int, list[int]], object]  # (the place of a prompt, its answer), as soon as it is finished


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The token ids that end an answer: the tokenizer's EOS token and those listed in generation_config.json.

    Without that file transformers derives a generation config from config.json; those values are ignored in favour of
    the tokenizer's.
    """
    config = model.generation_config
    stated = None if config._from_model_config else config.eos_token_id
    listed = [[tokenizer.eos_token_id], stated if isinstance(stated, list) else [stated]]
    return sorted({i for ids in listed for i in ids if i is not None and i < model.config.vocab_size})


def cache_bytes(model: Any, tokens: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of cache that one answer takes at a length of `tokens`, its prompt included; dtype: other than the
    weights'."""
    config, own = model.config, next(model.parameters()).dtype
    width = sum(config.attention_sizes.cached)
    return config.num_hidden_layers * whole_blocks(tokens) * width * (dtype or own).itemsize


def decoding_dtype(model: Any, compute_dtype: torch.dtype, rows: int) -> torch.dtype | None:
    """The dtype in which a copy of the model decodes fastest on a CPU, if the model computes in low precision; None for
    every other model, which decodes as it computes.

    A low-precision product takes oneDNN 25 to 35 microseconds before it multiplies anything, a float32 one 5 to 8. That
    counts for small weights and few rows: large weights are read in half as many bytes, and many rows multiply faster
    on some CPUs (`float32_is_faster`).
    """
    config = model.config
    if next(model.parameters()).device.type != "cpu" or compute_dtype.itemsize >= 4:
        return None
    large = config.hidden_size * 2 * config.moe_intermediate_size >= LARGE
    chosen = rows * (config.num_experts_per_tok or 1) / (config.n_routed_experts or 1)
    many = chosen >= MANY and not float32_is_faster(compute_dtype)
    return compute_dtype if large or many else torch.float32


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 32,
    max_cache_bytes: int | None = None,
    seeds: Sequence[int] | None = None,
    adjust: Adjust | None = None,
    after_turn: AfterTurn | None = None,
    stops: Stops | None = None,
    finished: Finished | None = None,
) -> list[list[int]]:
    """Generate one answer per prompt, in the order of the prompts: token ids, including the end token if one was
    generated.

    Equivalent to `generate` on each prompt, but answers are sampled side by side, identical prompts and what several
    begin with (examples, a long system prompt) are prefilled once, and the slot of a finished answer goes to the next
    prompt. The model's mode (training or evaluation) is restored afterwards.

    Args:
        temperature: 0 is greedy decoding.
        batch_size: the largest number of answers side by side.
        max_cache_bytes: a limit on the cache of the answers side by side; fewer of them if they would exceed it.
        seeds: one per prompt; they make sampling reproducible without touching the global generator, and each answer
            independent of what is sampled beside it.
        adjust: processes logits before tokens are chosen, and applies the temperature too: (ids so far [T] of each row,
            lengths of their prompts, logits [B, V]) -> logits [B, V].
        after_turn: for answers of several turns: (indices of prompts whose answers just ended with an end token before
            max_new_tokens, the tokens of each so far) -> the tokens that follow, such as the results of tools, after
            which the model goes on; none if the answer is complete. They are part of the answer, are read on top of
            the cache of the turns before, and count in max_new_tokens; where they leave no room for another token the
            answer ends as it is.
        stops: asked after each token, whether the answer ends there (at a stop string).
        finished: called with each answer in the order in which they finish.

    Raises:
        ModelError: the logits are NaN or infinite, or the cache of one answer exceeds max_cache_bytes.
    """
    if not prompts:
        return []
    ends = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    longest = max(map(len, prompts)) + max_new_tokens
    slots = min(batch_size, len(prompts), slots_within(model, longest, max_cache_bytes))
    asked = Asked(prompts, pad_token_id, ends, max_new_tokens, temperature, seeds, adjust, after_turn, stops, finished)
    with evaluation_mode(model):
        return Sampler(model, asked, slots, Recorder(len(prompts))).run()


def slots_within(model: Any, tokens: int, max_cache_bytes: int | None) -> int:
    """How many answers of this length, prompts included, fit into a cache of so many bytes.

    Raises:
        ModelError: not even one.
    """
    one = cache_bytes(model, tokens)
    if max_cache_bytes is not None and one > max_cache_bytes:
        raise ModelError(
            f"the cache of one answer with its prompt, {tokens:,} tokens, takes {one / 1e9:.3g} GB, which is more than "
            f"the {max_cache_bytes / 1e9:.3g} GB that it may take; allow more, or shorter answers"
        )
    return max_cache_bytes // one if max_cache_bytes is not None else 2**31


@dataclass(frozen=True)
class Asked:
    """The arguments of `generate_answers`."""

    prompts: Sequence[Sequence[int]]
    pad_token_id: int
    ends: Collection[int]
    max_new_tokens: int
    temperature: float
    seeds: Sequence[int] | None
    adjust: Adjust | None
    after_turn: AfterTurn | None
    stops: Stops | None
    finished: Finished | None


@dataclass
class Prefilled:
    """Different prompts after prefill. rows: each one's row in the left-padded cache, in the logits [prompts, V] of
    its answer's first token, and in the experts of its tokens, if they are recorded."""

    rows: dict[tuple[int, ...], int]
    cache: LatentCache
    logits: torch.Tensor
    routes: list[torch.Tensor]


@dataclass
class Beginning:
    """What several prompts begin with, after prefill: a cache of one row."""

    ids: tuple[int, ...]
    cache: LatentCache


def queue(prompts: Sequence[Sequence[int]], begins_with: Sequence[tuple[int, ...]]) -> list[int]:
    """The indices of prompts, longest first (so that running out of memory happens at once), identical ones next to
    each other, and those with the same beginning side by side."""
    longest: dict[tuple[int, ...], int] = {}
    for prompt, ids in zip(prompts, begins_with, strict=True):
        longest[ids] = max(longest.get(ids, 0), len(prompt))

    def place(i: int) -> tuple[int, tuple[int, ...], int, tuple[int, ...]]:
        return -longest[begins_with[i]], begins_with[i], -len(prompts[i]), tuple(prompts[i])

    return sorted(range(len(prompts)), key=place)


class Sampler:
    """Slots in which answers are sampled, and a queue of answers that wait for one.

    begins_with: of each answer, what its prompt begins with that is read once; () for nothing. waiting: indices of
    answers, those with the same beginning side by side, longest prompts first, identical prompts next to each other.
    holds: the answer that each slot has or had last; live: whether it is being sampled. paused: slots whose answers
    ended a turn. ids [B, T]: prompts and answers so far, if `adjust` needs them.
    """

    def __init__(self, model: nn.Module, asked: Asked, slots: int, recorder: Recorder):
        self.model, self.asked, self.recorder = model, asked, recorder
        self.device = next(model.parameters()).device
        lengths = [0] * len(asked.prompts) if recorder.records else read_once(asked.prompts)
        self.begins_with = [tuple(prompt[:n]) for prompt, n in zip(asked.prompts, lengths, strict=True)]
        self.waiting = deque(queue(asked.prompts, self.begins_with))
        self.room = max(map(len, asked.prompts)) + asked.max_new_tokens
        self.answers: list[list[int]] = [[] for _ in asked.prompts]
        self.holds, self.live = [0] * slots, [False] * slots
        self.paused: list[int] = []
        self.tokens = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.drawn = None if asked.seeds is None else torch.zeros(slots, asked.max_new_tokens, dtype=torch.float64)
        self.ids = None if asked.adjust is None else self.tokens.new_zeros(slots, self.room)
        self.prefilled: Prefilled | None = None  # the prompt of the next answer, if an earlier one shares it
        self.beginning: Beginning | None = None  # what the last prompts began with
        self.decoder: Any = None

    def run(self) -> list[list[int]]:
        """Sample all answers, in the order of the prompts."""
        self.refill()
        while any(self.live):
            self.shrink()
            logits = self.decoder(self.tokens)
            finite(self.model, "logits", logits)
            self.recorder.read(self.holds, self.live, self.decoder.routes)
            if all(self.live) or self.asked.adjust is None:
                self.choose(range(len(self.live)), logits)
            else:
                places = [place for place, live in enumerate(self.live) if live]
                self.choose(places, logits[torch.tensor(places, device=self.device)])
            self.refill()
        return self.answers

    def choose(self, places: Sequence[int], logits: torch.Tensor) -> None:
        """Choose the next token of each live slot among `places`, from logits [places, V]."""
        asked, answers = self.asked, [self.answers[self.holds[place]] for place in places]
        temperature = asked.temperature
        if asked.adjust is not None and self.ids is not None:
            prompts = [len(asked.prompts[self.holds[place]]) for place in places]
            lengths = [prompt + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
            so_far = [self.ids[place, :length] for place, length in zip(places, lengths, strict=True)]
            logits, temperature = asked.adjust(so_far, prompts, logits), float(temperature > 0)
        drawn = None
        if self.drawn is not None and temperature > 0:
            drawn = self.drawn[list(places), [min(len(answer), asked.max_new_tokens - 1) for answer in answers]]
        chosen = choose_tokens(logits, temperature, drawn)
        holds, live = zip(*((self.holds[place], self.live[place]) for place in places), strict=True)
        self.recorder.chosen(holds, live, logits, temperature, chosen)
        self.tokens[torch.tensor(places, device=self.device)] = chosen
        for place, answer, token in zip(places, answers, chosen.tolist(), strict=True):
            if self.live[place]:
                self.append(place, answer, token)

    def append(self, place: int, answer: list[int], token: int) -> None:
        """Append a token to a slot's answer; frees the slot if that finishes it."""
        if self.ids is not None:
            self.ids[place, len(self.asked.prompts[self.holds[place]]) + len(answer)] = token
        answer.append(token)
        asked = self.asked
        stopped = asked.stops is not None and asked.stops(answer)
        room = len(answer) < asked.max_new_tokens
        if token in asked.ends and asked.after_turn is not None and room and not stopped:
            self.live[place] = False
            self.paused.append(place)
            self.decoder.pause(place)
        elif stopped or token in asked.ends or not room:
            self.end(place, answer)

    def end(self, place: int, answer: list[int]) -> None:
        """Free the slot of a finished answer."""
        self.live[place] = False
        self.decoder.empty(place)
        if self.asked.finished is not None:
            self.asked.finished(self.holds[place], answer)

    def shrink(self) -> None:
        """Drop empty slots once the queue is empty."""
        places = [place for place, live in enumerate(self.live) if live or place in self.paused]
        if self.waiting or len(places) > self.decoder.worth_dropping * len(self.live):
            return
        self.decoder.keep(places)
        self.holds, self.live = [self.holds[place] for place in places], [self.live[place] for place in places]
        self.paused = [new for new, place in enumerate(places) if place in self.paused]
        kept = torch.tensor(places, device=self.device)
        self.tokens = self.tokens[kept]
        self.ids = None if self.ids is None else self.ids[kept]
        self.drawn = None if self.drawn is None else self.drawn[places]

    def refill(self) -> None:
        """Go on with answers that ended a turn, and start waiting answers in empty slots."""
        while True:
            if self.paused and (len(self.paused) >= REFILL * len(self.live) or not any(self.live)):
                self.resume()
            elif not (places := self.due()):
                return
            elif self.begins_with[self.waiting[0]]:
                self.enter_after(places)
            else:
                prefilled, count = self.next_prompts(len(places))
                entering, places = [self.waiting.popleft() for _ in range(count)], places[:count]
                self.enter(places, entering, prefilled)

    def resume(self) -> None:
        """Read what follows the turns of paused answers, and choose the first tokens of the next turns; frees the slots
        of complete answers."""
        assert self.asked.after_turn is not None
        places, self.paused = self.paused, []
        answers = [self.answers[self.holds[place]] for place in places]
        following = self.asked.after_turn([self.holds[place] for place in places], answers)
        going, new = [], []
        for place, answer, tokens in zip(places, answers, following, strict=True):
            if not tokens or len(answer) + len(tokens) >= self.asked.max_new_tokens:
                self.end(place, answer)
                continue
            going.append(place)
            new.append([answer[-1], *tokens])
            if self.ids is not None:
                start = len(self.asked.prompts[self.holds[place]]) + len(answer)
                self.ids[place, start : start + len(tokens)] = torch.tensor(tokens, device=self.device)
            answer += tokens
            self.live[place] = True
        if going:
            logits = self.decoder.read(going, *pad_batch(new, self.asked.pad_token_id, left=True))
            finite(self.model, "logits", logits)
            self.recorder.read_turns([self.holds[place] for place in going], new, self.decoder.routes)
            self.choose(going, logits)

    def due(self) -> list[int]:
        """The empty slots, if they are enough to prefill for or the next prompt is prefilled already."""
        if not self.waiting:
            return []
        places = [place for place, live in enumerate(self.live) if not live and place not in self.paused]
        enough = len(places) >= REFILL * len(self.live) or self.prefilled is not None
        return places if enough else []

    def next_prompts(self, most: int) -> tuple[Prefilled, int]:
        """(the prefilled prompts of the next answers, the number of these answers, at most `most`)."""
        asked, count = self.asked, 0
        rows: dict[tuple[int, ...], int] = {} if self.prefilled is None else self.prefilled.rows
        longest = len(asked.prompts[self.waiting[0]])
        for answer in islice(self.waiting, most):
            prompt = tuple(asked.prompts[answer])
            if self.begins_with[answer]:
                break
            if prompt not in rows:
                if self.prefilled is not None or (rows and (len(rows) + 1) * longest > PREFILL_TOKENS):
                    break
                rows[prompt] = len(rows)
            count += 1
        return self.prefilled or self.prefill(rows), count

    def prefill(self, rows: dict[tuple[int, ...], int]) -> Prefilled:
        ids, mask = (t.to(self.device) for t in pad_batch(list(rows), self.asked.pad_token_id, left=True))
        cache = LatentCache(self.model.config)  # pyright: ignore[reportArgumentType]
        with self.recorder.prefill(self.model) as routes:
            logits = logits_of(self.model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        finite(self.model, "logits", logits)
        return Prefilled(rows, cache, logits, unpadded(routes, [len(prompt) for prompt in rows]))

    def enter(self, places: list[int], entering: list[int], prefilled: Prefilled) -> None:
        """Start answers in slots and choose their first tokens."""
        prompts = [tuple(self.asked.prompts[answer]) for answer in entering]
        rows, lengths = [prefilled.rows[prompt] for prompt in prompts], [len(prompt) for prompt in prompts]
        self.decoder_like(prefilled.cache).fill(places, prefilled.cache, rows, lengths)
        self.recorder.entered(entering, [prefilled.routes[row] for row in rows] if prefilled.routes else [])
        self.start(places, entering)
        first = prefilled.logits[torch.tensor(rows, device=self.device)]
        self.prefilled = self.remaining(prefilled, prompts[-1])
        self.choose(places, first)

    def enter_after(self, places: list[int]) -> None:
        """Start the next answers whose prompts have the same beginning, which is read only if it is not that of the
        last ones: its cache is copied into their slots, and what follows it is read there."""
        prompts, ids = self.asked.prompts, self.begins_with[self.waiting[0]]
        at_once = max(1, PREFILL_TOKENS // len(prompts[self.waiting[0]]))
        following = takewhile(lambda answer: self.begins_with[answer] == ids, self.waiting)
        entering = list(islice(following, min(at_once, len(places))))
        for _ in entering:
            self.waiting.popleft()
        places = places[: len(entering)]
        if self.beginning is None or self.beginning.ids != ids:
            self.beginning = Beginning(ids, self.prefill({ids: 0}).cache)
        decoder = self.decoder_like(self.beginning.cache)
        decoder.fill(places, self.beginning.cache, [0] * len(places), [len(ids)] * len(places))
        self.start(places, entering)
        rests = [prompts[answer][len(ids) :] for answer in entering]
        logits = decoder.read(places, *pad_batch(rests, self.asked.pad_token_id, left=True))
        finite(self.model, "logits", logits)
        self.choose(places, logits)

    def decoder_like(self, cache: LatentCache) -> SlotDecoder:
        """The decoder; created for caches like this one when the first answers enter."""
        if self.decoder is None:
            capture = self.asked.max_new_tokens > WORTH_CAPTURING and can_capture(self.model)
            settings = {"fixed": capture, "record": self.recorder.records}
            self.decoder = SlotDecoder(self.model, cache, len(self.live), self.room - 1, **settings)
        return self.decoder

    def start(self, places: Sequence[int], entering: Sequence[int]) -> None:
        """Slots hold these answers from now on."""
        asked = self.asked
        for place, answer in zip(places, entering, strict=True):
            self.holds[place], self.live[place] = answer, True
            if self.ids is not None:
                prompt = asked.prompts[answer]
                self.ids[place, : len(prompt)] = torch.tensor(prompt, device=self.device)
        if self.drawn is not None and asked.seeds is not None:
            self.drawn[list(places)] = draws([asked.seeds[answer] for answer in entering], asked.max_new_tokens)

    def remaining(self, prefilled: Prefilled, last: tuple[int, ...]) -> Prefilled | None:
        """The prefill of the next answer's prompt, if it is that of the last answer started."""
        if not self.waiting or tuple(self.asked.prompts[self.waiting[0]]) != last:
            return None
        if len(prefilled.rows) > 1:
            row = torch.tensor([prefilled.rows[last]], device=self.device)
            prefilled.cache.batch_select_indices(row)
            routes = [prefilled.routes[int(row)]] if prefilled.routes else []
            prefilled = Prefilled({last: 0}, prefilled.cache, prefilled.logits[row], routes)
        return prefilled
