"""Dead letters: events set aside with the reason, on an ordinary channel `<channel>.dead`."""

from __future__ import annotations

import traceback
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from .channel import Channel
from .errors import Reject, Retry
from .events import Event
from .frame import preview
from .message import Message

__all__ = ["DeadLetter", "dead_channel", "describe", "fits", "internal", "reason_of", "traceback_of"]

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


def internal(channel: str) -> bool:
    """Whether nobody but the framework writes there: its own channels, and dead letters, which a replay believes."""
    return channel.startswith("pipeline.") or channel.endswith(".dead")


def fits(
    message: Message[DeadLetter],
    group: str | None = None,
    ids: Collection[str] | None = None,
    reason: str | None = None,
) -> bool:
    """Whether a letter is its group's, one of `ids`, and has `reason` (in any case) in its own. None: whichever."""
    letter = message.event
    return (
        (group is None or letter.group == group)
        and (ids is None or message.id in ids)
        and (reason is None or reason.lower() in letter.reason.lower())
    )


def describe(message: Message[DeadLetter]) -> dict[str, Any]:
    """As JSON: the letter with its id and time, and the `events` it holds; None where nobody can read them."""
    fields = message.event.model_dump(mode="json", exclude={"original"})
    return {"id": message.id, "time": message.time.isoformat(), **fields, "events": preview(message.event.original)}


def reason_of(error: BaseException) -> str:
    if isinstance(error, Reject):
        return _text(error.reason)
    if isinstance(error, Retry):
        return f"retries exhausted{': ' + _text(error.reason) if error.reason else ''}"
    return f"{type(error).__name__}: {_text(error)}"


def traceback_of(error: Any) -> str:
    if isinstance(error, (Reject, Retry)) and error.__traceback__ is None:
        return ""
    return _text("".join(traceback.format_exception(error)))[-8000:]


def _text(value: object) -> str:
    """What a letter can carry of anything: errors hold file names with bytes that are no text, or cannot be shown."""
    try:
        text = str(value)
    except Exception:
        text = f"({type(value).__name__} that cannot be shown)"
    return text.encode(errors="backslashreplace").decode()
