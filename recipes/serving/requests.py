"""What a request may ask for. Everything else is refused, since the server would silently ignore it or do something
else."""

import json
from typing import Annotated, Any, Literal, TypeVar

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recipes.terminal import is_unicode

Stop = Annotated[str, Field(min_length=1)]


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None

    def plain(self) -> dict[str, str]:
        """{role, content} with the parts joined."""
        parts = self.content
        return {"role": self.role, "content": parts if isinstance(parts, str) else "".join(part.text for part in parts)}


class Sampling(BaseModel):
    """What both endpoints read, and fields that have no effect or only this value here."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    stream: bool | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    user: Any = None
    metadata: Any = None
    stream_options: Any = None
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    store: Any = None


class TextRequest(Sampling):
    """POST /v1/completions."""

    prompt: Annotated[str, Field(min_length=1)]


Request = TypeVar("Request", bound=BaseModel)


def parsed(kind: type[Request], body: dict[str, Any]) -> Request:
    """The request in a body. Raises HTTPException with status 400, naming each field and what is wrong with it."""
    if not is_unicode(json.dumps(body, ensure_ascii=False)):
        raise HTTPException(status_code=400, detail="half of a character (a lone surrogate) is not text")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise HTTPException(status_code=400, detail=faults) from error
