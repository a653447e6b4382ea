"""Watching: a fan-out read of a channel by anyone, that never disturbs its groups."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from .channel import Channel
from .drafts import Sequences
from .errors import ConfigurationError, FrameError, PayloadGone
from .frame import Codec, Frame
from .message import Message
from .payloads import Payloads
from .transports import Entry, Tail, Transport

__all__ = ["Beginning", "Since", "Watch", "before", "position", "undisturbed"]

logger = logging.getLogger("pipeline.watching")

T = TypeVar("T")
Since = str | float | datetime | None

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
MOST_WAITING = 64
"""Frames that may wait for a slow watcher."""


def seconds_ago(since: str) -> float | None:
    """ "5m" and "300" → 300.0; None when it is no duration."""
    unit = next(unit for unit in sorted(_UNITS, key=len, reverse=True) if since.endswith(unit))
    try:
        seconds = float(since.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


def position(since: str | float | datetime) -> str | None:
    """The stream position of a time; None when `since` is a message id. Raises ValueError."""
    given = since
    if isinstance(since, str):  # as the command line and URLs have it
        ago = seconds_ago(since)
        since = ago if ago is not None else _datetime(since) or since
    if isinstance(since, datetime):
        if since.tzinfo is None:
            raise ConfigurationError(
                f"since={given!r}: a datetime without a time zone is ambiguous; use datetime.now(UTC) and its kin"
            )
        moment = since.timestamp()
    elif isinstance(since, (int, float)):
        moment = _ago(since, given)
    elif isinstance(since, str) and ":" in since and since.rpartition(":")[2].isdigit():
        return None
    else:
        raise ConfigurationError(f'since={since!r}: use "30s", "5m", "2h", seconds, a datetime, or a message id')
    return f"{max(0, int(moment * 1000))}-0"


def _datetime(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def before(entry: str) -> str:
    """The position after which an entry is the first."""
    moment, _, events = entry.partition("-")
    return f"{moment}-{int(events) - 1}"


def _ago(seconds: float, since: object) -> float:
    if not 0 <= seconds < math.inf:
        raise ConfigurationError(f"since={since!r}: a time in the past, so not negative")
    return time.time() - seconds


async def undisturbed(closing: Coroutine[Any, Any, None]) -> None:
    """Await what no cancellation of the caller stops, however often it comes: anyio's scopes repeat it at every await.
    It takes effect afterwards."""
    task = asyncio.create_task(closing)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        logger.warning("a watch was cancelled, and could not be closed: %r", failure)
    raise cancelled


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a watch begins: after a position in each partition (None: with what is new), and there after a message."""

    positions: Sequence[str | None]
    message: str | None = None


class Watch(Generic[T]):
    """`async with app.watch(channel, since=…) as stream: async for message in stream`. Listening begins on entry.

    `dropped` counts events this watcher is known to have missed, those among them that are not of the channel's type.
    `stored` is when the server took what was read last, in Unix seconds of its clock, which all publishers share while
    `Message.time` is by each one's own; None on live channels.
    Waiting for the next message may be given up at any time (a timeout, a cancellation), and begun again: nothing is
    lost. Who still waits for one as the context is left finds that there are no more.
    """

    def __init__(
        self,
        channel: Channel[T],
        codec: Codec[T],
        transport: Transport,
        payloads: Payloads,
        begin: Callable[[], Awaitable[Beginning]],
    ) -> None:
        self._channel = channel
        self._codec = codec
        self._transport = transport
        self._payloads = payloads
        self._begin = begin
        self._message: str | None = None
        self._tails: list[Tail] = []
        self._sequences = Sequences()
        self._missed = 0
        self._said = False
        self.stored: float | None = None
        self._messages: Iterator[Message[T]] = iter(())
        """Of the newest frame, those that nobody took yet."""
        self._entry: tuple[int, Entry] | None = None
        """A frame that arrived and is not decoded yet."""
        self._queue: asyncio.Queue[tuple[int, Entry] | Exception | None] = asyncio.Queue(MOST_WAITING)
        self._pumps: list[asyncio.Task[None]] = []
        self._turn = asyncio.Lock()
        self._failure: Exception | None = None
        self._left = False

    @property
    def dropped(self) -> int:
        durable = self._channel.durable
        return self._missed + (sum(tail.dropped for tail in self._tails) if durable or self._channel.raw else 0)

    async def __aenter__(self) -> Watch[T]:
        try:
            beginning = await self._begin()
            self._message = beginning.message
            for partition, after in enumerate(beginning.positions):
                self._tails.append(await self._transport.tail(self._channel, partition, after))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._left = True
        await undisturbed(self._close())

    async def _close(self) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # then nobody waits
            self._queue.put_nowait(None)
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        outcomes = await asyncio.gather(*(tail.close() for tail in self._tails), return_exceptions=True)
        for failure in filter(None, outcomes):
            raise failure

    def __aiter__(self) -> Watch[T]:
        return self

    async def __anext__(self) -> Message[T]:
        for message in self._messages:
            return message
        async with self._turn:
            while True:
                for message in self._messages:
                    return message
                self._messages = await self._read()

    async def _read(self) -> Iterator[Message[T]]:
        """The messages of the next frame. Cancelled, it goes on with that frame when it is called again."""
        if self._entry is None:
            self._entry = await self._arrived()
        partition, entry = self._entry
        frame = await self._decode(partition, entry)
        self._entry = None
        if frame is None:
            return iter(())
        if frame.invalid:
            self._leave_out([frame.events[index] for index in frame.invalid])
        self.stored = int(entry.id.partition("-")[0]) / 1000 if self._channel.durable else None
        wanted = range(self._first(frame), len(frame.events))
        return (frame.message(index) for index in wanted if index not in frame.invalid)

    async def _arrived(self) -> tuple[int, Entry]:
        if not self._pumps:
            self._pumps = [
                asyncio.create_task(self._pump(partition, tail), name=f"watch {self._channel.name}")
                for partition, tail in enumerate(self._tails)
            ]
        if self._failure is None and not self._left:
            found = await self._queue.get()
            if isinstance(found, tuple):
                return found
            self._failure = found
        raise self._failure or StopAsyncIteration

    async def _pump(self, partition: int, tail: Tail) -> None:
        try:
            async with contextlib.aclosing(aiter(tail)) as entries:  # type: ignore[type-var]
                async for entry in entries:
                    await self._queue.put((partition, entry))
        except Exception as error:
            await self._queue.put(error)

    async def _decode(self, partition: int, entry: Entry) -> Frame[T] | None:
        try:
            if self._channel.durable:
                beside = await self._payloads.open(self._channel, partition, entry.body)
                return self._codec.decode(entry.body, count=entry.count, position=entry.position, beside=beside)
            frame = self._codec.decode_live(entry.body)
        except PayloadGone as error:
            logger.info("channel %r: %d events are left out: %s", self._channel.name, entry.count, error)
            self._missed += entry.count
            return None
        except FrameError as error:
            logger.warning("channel %r: a frame cannot be read and is left out: %s", self._channel.name, error)
            return None
        missed = self._sequences.missed(frame)
        if missed is None:
            return None
        self._missed += missed
        return frame

    def _leave_out(self, invalid: list[Any]) -> None:
        """Count them all, and say it once: who publishes another shape goes on."""
        self._missed += len(invalid)
        if not self._said:
            self._said = True
            logger.warning("channel %r: invalid events are left out: %s", self._channel.name, invalid[0].reason)

    def _first(self, frame: Frame[T]) -> int:
        """Skip, in the frame that holds it, up to and including the message whose id was given as since=."""
        if self._message is not None:
            for index in range(len(frame.events)):
                if frame.id(index) == self._message:
                    self._message = None
                    return index + 1
        return 0
