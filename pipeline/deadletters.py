"""Dead letters: events set aside with the reason, on an ordinary channel `<channel>.dead`."""

from __future__ import annotations

import traceback
from functools import lru_cache
from typing import Any

from .channel import Channel
from .errors import Reject, Retry
from .events import Event

__all__ = ["DeadLetter", "dead_channel", "reason_of", "traceback_of"]

KEEP = 7 * 24 * 3600.0


class DeadLetter(Event):
    """An event that was given up, with what is needed to understand and to replay it."""

    channel: str
    group: str
    partition: int = 0
    origin: int = 0
    """Events in the stream up to and including the frame it came in; 0 on a live channel."""
    event_id: str
    """`source:sequence`; of the frame's entry when the frame could not be read."""
    key: str | None = None
    attempts: int
    reason: str
    traceback: str = ""
    count: int = 1
    """Events in `original`: one, but for a frame that nobody could read."""
    original: bytes
    """The frame of this event, as a replay hands it out again."""


@lru_cache(4096)
def dead_channel(channel: str) -> Channel[DeadLetter]:
    return Channel(f"{channel}.dead", DeadLetter, keep=KEEP)


def reason_of(error: BaseException) -> str:
    if isinstance(error, Reject):
        return error.reason
    if isinstance(error, Retry):
        return f"retries exhausted{': ' + error.reason if error.reason else ''}"
    return f"{type(error).__name__}: {error}"


def traceback_of(error: Any) -> str:
    if isinstance(error, (Reject, Retry)) and error.__traceback__ is None:
        return ""
    return "".join(traceback.format_exception(error))[-8000:]
