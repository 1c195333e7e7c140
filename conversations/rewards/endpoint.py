"""Client of an OpenAI-compatible chat endpoint: one request, one reply, with retries, a rate limit and a request
budget.

It uses httpx2, which huggingface_hub already depends on: the `openai` client would add eight packages for one POST, and
its internal retries could not be counted against the budget. To protect the key, it is sent only over https or to this
machine, and redirects are not followed.
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
FIRST_WAIT = 1.0  # seconds before the second try; doubled before each further one
LONGEST_WAIT = 60.0
_RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
DEFAULT_KEY = "OPENAI_API_KEY"


class NoReply(Exception):
    """The endpoint gave no usable reply. args: (reason, number of requests made)."""


@dataclass(frozen=True)
class EndpointSettings:
    """How to call an endpoint.

    timeout: seconds per request. retries: further tries after the first one. per_minute, budget: maximum numbers of
    requests, None for no limit. parameters: fields of the request besides model and messages.
    """

    base_url: str
    model: str
    key_variable: str = DEFAULT_KEY
    timeout: float = 60.0
    retries: int = 5
    per_minute: int | None = None
    budget: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})

    def key(self) -> str | None:
        """The key from the environment, or None.

        Raises:
            ToolkitError: the variable named in the recipe is not set or does not hold a key, or the key would be sent
                unencrypted.
        """
        from httpx2 import URL

        key = os.environ.get(self.key_variable, "").strip()
        if not key and self.key_variable != DEFAULT_KEY:
            raise ToolkitError(f"the environment variable {self.key_variable}, which should hold the key, is not set")
        if not (key.isascii() and key.isprintable()):
            raise ToolkitError(
                f"the environment variable {self.key_variable} does not hold a key: it has non-ASCII characters"
            )
        if key and URL(self.base_url).scheme != "https" and not self.is_local:
            raise ToolkitError(f"base_url {self.base_url} is not encrypted, and the key would be sent to it: use https")
        return key or None

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on this machine."""
        from httpx2 import URL

        return URL(self.base_url).host in _LOCAL_HOSTS


class Endpoint:
    """Sends requests to an endpoint, from several threads. Each process of a run gets an equal share of the rate limit
    and of the budget left at its start, so that processes need not communicate.

    Args:
        spent: requests of the budget already made, by all processes of the run that this one resumes.
        process, processes: the rank of this process, and the number of processes.
    """

    def __init__(self, settings: EndpointSettings, spent: int = 0, process: int = 0, processes: int = 1):
        from httpx2 import Client

        self.settings, self.spent = settings, 0
        remaining = None if settings.budget is None else max(0, settings.budget - spent)
        self.allowed = None if remaining is None else remaining // processes + (process < remaining % processes)
        self.pause = 60 * processes / settings.per_minute if settings.per_minute else 0.0  # seconds between requests
        self.lock = threading.Lock()
        self.next = 0.0  # time at which the rate limit allows another request
        self.key = settings.key()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # No proxy for a local endpoint: it would see the unencrypted key.
        self.client = Client(
            headers=headers, timeout=settings.timeout, follow_redirects=False, trust_env=not settings.is_local
        )
        self.address = f"{settings.base_url.rstrip('/')}/chat/completions"

    def ask(self, messages: Sequence[dict[str, str]], read: Callable[[str], Read]) -> tuple[Read, str, int]:
        """(parsed reply, reply, number of requests made). Replies that `read` rejects with a ValueError are requested
        again.

        Raises:
            NoReply: no try succeeded, or the budget is spent.
        """
        body = {**self.settings.parameters, "model": self.settings.model, "messages": list(messages)}
        requests, why = 0, ""
        for attempt in range(self.settings.retries + 1):
            if not self._take():
                why = f"the budget of {self.settings.budget:,} requests is spent{f'; {why}' if why else ''}"
                break
            requests += 1
            reply, why, wait = self._once(body)
            if reply is not None:
                try:
                    return read(reply), reply, requests
                except ValueError as error:
                    why = f"{error}: {reply[:100]!r}"
            if wait is None:
                break
            if attempt < self.settings.retries:
                time.sleep(wait or min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1))
        raise NoReply(f"{self.address}: {why}" + (f" ({requests} tries)" if requests > 1 else ""), requests)

    def _once(self, body: dict[str, Any]) -> tuple[str | None, str, float | None]:
        """(reply or None, why there is none, seconds to wait before a retry: 0 for the default, None for no retry)."""
        from httpx2 import HTTPError, InvalidURL

        try:
            response = self.client.post(self.address, json=body)
        except InvalidURL as error:
            return None, str(error), None
        except HTTPError as error:
            return None, f"{type(error).__name__} {self._without_key(str(error))}".strip(), 0
        text = self._without_key(response.text)
        if response.status_code != 200:
            is_temporary = response.status_code in _RETRIED_STATUSES
            why = f"HTTP {response.status_code} {text[:200]}".strip()
            return None, why, _wait_of(response.headers) if is_temporary else None
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return None, f"a reply of another form: {text[:100]!r}", 0
        if not isinstance(content, str):
            return None, "a reply without text", 0
        return content.encode(errors="replace").decode(), "", 0  # half of a character cannot be stored

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "...") if self.key else text

    def _take(self) -> bool:
        """Wait until the rate limit allows a request; False if the budget is spent."""
        with self.lock:
            if self.allowed is not None and self.spent >= self.allowed:
                return False
            self.spent += 1
            now = time.monotonic()
            start = max(now, self.next)
            self.next = start + self.pause
        time.sleep(start - now)
        return True


def _wait_of(headers: Any) -> float:
    """Seconds to wait according to the Retry-After header, 0 without one."""
    retry_after = headers.get("retry-after", "")
    return min(LONGEST_WAIT, float(retry_after)) if re.fullmatch(r"\d{1,6}(\.\d+)?", retry_after) else 0
