"""Our model behind lm-eval's interface: contexts are encoded and windows cut as its `hf` model does it, with the same
results; likelihoods and answers come from this toolkit's own code. Imports lm_eval."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from conversations import render_conversation
from conversations.errors import ToolkitError
from conversations.generation.decoding import FIELDS
from conversations.generation.generating import Decoding, Generated, seed_of
from deepseek_v2_modeling.inference import Continuation
from eval.harness.crew import AnswerRequest, Crew

TooLong = Literal["refuse", "cut"]
MAX_NEW_TOKENS = 256  # as lm-eval's `hf`, where a task does not say
_AROUND = 16  # tokens beside the text's, such as the begin token
_HANDLED = {"until", "max_gen_toks", "do_sample", "temperature"}  # fields of generation_kwargs beside `FIELDS`


class Prompt(str):
    """A conversation rendered by the chat template, with its messages: their text cannot forge control tokens. The
    last message is a user's, or begins the answer."""

    messages: Sequence[Mapping[str, str]]

    @classmethod
    def of(cls, text: str, messages: Sequence[Mapping[str, str]]) -> "Prompt":
        prompt = cls(text)
        prompt.messages = messages
        return prompt


class Reply(str):
    """An answer's text, with what is known of it: whether it ended by itself, and its number of tokens."""

    finished: bool
    tokens: int

    @classmethod
    def of(cls, answer: Generated) -> "Reply":
        reply = cls(answer.text)
        reply.finished, reply.tokens = answer.finished, answer.tokens
        return reply


class ToolkitLM(TemplateLM):
    """Answers the requests of one task at a time.

    Args:
        positions: the model's; a prompt and its answer are no longer.
        crew: computes the answers; None to check that requests fit.
        seed: of sampling; each answer derives its own from it, its row's number and its number among the row's answers.
        too_long: what happens to a prompt that, with its answer, exceeds the positions.
        overrides: fields of generation_kwargs that count instead of the task's. stop: further stop strings.
    """

    def __init__(
        self,
        tokenizer: Any,
        positions: int,
        crew: Crew | None = None,
        seed: int = 0,
        too_long: TooLong = "refuse",
        overrides: Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
    ):
        super().__init__()
        self.tokenizer, self.positions, self.seed = tokenizer, positions, seed
        self.too_long, self.overrides, self.stop = too_long, overrides or {}, stop
        self._crew = crew
        # The context of several choices, which are asked for one after the other, is encoded once.
        self._plain_ids = lru_cache(maxsize=4)(self._encode_plain)
        self._last: tuple[str, list[int]] = ("", [])
        self.cut = 0  # prompts cut to fit

    @property
    def crew(self) -> Crew:
        assert self._crew is not None
        return self._crew

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Prompt:
        """lm-eval's conversation as a prompt. Without `add_generation_prompt` the last message begins the answer."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return Prompt.of(text, chat_history)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, with a begin token if the tokenizer adds one and the text has none; of a `Prompt` those
        of its messages."""
        if not isinstance(string, Prompt):
            return list(self._plain_ids(string, add_special_tokens))
        if self._last[0] is not string:
            begins_answer = string.messages[-1]["role"] == "assistant"
            ids = render_conversation(string.messages, self.tokenizer, add_generation_prompt=not begins_answer)
            self._last = (string, ids["input_ids"][:-1] if begins_answer else ids["input_ids"])  # without an end token
        return list(self._last[1])

    def _encode_plain(self, string: str, add_special_tokens: bool | None) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not isinstance(context, Prompt):
            return super()._encode_pair(context, continuation)
        ids = self.tok_encode(context)
        whole = self.tokenizer.encode(str(context) + continuation, add_special_tokens=False)
        if whole[: len(ids)] == ids:
            return ids, whole[len(ids) :]
        return ids, self.tokenizer.encode(continuation, add_special_tokens=False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        asked = [self._fitting(context, continuation) for _, context, continuation in requests]
        return [(one.logp, one.is_greedy) for one in self.crew.likelihoods(asked)]

    def _fitting(self, context: list[int], continuation: list[int]) -> Continuation:
        if not continuation:
            raise ToolkitError("a continuation to score has no tokens; an answer or choice of the task is empty")
        room = self.positions + 1 - len(continuation)  # the last token is scored, not read
        return Continuation(self._cut(context, room, len(continuation)), continuation)

    def _cut(self, prompt: list[int], room: int, answer: int) -> list[int]:
        """A prompt cut from the left to `room` tokens, if that is needed and allowed."""
        if len(prompt) <= room:
            return prompt
        if room < 1 or self.too_long == "refuse":
            raise ToolkitError(
                f"a prompt of {len(prompt):,} tokens and an answer of {answer:,} are more than the {self.positions:,} "
                "positions of the model (max_position_embeddings); lower num_fewshot or max_new_tokens, or set "
                "too_long: cut"
            )
        self.cut += 1
        return prompt[-room:]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the model's positions."""
        windows: list[tuple[int, Continuation]] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pieces = get_rolling_token_windows(ids, self.prefix_token_id, self.positions, context_len=1)
            windows += [(number, Continuation(*make_disjoint_window(piece))) for piece in pieces]
        totals = [0.0] * len(requests)
        for (number, _), one in zip(windows, self.crew.likelihoods([piece for _, piece in windows]), strict=True):
            totals[number] += one.logp
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request, each sampled independently of all others."""
        repeats: Counter[int] = Counter()
        asked = []
        for request in requests:
            ids, decoding = self._prompt(request)
            number, repeat = request.doc_id, repeats[id(request)]
            repeats[id(request)] += 1
            seed = seed_of(self.seed, number, f"{decoding.temperature:g}", *([repeat] if repeat else []))
            asked.append(AnswerRequest(tuple(ids), seed, decoding))
        return [Reply.of(answer) for answer in self.crew.answers(asked)]

    def _prompt(self, request: Instance) -> tuple[list[int], Decoding]:
        arguments: Any = request.args
        prompt, given = arguments
        decoding = self.decoding(given)
        room = self.positions - decoding.max_new_tokens
        return self._cut(self.tok_encode(prompt), room, decoding.max_new_tokens), decoding

    def check_fit(self, request: Instance) -> None:
        """Raise ToolkitError for a request that is too long, if `too_long` refuses it. A token is at least a byte of
        text, so that most requests need not be encoded."""
        texts: Any = request.args
        if request.request_type == "generate_until":
            decoding = self.decoding(texts[1])
            if len(texts[0].encode()) + _AROUND > self.positions - decoding.max_new_tokens:
                self._prompt(request)
        elif request.request_type == "loglikelihood" and len("".join(texts).encode()) + _AROUND > self.positions:
            context = self._encode_pair(*texts) if texts[0] else ([], self.tok_encode(texts[1]))
            self._fitting(*context)

    def decoding(self, given: Mapping[str, Any]) -> Decoding:
        """How a task's generation_kwargs are decoded.

        Raises:
            ToolkitError: a field that this toolkit does not apply.
        """
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs({**given, **self.overrides}, MAX_NEW_TOKENS))
        if unknown := sorted(set(kwargs) - _HANDLED - FIELDS):
            raise ToolkitError(f"generation_kwargs.{unknown[0]} is not supported; leave it out of the task's file")
        temperature = float(kwargs.get("temperature", 1.0)) if kwargs["do_sample"] else 0.0
        until = [*kwargs["until"], *self.stop, self.tokenizer.eos_token]
        stop = tuple(dict.fromkeys(text for text in until if text))
        settings = {name: value for name, value in kwargs.items() if name in FIELDS and value is not None}
        return Decoding(temperature, kwargs["max_gen_toks"], stop, settings)
