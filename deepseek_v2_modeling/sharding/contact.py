"""Errors that say what a process was doing when another one was gone."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from ..errors import ModelError

_BROKEN = ("Connection closed", "Connection reset", "Broken pipe", "Socket Timeout", "remote process exited")
_LATE = ("Timed out", "timed out", "Timeout", "timeout")
PATIENCE = 7200  # seconds: the first process may read hundreds of gigabytes while the others wait


class LostContact(ModelError):
    """Another process has ended, or does not answer. closed: whether it is known to have ended."""

    closed = False


@contextmanager
def at(place: str) -> Iterator[None]:
    """Context for what processes do together: if one of them is gone, the error names the place."""
    try:
        yield
    except LostContact:
        raise
    except RuntimeError as error:  # torch.distributed has no class of its own for what gloo reports
        text = str(error)
        closed = any(sign in text for sign in _BROKEN)
        if not closed and not any(sign in text for sign in _LATE):
            raise
        lost = LostContact(
            f"another process {'has ended' if closed else 'did not answer in time'} while this one was {place}; the "
            "same command resumes from the newest checkpoint"
        )
        lost.closed = closed
        raise lost from error


def wait_at_most(seconds: float) -> None:
    """Set how long this process waits for another one in anything that they do together."""
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=seconds), group)
