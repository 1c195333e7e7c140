"""The endpoints: transformers' handlers, with our requests, our prompts and our model."""

import copy
import time
from typing import Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState

from conversations.errors import ToolkitError
from conversations.rendering.conversation import prompt_ids
from deepseek_v2_modeling.inference import end_tokens
from recipes.serving.generating import OneAtATime
from recipes.serving.requests import ChatRequest, Sampling, TextRequest, parsed

LONGEST_ANSWER = 1024  # tokens of an answer whose request does not say, as in transformers


class ServedModel(ModelManager):
    """The one model of the server, loaded already; requests for another are refused."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        super().__init__(device=str(model.device))
        self.force_model, self.model, self.tokenizer = name, model, tokenizer
        self.created = int(time.time())

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self.model, self.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # pyright: ignore
        """The list of /v1/models; transformers lists the hub's cache."""
        return [{"id": self.force_model, "object": "model", "created": self.created, "owned_by": "local"}]

    def shutdown(self) -> None:
        """Keeps the model, which the server was started with."""


class OneModelState(GenerationState):
    """transformers' state, with our generation."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = OneAtATime()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self.manager


class Answering:
    """What both endpoints do with a request that has been read."""

    generation_state: Any
    _streaming: Any
    _non_streaming: Any

    async def answered(self, request: Sampling, parts: tuple[Any, ...]) -> Any:
        """The response, streamed if the request says so. parts: the arguments of transformers' two ways, up to the
        generation config."""
        manager = self.generation_state.get_manager(request.model)
        if request.stream:
            return self._streaming(*parts, manager)
        return await self._non_streaming(*parts, manager)


class Chat(Answering, ChatCompletionHandler):
    """POST /v1/chat/completions."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        request = parsed(ChatRequest, body)
        resolved: Any = self._resolve_model({"model": request.model})
        name, model, tokenizer = resolved
        try:
            prompt = prompt_ids([message.plain() for message in request.messages], tokenizer)
        except ToolkitError as error:
            raise HTTPException(status_code=400, detail=str(error)) from error
        limit = request.max_completion_tokens or request.max_tokens
        settings = generation_settings(request, limit, len(prompt), model, tokenizer)
        return await self.answered(request, (request_id, model, tokenizer, name, as_batch(prompt, model), settings))


class Text(Answering, CompletionHandler):
    """POST /v1/completions: the model continues a text; there is no template."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        request = parsed(TextRequest, body)
        resolved: Any = self._resolve_model({"model": request.model})
        name, model, tokenizer = resolved
        prompt: Any = tokenizer(request.prompt)["input_ids"]
        settings = generation_settings(request, request.max_tokens, len(prompt), model, tokenizer)
        return await self.answered(request, (request_id, model, tokenizer, name, as_batch(prompt, model), settings))


def generation_settings(request: Sampling, limit: int | None, length: int, model: Any, tokenizer: Any) -> Any:
    """The generation config of a request for a prompt of `length` tokens: the model's own with what the request says.

    Raises:
        HTTPException: with status 400, if the prompt leaves no room for an answer.
    """
    longest = model.config.max_position_embeddings
    if length >= longest:
        raise HTTPException(
            status_code=400, detail=f"the prompt has {length:,} tokens; this model takes at most {longest:,} in all"
        )
    settings = copy.deepcopy(model.generation_config)
    settings.max_length = None
    settings.max_new_tokens = min(limit or LONGEST_ANSWER, longest - length)
    settings.pad_token_id, settings.eos_token_id = tokenizer.pad_token_id, end_tokens(model, tokenizer)
    settings.stop_strings = request.stops or None
    sampled = [value for value in (request.temperature, request.top_p) if value is not None]
    if sampled:
        settings.do_sample = request.temperature != 0
        settings.top_k = settings.top_k or 0
    if request.temperature:
        settings.temperature = request.temperature
    if request.top_p is not None:
        settings.top_p = request.top_p
    settings.seed = request.seed  # set when the answer begins: another one may be generated before
    return settings


def as_batch(prompt: list[int], model: Any) -> dict[str, torch.Tensor]:
    """The inputs of one prompt, each [1, T]."""
    ids = torch.tensor([prompt], device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
