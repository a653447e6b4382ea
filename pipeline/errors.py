"""Every error the framework raises on purpose, as one tree.

PipelineError
├── ConfigurationError        a declaration or setting that cannot work (also a ValueError)
│   ├── ChannelConflict       two declarations of one channel disagree
│   └── UnknownChannel        a name that nobody has registered
├── ServerUnavailable         no Redis answers at the URL (also a ConnectionError)
│   └── ServerTooOld          the server lacks a command the framework needs
├── PublishError              an event could not be published
│   ├── EventTypeError        an event is not exactly of the channel's type (also a TypeError)
│   ├── PayloadTooLarge       a frame exceeds the size limit
│   ├── ChannelFull           the channel is at its capacity
│   └── PublishUncertain      Redis may or may not have the events
├── FrameError                bytes that are no frame (also a ValueError)
│   ├── FrameTruncated        the bytes end too early
│   ├── FrameVersionError     a version this release does not read
│   ├── FrameInvalid          header, data or tensors break the rules
│   └── PayloadGone           its tensors lay beside it, and do no longer
├── RequestError
│   ├── RequestTimeout        no answer in time (also a TimeoutError)
│   └── RequestFailed         the subscriber rejected the request or gave no answer
├── HandlerError              a handler broke its contract, e.g. a batch result of the wrong length
└── Settled outcomes, raised by handlers:  Retry · Reject
"""

from __future__ import annotations

__all__ = [
    "ChannelConflict",
    "ChannelFull",
    "ConfigurationError",
    "EventTypeError",
    "FrameError",
    "FrameInvalid",
    "FrameTruncated",
    "FrameVersionError",
    "HandlerError",
    "PayloadGone",
    "PayloadTooLarge",
    "PipelineError",
    "PublishError",
    "PublishUncertain",
    "Reject",
    "RequestError",
    "RequestFailed",
    "RequestTimeout",
    "Retry",
    "ServerTooOld",
    "ServerUnavailable",
    "UnknownChannel",
]


LONGEST_DELAY = 10 * 365 * 86400.0
"""Seconds: what is later than this is a mistake."""


class PipelineError(Exception):
    """Base of every error the framework raises on purpose."""


class ConfigurationError(PipelineError, ValueError):
    """Raised when a declaration or a setting cannot work."""


class ChannelConflict(ConfigurationError):
    """Raised when a channel is declared differently from how it is registered."""


class UnknownChannel(ConfigurationError):
    """Raised when a channel name is used that no process has registered."""


class ServerUnavailable(PipelineError, ConnectionError):
    """Raised when no Redis answers at the URL, or it refuses us."""


class ServerTooOld(ServerUnavailable):
    """Raised when the server lacks a command the framework needs (Redis 7.0 is the baseline)."""


class PublishError(PipelineError):
    """Base of the reasons why an event could not be published."""


class EventTypeError(PublishError, TypeError):
    """Raised when an event is not exactly of its channel's type: a subclass would lose fields."""


class PayloadTooLarge(PublishError, ValueError):
    """Raised when one event's encoded size exceeds `PIPELINE_MAX_FRAME_BYTES`."""


class ChannelFull(PublishError):
    """Raised when a channel declared `overflow="raise"` is at its capacity.

    `published` of the caller's events, from the first on, were taken before it was full.
    """

    def __init__(self, reason: str, *, published: int = 0) -> None:
        super().__init__(reason)
        self.published = published


class PublishUncertain(PublishError):
    """Raised when a connection was lost and Redis no longer knows whether it took the events."""


class FrameError(PipelineError, ValueError):
    """Base of the reasons why bytes could not be read as a frame."""


class FrameTruncated(FrameError):
    """Raised when a frame's bytes end before its declared length."""


class FrameVersionError(FrameError):
    """Raised when a frame was written by a version this release does not read."""


class FrameInvalid(FrameError):
    """Raised when a frame's header, data or tensors break the rules of the format."""


class PayloadGone(FrameError):
    """Raised when the tensors of a frame lay beside it (shared memory, blobs) and are not there any more."""


class RequestError(PipelineError):
    """Base of the reasons why `request` has no answer."""


class RequestTimeout(RequestError, TimeoutError):
    """Raised when no answer came within the timeout."""


class RequestFailed(RequestError):
    """Raised when the subscriber rejected the request, died on it, or returned None."""


class HandlerError(PipelineError):
    """Raised when a handler breaks its contract, e.g. returns a batch result of the wrong length."""


class Retry(Exception):
    """Raised (or returned in a batch slot) by a handler: hand me this event again later.

    `delay` is in seconds; None lets the subscriber's RetryPolicy choose. Uses up an attempt.
    """

    def __init__(self, reason: str = "", *, delay: float | None = None) -> None:
        super().__init__(reason)
        if delay is not None and not 0 <= delay < LONGEST_DELAY:
            raise ValueError(f"Retry(delay={delay!r}): the delay is in seconds, not negative, and less than ten years")
        self.reason = reason
        self.delay = delay


class Reject(Exception):
    """Raised (or returned in a batch slot) by a handler: this event is bad; set it aside as a dead letter."""

    def __init__(self, reason: str = "rejected") -> None:
        super().__init__(reason)
        self.reason = reason
