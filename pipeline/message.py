"""One delivery of an event, with its envelope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Generic, TypeVar

__all__ = ["Message", "Receipt", "Reply"]

T = TypeVar("T")

TRACE = ("traceparent", "tracestate")
"""Headers of W3C Trace Context: an event's outputs take them over, and CloudEvents has them beside `id`."""


@dataclass(frozen=True, slots=True)
class Message(Generic[T]):
    """One delivery of an event. Annotate a handler's parameter `Message[Reading]` to receive it.

    id         `source:sequence`, unique within its channel and ordered within its source
    source     who published it
    time       when it was published, aware, UTC
    key        what orders it, or None
    attempt    1 the first time
    headers    what the publisher attached
    requested  whether somebody awaits an answer
    """

    event: T
    id: str
    channel: str
    source: str
    time: datetime
    key: str | None = None
    attempt: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    requested: bool = False


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """Returned by a handler, alone or in its list: the answer to whoever requested, not to be published as well."""

    event: T


@dataclass(frozen=True, slots=True)
class Receipt:
    """What `publish` returns once Redis has the events: their ids, in order. `id` is the first."""

    ids: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.ids[0]


def trace_of(headers: Mapping[str, str] | None) -> dict[str, str]:
    """What of an event's headers its outputs take over."""
    return {name: headers[name] for name in TRACE if name in headers} if headers else {}


def utc(seconds: float) -> datetime:
    """An aware UTC datetime of Unix seconds."""
    return datetime.fromtimestamp(seconds, UTC)
