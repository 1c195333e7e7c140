"""A chat endpoint with OpenAI's protocol: one question, one reply, with retries, a rate and a budget of requests.

Asked through httpx2, which huggingface_hub brings along: the `openai` client would add eight packages for one POST, and
its own retries could not be counted against the budget. Redirects are not followed, and a key goes to https or to this
machine only, so that it ends up nowhere else.
"""

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from conversations.errors import ToolkitError

Read = TypeVar("Read")
FIRST_WAIT = 1.0  # seconds before the second try; doubled each time
LONGEST_WAIT = 60.0
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_HERE = ("localhost", "127.0.0.1", "::1")
DEFAULT_KEY = "OPENAI_API_KEY"


class NoReply(Exception):
    """The endpoint gave nothing that could be read."""


@dataclass(frozen=True)
class EndpointSettings:
    """parameters: of a request, beside model and messages. retries: after the first try. per_minute, budget: of
    requests, None for no limit."""

    base_url: str
    model: str
    key_variable: str = DEFAULT_KEY
    timeout: float = 60.0
    retries: int = 5
    per_minute: int | None = None
    budget: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})

    def key(self) -> str | None:
        """From the environment. Raises ToolkitError where the variable that the recipe names is not set, or the key
        would travel unencrypted."""
        from httpx2 import URL

        key = os.environ.get(self.key_variable, "").strip()
        if not key and self.key_variable != DEFAULT_KEY:
            raise ToolkitError(f"the environment variable {self.key_variable}, which is to hold the key, is not set")
        if not (key.isascii() and key.isprintable()):
            raise ToolkitError(f"the environment variable {self.key_variable} holds no key: it has odd characters")
        if key and URL(self.base_url).scheme != "https" and not self.here:
            raise ToolkitError(f"base_url {self.base_url} is not encrypted, and the key would be sent to it: use https")
        return key or None

    @property
    def here(self) -> bool:
        """Whether the endpoint is on this machine."""
        from httpx2 import URL

        return URL(self.base_url).host in _HERE


class Endpoint:
    """spent: requests that were made before, of the budget."""

    def __init__(self, settings: EndpointSettings, spent: int = 0):
        from httpx2 import Client

        self.settings, self.spent = settings, spent
        self.lock = threading.Lock()
        self.next = 0.0  # when the rate allows another request
        self.key = settings.key()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # To this machine through no proxy, which would get the key in clear.
        self.client = Client(
            headers=headers, timeout=settings.timeout, follow_redirects=False, trust_env=not settings.here
        )
        self.address = f"{settings.base_url.rstrip('/')}/chat/completions"

    def ask(self, messages: Sequence[dict[str, str]], read: Callable[[str], Read]) -> tuple[Read, str, int]:
        """What `read` makes of the reply, the reply, and the number of requests. A reply that cannot be read (`read`
        raises ValueError) is asked for again.

        Raises:
            NoReply: (why, the number of requests): no try succeeded, or the budget is spent.
        """
        body = {**self.settings.parameters, "model": self.settings.model, "messages": list(messages)}
        made, why = 0, ""
        for attempt in range(self.settings.retries + 1):
            if not self._take():
                why = f"the budget of {self.settings.budget:,} requests is spent{f'; {why}' if why else ''}"
                break
            made += 1
            reply, why, wait = self._once(body)
            if reply is not None:
                try:
                    return read(reply), reply, made
                except ValueError as error:
                    why = f"{error}: {reply[:100]!r}"
            if wait is None:
                break
            if attempt < self.settings.retries:
                time.sleep(wait or min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1))
        raise NoReply(f"{self.address}: {why}" + (f" ({made} tries)" if made > 1 else ""), made)

    def _once(self, body: dict[str, Any]) -> tuple[str | None, str, float | None]:
        """(the reply or None, why there is none, seconds to wait: 0 for the usual, None for no use in trying again)."""
        from httpx2 import HTTPError, InvalidURL

        try:
            answered = self.client.post(self.address, json=body)
        except InvalidURL as error:
            return None, str(error), None
        except HTTPError as error:
            return None, f"{type(error).__name__} {self._without_key(str(error))}".strip(), 0
        text = self._without_key(answered.text)
        if answered.status_code != 200:
            again = answered.status_code in _AGAIN
            why = f"HTTP {answered.status_code} {text[:200]}".strip()
            return None, why, _wait_of(answered.headers) if again else None
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return None, f"a reply of another form: {text[:100]!r}", 0
        return (content, "", 0) if isinstance(content, str) else (None, "a reply without text", 0)

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "...") if self.key else text

    def _take(self) -> bool:
        """Waits until the rate allows a request; False where the budget does not."""
        with self.lock:
            if self.settings.budget is not None and self.spent >= self.settings.budget:
                return False
            self.spent += 1
            now = time.monotonic()
            at = max(now, self.next)
            self.next = at + 60 / self.settings.per_minute if self.settings.per_minute else 0.0
        time.sleep(at - now)
        return True


def _wait_of(headers: Any) -> float:
    asked = headers.get("retry-after", "")
    return min(LONGEST_WAIT, float(asked)) if re.fullmatch(r"\d{1,6}(\.\d+)?", asked) else 0
